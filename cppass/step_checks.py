"""What a runner may get wrong in a step, said on the host before anything is sent. Tensors on a device are not read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cppass.errors import StepError
from cppass.layout import Zigzag


def ints(numbers: Sequence[Any]) -> list[int]:
    """Plain ints of anything that is one, such as numpy's; the rest as it is, to be refused with its value."""
    if isinstance(numbers, (str, Tensor)) or not hasattr(numbers, "__iter__"):
        given = f"a tensor {list(numbers.shape)}" if isinstance(numbers, Tensor) else repr(numbers)
        raise StepError("CP610", f"lengths or prefixes are {given}", "give a list of ints, one a sequence")
    return [int(n) if hasattr(n, "__index__") and not isinstance(n, (bool, Tensor)) else n for n in numbers]


def check_number(code: str, name: str, value: Any) -> None:
    if not hasattr(value, "__index__") or isinstance(value, (bool, Tensor)):
        raise StepError(code, f"{name}={value!r}", f"{name} is an int")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_ranks(cp_size: int, rank: int, remainder: str) -> None:
    if not (_is_int(cp_size) and _is_int(rank) and cp_size >= 1 and 0 <= rank < cp_size):
        raise StepError("CP615", f"rank {rank!r} of {cp_size!r}", "cp_size is 1 or more, rank counts from 0 below it")
    if remainder not in ("first", "balanced"):
        raise StepError("CP615", f"remainder={remainder!r} is not allowed", "it is 'first' or 'balanced'")


def check_lengths(lengths: list[int], prefixes: list[int], slot_mapping: Tensor) -> None:
    counts = [*lengths, *prefixes]
    if not lengths or len(prefixes) != len(lengths) or any(not _is_int(n) or n < 0 for n in counts):
        raise StepError(
            "CP610", f"lengths {lengths}, prefixes {prefixes}", "give an int of 0 or more of each per sequence"
        )
    if min(lengths) < 1:
        raise StepError("CP610", f"lengths {lengths}: a sequence has no new token", "leave it out of the step")
    _check_tensor("CP611", "slot_mapping", slot_mapping)
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] != sum(lengths):
        raise StepError(
            "CP610",
            f"lengths {lengths} add up to {sum(lengths)}; the slot mapping is {list(slot_mapping.shape)}",
            "give the slot of every new token, in natural order",
        )


def check_table(table: Tensor, kv_lens: list[int], block_size: int) -> None:
    if not _is_int(block_size) or block_size < 1:
        raise StepError("CP612", f"block_size={block_size!r}", "it is an int of 1 or more")
    _check_tensor("CP612", "block_table", table)
    if table.dim() != 2 or table.shape[0] != len(kv_lens):
        raise StepError(
            "CP612", f"a block table {list(table.shape)} for {len(kv_lens)} sequences", "[sequences, blocks]"
        )
    held = table.shape[1] * block_size
    short = [(s, n) for s, n in enumerate(kv_lens) if n > held]
    if short:
        raise StepError(
            "CP612",
            f"sequence {short[0][0]} has {short[0][1]} tokens with its prefix; {table.shape[1]} blocks of {block_size} "
            f"hold {held}",
            "give the block table as many columns as the longest sequence needs",
        )


def _check_tensor(code: str, name: str, value: Any) -> None:
    """Its dtype is known without reading it."""
    if not isinstance(value, Tensor):
        raise StepError(code, f"{name} is a {type(value).__name__}", "give a tensor of int32 or int64")
    if value.dtype not in (torch.int32, torch.int64):
        raise StepError(code, f"{name} is of {value.dtype}", "give int32 or int64")


def _check_pages_of(pages: Tensor, block_size: int, slots: int | None, pad_slot: int) -> None:
    """The pages of the step's sequences, prefixes included, are pages of the cache; padding is written to none."""
    low, high = int(pages.min()), int(pages.max())
    if low < 0 or (slots is not None and high * block_size >= slots):
        most = "" if slots is None else f"; the cache has {slots} slots"
        raise StepError("CP612", f"the block table names pages {low} to {high}{most}", "pages of the cache")
    if pad_slot < -1 or (slots is not None and pad_slot >= slots):
        most = "" if slots is None else f"; the cache has {slots}"
        raise StepError("CP611", f"the pad slot {pad_slot} is no slot{most}", "-1, or a slot")
    if pad_slot >= 0 and bool((pages == pad_slot // block_size).any()):
        why = f"the pad slot {pad_slot} is in page {pad_slot // block_size}, which belongs to a sequence"
        raise StepError("CP611", why, "keep a page for padding alone")


def check_pages(layout: Zigzag, kv_lens: list[int], sequences: int, block_size: int, slots: int | None) -> None:
    """The op counts the keys of its sequences in pages, those of padding too, and takes no more than the cache has."""
    if slots is None:
        return
    more = sequences - len(kv_lens) + -(-(layout.local_rows // 2 + 1) // block_size)
    needed = sum(-(-n // block_size) for n in kv_lens) + more
    if needed > slots // block_size:
        raise StepError(
            "CP613",
            f"the step counts as {needed} pages, {more} of them for the bucket's padding; the cache has "
            f"{slots // block_size}",
            "a smaller bucket, or a cache with room for its padding",
        )


def check_slots(
    slot_mapping: Tensor,
    table: Tensor,
    lengths: list[int],
    prefixes: list[int],
    block_size: int,
    slots: int | None,
    pad_slot: int,
) -> None:
    """Every token goes to a slot of its own, the one at which its block table looks for it."""
    if slot_mapping.device.type != "cpu" or table.device.type != "cpu":
        return
    low, high = int(slot_mapping.min()), int(slot_mapping.max())
    if low < 0 or (slots is not None and high >= slots):
        most = "" if slots is None else f"; the cache has {slots}"
        raise StepError("CP611", f"slots from {low} to {high}{most}", "0 to slots - 1")
    ordered = slot_mapping.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise StepError(
            "CP611", f"slot {int(twice[0])} is given to two tokens", "give every new token a slot of its own"
        )
    kv_lens = torch.tensor([old + new for old, new in zip(prefixes, lengths, strict=True)])
    used = torch.arange(table.shape[1]) < -(-kv_lens // block_size)[:, None]
    _check_pages_of(table[used].long(), block_size, slots, pad_slot)
    position = torch.cat([torch.arange(old, old + new) for new, old in zip(lengths, prefixes, strict=True)])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    meant = table.long()[sequence, position // block_size] * block_size + position % block_size
    wrong = (slot_mapping.long() != meant).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise StepError(
            "CP611",
            f"position {int(position[at])} of sequence {int(sequence[at])} is written to slot {int(slot_mapping[at])}; "
            f"its block table looks for it in slot {int(meant[at])}",
            "slots are block_table[sequence, position // block_size] * block_size + position % block_size",
        )
