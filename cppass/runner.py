"""What a graph-mode model runner calls once per step: plan a batch, shard its rows, restore rows. Torch alone.

plan = plan_step([13, 50, 1], [0, 64, 127], slot_mapping=slots, block_table=table, block_size=128, cp_size=2, rank=rank)
model = cp_model if plan.sharded else plain_model          # torch.compile(..., {"inputs": "sharded", ...}), or not
logits = model(plan.shard(ids), plan.shard(positions), metadata_of(plan))

    lengths [13, 50, 1], prefixes [0, 64, 127]             new tokens, and tokens in the cache
    cu_q    [13, 63, 64]        kv_lens [13, 114, 128]     of the whole step, on every rank
    slot_mapping [P * m]        in gathered order, -1 in padding rows
    shard(ids) [m]              this rank's rows: prev blocks, padding, next blocks, padding

Everything follows from lists of ints on the host: no tensor is read back from a device. Contract and names beside those
of SGLang, vLLM-Ascend and torchair-style models: docs/runner.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cppass.errors import StepError
from cppass.layout import Half, Remainder, Zigzag, blocks
from cppass.sharded_ops import gathered_positions
from cppass.step_checks import check_lengths, check_number, check_pages, check_ranks, check_slots, check_table, ints
from cppass.step_tag import StepTag

__all__ = ["Bucket", "HalfLengths", "StepPlan", "plan_step"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Sizes that many steps share, so that one graph serves them all.

    Attributes:
        rows: local rows of each rank; even. A step of up to P * rows tokens fits.
        sequences: sequences; missing ones are added with no new token.
        blocks: columns of the block table; None keeps those it has.
    """

    rows: int
    sequences: int
    blocks: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.rows, self.sequences, 1 if self.blocks is None else self.blocks)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes) or self.rows % 2:
            raise StepError("CP613", f"{self} is not allowed", "rows is even, and every size is an int of 1 or more")


