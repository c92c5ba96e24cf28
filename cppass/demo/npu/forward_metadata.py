"""What a step of a paged model is told beside its tokens, and how a step is planned.

lengths  = [3, 2], prefixes = [4, 0], block_size = 4

tokens             a0 a1 a2 b0 b1        a is a chunk on 4 cached tokens, b a new prompt
positions           4  5  6  0  1
cu_q [2]            3  5                 cumulative, as TND wants it
kv_lens [2]         7  2                 per sequence, as attention over a paged cache wants it
cu_kv [2]           3  5                 cumulative over the fresh keys, as attention over packed keys wants it
block_table         [[0, 1], [2, 0]]     the blocks of each sequence; unused entries are 0
slots [5]           4  5  6  8  9        block_table[b, p // block_size] * block_size + p % block_size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cppass.errors import OptionError
from cppass.runner import StepPlan

__all__ = ["ForwardMetadata", "Step", "metadata_of", "plan_step"]

MASK_SIZE = 2048  # what the sparse modes 2, 3 and 4 of npu_fused_infer_attention_score ask for


@dataclasses.dataclass
class ForwardMetadata:
    """Attributes (T tokens, B sequences):

    slot_mapping: int32 [T], the row of ``cache.view(-1, H, D)`` that takes each token.
    block_table: int32 [B, blocks of the longest].
    cu_q: cumulative new tokens; a list of B ints.
    kv_lens: prefix and new tokens of each sequence; a list of B ints.
    cu_kv: cumulative keys of attention over fresh keys, equal to ``cu_q``; a list of B ints.
    cu_q_tensor: ``cu_q`` as int64 [B]: picks the last row of each sequence.
    mask: bool [2048, 2048], True above the diagonal (hidden).
    is_prefill: some sequence has more than one new token.
    on_prefix: some sequence has cached tokens.
    prompt_tokens: rows of the step before padding; None without padding.
    """

    slot_mapping: Tensor
    block_table: Tensor
    cu_q: list[int]
    kv_lens: list[int]
    cu_kv: list[int]
    cu_q_tensor: Tensor
    mask: Tensor
    is_prefill: bool
    on_prefix: bool
    prompt_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """``model(input_ids, step.position_ids, step.metadata)``; position_ids int64 [T]."""

    position_ids: Tensor
    metadata: ForwardMetadata


def causal_mask() -> Tensor:
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1)


def metadata_of(plan: StepPlan, mask: Tensor) -> ForwardMetadata:
    """What the model's forward is told of a step that cppass.runner has planned: the plan's fields under its names."""
    return ForwardMetadata(
        slot_mapping=plan.slot_mapping,
        block_table=plan.block_table,
        cu_q=plan.cu_q,
        kv_lens=plan.kv_lens,
        cu_kv=plan.cu_kv,
        cu_q_tensor=plan.cu_q_tensor,
        mask=mask,
        is_prefill=max(plan.lengths) > 1,
        on_prefix=max(plan.prefixes) > 0,
    )


def plan_step(
    lengths: Sequence[int],
    prefixes: Sequence[int] | None = None,
    *,
    block_size: int,
    blocks: int | None = None,
    capacity: int | None = None,
    shuffle: int | None = None,
    padded_to: int | None = None,
    mask: Tensor | None = None,
) -> Step:
    """The positions and metadata of one step.

    Args:
        lengths: new tokens of each sequence, at least 1.
        prefixes: cached tokens of each sequence; zeros if left out.
        block_size: tokens of one cache block.
        blocks: blocks of the cache; the sequences share them evenly. As many as needed if left out.
        capacity: tokens that each sequence may grow to; give the same one, ``blocks`` and ``shuffle`` to every step of
            a sequence and its blocks stay where they are. The longest of this step if left out.
        shuffle: seed of a random order of the blocks (a fragmented cache); in order if left out.
        padded_to: rows of ``input_ids`` and ``position_ids`` (position 0 in the padding). Slots and lengths are those
            of the real tokens.
        mask: of ``causal_mask``, to share one between steps.

    Raises:
        OptionError: CP050, lengths below 1, sizes that do not fit together or the cache.
    """
    prefixes = [0] * len(lengths) if prefixes is None else list(prefixes)
    if not lengths or min(lengths) < 1 or len(prefixes) != len(lengths) or min(prefixes) < 0:
        raise OptionError("CP050", f"saw lengths {list(lengths)}, prefixes {prefixes}", "give one of each per sequence")
    totals = [new + old for new, old in zip(lengths, prefixes, strict=True)]
    each = -(-max(*totals, capacity or 0, 1) // block_size)
    count = each * len(lengths) if blocks is None else blocks
    if each * len(lengths) > count or (padded_to or sum(lengths)) < sum(lengths):
        raise OptionError(
            "CP050",
            f"{len(lengths)} sequences of {each} blocks and {sum(lengths)} tokens do not fit {count} blocks",
            "give more blocks, or a larger padded_to",
        )
    order = torch.arange(count)
    if shuffle is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle))
    owned = order[: each * len(lengths)].view(len(lengths), each)
    positions = [torch.arange(old, total) for old, total in zip(prefixes, totals, strict=True)]
    slots = [owned[b][p // block_size] * block_size + p % block_size for b, p in enumerate(positions)]
    used = torch.tensor([-(-total // block_size) for total in totals])
    table = owned.masked_fill(torch.arange(each) >= used[:, None], 0)[:, : int(used.max())]
    cu_q_tensor = torch.tensor(list(lengths)).cumsum(0)
    flat = torch.cat(positions)
    padding = (padded_to or flat.numel()) - flat.numel()
    return Step(
        position_ids=torch.cat([flat, flat.new_zeros(padding)]),
        metadata=ForwardMetadata(
            slot_mapping=torch.cat(slots).to(torch.int32),
            block_table=table.to(torch.int32).contiguous(),
            cu_q=cu_q_tensor.tolist(),
            kv_lens=totals,
            cu_kv=cu_q_tensor.tolist(),
            cu_q_tensor=cu_q_tensor,
            mask=causal_mask() if mask is None else mask,
            is_prefill=max(lengths) > 1,
            on_prefix=max(prefixes) > 0,
            prompt_tokens=flat.numel() if padded_to is not None else None,
        ),
    )