@dataclasses.dataclass(frozen=True)
class HalfLengths:
    """What fused-infer-attention is told of one half of a rank's rows.

    Attributes:
        q_lens, kv_lens: per sequence.
        cu_q: cumulative query lengths, as TND takes them.
        cu_kv: cumulative key/value lengths, as packed keys take them; a paged cache takes kv_lens.
    """

    q_lens: list[int]
    kv_lens: list[int]

    @property
    def cu_q(self) -> list[int]:
        return list(itertools.accumulate(self.q_lens))

    @property
    def cu_kv(self) -> list[int]:
        return list(itertools.accumulate(self.kv_lens))


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step, as one rank sees it. Equal on all ranks but for `rank` and what `shard` returns.

    Attributes:
        sharded: whether ranks share the step. If not, every rank calls the plain model with whole rows: `shard` returns
            its argument, and slots are in natural order.
        reason: why it is not sharded, "" where it is.
        rank, cp_size: of the group that shares sequences.
        lengths, prefixes: of the step's sequences: new tokens, and tokens that are in the cache.
        layout: which rows each rank owns.
        cu_q: cumulative new tokens, padded to the bucket's sequences; a list of ints.
        kv_lens: prefix and new tokens of each sequence (1 for sequences that the bucket adds).
        cu_q_tensor: cu_q as int64 [sequences] on the slots' device; cu_q_tensor - 1 are the last rows.
        slot_mapping: [P * m] in gathered order, padding rows with the pad slot; [T] where the step is not sharded.
        block_table: int32 [sequences, blocks], page 0 where the bucket adds something.
        bucket: what the step was padded to.
        number: of this plan in its process.
    """

    sharded: bool
    reason: str
    rank: int
    cp_size: int
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    layout: Zigzag
    cu_q: list[int]
    kv_lens: list[int]
    cu_q_tensor: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    bucket: Bucket | None
    number: int = dataclasses.field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        for x in (self.cu_q_tensor, self.slot_mapping, self.block_table) if self.sharded else ():
            self._tagged(x)

    @property
    def tokens(self) -> int:
        """New tokens of the step, T."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Rows that this rank hands to its model: m, padding included; T where the step is not sharded."""
        return int(self.layout.local_rows) if self.sharded else self.tokens

    @property
    def cu_kv(self) -> list[int]:
        """Cumulative keys of the step, as attention over packed keys takes them; meant for steps without a prefix."""
        padded = [*self.lengths, *[0] * (len(self.kv_lens) - len(self.lengths))]
        old = [*self.prefixes, *[0] * (len(self.kv_lens) - len(self.lengths))]
        return list(itertools.accumulate(a + b for a, b in zip(padded, old, strict=True)))

    @cached_property
    def positions(self) -> list[int | None]:
        """Natural row of each of this rank's rows, None for padding."""
        return list(self.layout.positions(self.rank)) if self.sharded else list(range(self.tokens))

    def half(self, half: Half, rank: int | None = None) -> HalfLengths:
        """Lengths of a rank's prev (0) or next (1) half: this rank's, if none is named."""
        self._check_sharded("half lengths")
        rank = self.rank if rank is None else rank
        ends = self.layout.half_ends(rank, half)
        return HalfLengths(
            self.layout.half_rows(rank, half), [old + end for old, end in zip(self.prefixes, ends, strict=True)]
        )

    @cached_property
    def last_rows(self) -> list[tuple[int, int]]:
        """(rank, local row) of the last new token of each sequence: its owner samples, or all do after a look-up."""
        self._check_sharded("owners")
        return [self.layout.owner(end - 1) for end in self.cu_q[: len(self.lengths)]]

    def shard(self, x: Tensor, dim: int = 0, pad: float = 0) -> Tensor:
        """This rank's rows [.., m, ..] of whole rows [.., T, ..]; `pad` in padding rows.

        Raises:
            StepError: CP614, x has other rows than this step: it belongs to another one.
        """
        self._check_rows(x, dim, self.tokens, "tokens")
        if not self.sharded:
            return x
        own = torch.tensor([self.tokens if p is None else p for p in self.positions], device=x.device)
        padding = x.new_full((*x.shape[:dim], 1, *x.shape[dim % x.dim() + 1 :]), pad)
        return self._tagged(torch.cat([x, padding], dim).index_select(dim, own))

    def restore(self, gathered: Tensor, dim: int = 0) -> Tensor:
        """Whole rows [.., T, ..] of the rows of all ranks, one rank after the other [.., P * m, ..].

        Raises:
            StepError: CP614, other rows than this step has.
        """
        if not self.sharded:
            self._check_rows(gathered, dim, self.tokens, "tokens")
            return gathered
        self._check_rows(gathered, dim, self.cp_size * self.rows, f"rows of {self.cp_size} ranks")
        return gathered.index_select(dim, torch.tensor(self.restore_index, device=gathered.device))

    def restore_rows(self, gathered: Tensor, rows: Sequence[int], dim: int = 0) -> Tensor:
        """Some natural rows alone, such as the sampled ones; arguments as `restore` takes them."""
        self._check_rows(gathered, dim, self.cp_size * self.rows if self.sharded else self.tokens, "rows")
        wrong = [row for row in rows if not hasattr(row, "__index__") or not 0 <= row < self.tokens]
        if wrong:
            raise StepError("CP614", f"rows {wrong[:8]} of a step of {self.tokens} tokens", "rows count from 0")
        places = [self.restore_index[row] for row in rows] if self.sharded else list(rows)
        return gathered.index_select(dim, torch.tensor(places, dtype=torch.int64, device=gathered.device))

    @cached_property
    def restore_index(self) -> list[int]:
        """Where the natural rows are among gathered rows: restored[row] = gathered[restore_index[row]]."""
        if not self.sharded:
            return list(range(self.tokens))
        found = {p: i for i, p in enumerate(gathered_positions(self.layout)) if p is not None}
        return [found[p] for p in range(self.tokens)]

    def _tagged(self, x: Tensor) -> Tensor:
        """Sizes of a bucket stay numbers under dynamic=True, while lengths are symbols; the tensor knows its step."""
        if self.bucket is not None:
            torch._dynamo.mark_static(x)
        return StepTag(self.number, (self.cp_size, self.rank, self.layout.remainder)).put(x)

    def _check_rows(self, x: Tensor, dim: int, rows: int, what: str) -> None:
        seen = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        known = isinstance(x, Tensor) and isinstance(dim, int) and -x.dim() <= dim < x.dim()
        if not known or x.shape[dim] != rows:
            raise StepError(
                "CP614",
                f"{seen} does not have the {rows} {what} of this step in dimension {dim!r}",
                "use the plan of the step that the tensor belongs to",
            )

    def _check_sharded(self, what: str) -> None:
        if not self.sharded:
            raise StepError("CP614", f"{what} of a step that is not sharded: {self.reason}", "ask plan.sharded first")


def plan_step(
    lengths: Sequence[int],
    prefixes: Sequence[int] | None = None,
    *,
    slot_mapping: Tensor,
    block_table: Tensor,
    block_size: int,
    cp_size: int,
    rank: int,
    remainder: Remainder = "balanced",
    bucket: Bucket | None = None,
    pad_slot: int = -1,
    min_tokens: int = 0,
    slots: int | None = None,
) -> StepPlan:
    """Plan one step. Call it with the same arguments (but for `rank`) on every rank.

    Args:
        lengths: new tokens of each sequence: prompts, chunks and decode rows in any mix.
        prefixes: tokens of each sequence that are in the cache; none if left out.
        slot_mapping: int [T], block * block_size + offset of every new token, in natural order.
        block_table: int32 [sequences, blocks].
        remainder: as the option of the compiled model says.
        bucket: sizes to pad to; without one, as few rows as the step needs.
        pad_slot: slot of padding rows: -1 where the cache is written by npu_scatter_pa_kv_cache, which skips it; with
            npu_scatter_nd_update_ a slot of a page that belongs to no sequence.
        min_tokens: shorter steps are not sharded. 2 * cp_size tokens of one sequence are needed in any case.
        slots: of the whole cache; slots are checked against it.

    Slots and block table are checked where they are on the CPU; on a device they are not read.

    Raises:
        StepError: CP610 lengths, CP611 slots, CP612 block table, CP613 a step above its bucket, CP615 ranks.
    """
    lengths = ints(lengths)
    old = [0] * len(lengths) if prefixes is None else ints(prefixes)
    check_ranks(cp_size, rank, remainder)
    check_number("CP610", "min_tokens", min_tokens)
    check_number("CP611", "pad_slot", pad_slot)
    if slots is not None:
        check_number("CP611", "slots", slots)
    if not isinstance(bucket, (Bucket, type(None))):
        raise StepError("CP613", f"bucket={bucket!r}", "it is a cppass.runner.Bucket, or None")
    check_lengths(lengths, old, slot_mapping)
    kv_lens = [a + b for a, b in zip(lengths, old, strict=True)]
    check_table(block_table, kv_lens, block_size)
    check_slots(slot_mapping, block_table, lengths, old, block_size, slots, pad_slot)
    layout = Zigzag(tuple(lengths), cp_size, remainder=remainder)
    reason = _not_sharded(lengths, cp_size, min_tokens)
    device = slot_mapping.device
    if reason:
        ends = list(itertools.accumulate(lengths))
        ends_tensor = torch.tensor(ends, dtype=torch.int64, device=device)
        given = (ends, kv_lens, ends_tensor, slot_mapping, block_table, None)
        return StepPlan(False, reason, rank, cp_size, tuple(lengths), tuple(old), layout, *given)
    layout = _in_bucket(layout, bucket)
    if bucket is not None:
        check_pages(layout, kv_lens, bucket.sequences, block_size, slots)
    more = (bucket.sequences if bucket else len(lengths)) - len(lengths)
    ends = list(itertools.accumulate([*lengths, *[0] * more]))
    return StepPlan(
        True, "", rank, cp_size, tuple(lengths), tuple(old), layout, ends, [*kv_lens, *[1] * more],
        torch.tensor(ends, dtype=torch.int64, device=device), _gathered_slots(slot_mapping, layout, pad_slot),
        _padded_table(block_table, more, bucket), bucket,
    )  # fmt: skip


def _not_sharded(lengths: list[int], cp_size: int, min_tokens: int) -> str:
    if cp_size == 1:
        return "one rank"
    if max(lengths) < blocks(cp_size):
        return f"no sequence has {blocks(cp_size)} new tokens (2 * cp_size)"
    return f"{sum(lengths)} tokens, fewer than min_tokens = {min_tokens}" if sum(lengths) < min_tokens else ""


def _in_bucket(layout: Zigzag, bucket: Bucket | None) -> Zigzag:
    """The layout with its local rows: the bucket's, or as few as there can be."""
    needed = max(int(layout.real_rows(rank)) for rank in range(layout.cp_size))
    if layout.remainder == "balanced":
        needed = int(layout.local_rows)
    if bucket is None:
        return dataclasses.replace(layout, rows=None if layout.remainder == "balanced" else needed)
    if needed > bucket.rows or len(layout.lengths) > bucket.sequences:
        raise StepError(
            "CP613",
            f"a step of {layout.tokens} tokens in {len(layout.lengths)} sequences needs {needed} rows a rank; the "
            f"bucket has {bucket.rows} rows and {bucket.sequences} sequences",
            "take a larger bucket, or fewer tokens a step",
        )
    return dataclasses.replace(layout, rows=bucket.rows)


def _gathered_slots(slot_mapping: Tensor, layout: Zigzag, pad_slot: int) -> Tensor:
    """[T] in natural order -> [P * m] as gathered rows arrive."""
    order = [layout.tokens if p is None else p for p in gathered_positions(layout)]
    padded = torch.cat([slot_mapping, slot_mapping.new_full((1,), pad_slot)])
    return padded.index_select(0, torch.tensor(order, device=slot_mapping.device))


def _padded_table(table: Tensor, more: int, bucket: Bucket | None) -> Tensor:
    columns = 0 if bucket is None or bucket.blocks is None else bucket.blocks - table.shape[1]
    if columns < 0:
        raise StepError(
            "CP613", f"a block table of {table.shape[1]} columns in a bucket of {table.shape[1] + columns}", "widen it"
        )
    return torch.nn.functional.pad(table, (0, columns, 0, more)) if columns or more else table.clone()
