"""plan_step: who owns which rows, what attention of a half may see, where rows are written; over random batches.

Expected values are derived here from lengths and positions alone, not by the layout under test.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from runner.batches import Batch, Sharded, batch_of, batches, for_all, ranks_of, sharded

from cppass.layout import Remainder, Zigzag
from cppass.runner import Bucket, StepPlan

POLICIES = ["balanced", "first"]


def halves(plan: StepPlan) -> list[list[int]]:
    """The natural rows of this rank's prev and next half; halves are told apart by the query lengths."""
    first = plan.rows // 2 if plan.layout.remainder == "balanced" else sum(plan.half(0).q_lens)
    return [[p for p in part if p is not None] for part in (plan.positions[:first], plan.positions[first:])]


# -- ownership ---------------------------------------------------------------------------------------------------------


@for_all(case=sharded())
def test_every_token_has_one_owner(case: Sharded) -> None:
    owned = [p for own in ranks_of(case.plan) for p in own.positions if p is not None]
    assert sorted(owned) == list(range(case.batch.tokens))


@for_all(case=sharded())
def test_every_rank_has_the_same_number_of_rows(case: Sharded) -> None:
    bucket = case.plan.bucket
    rows = {len(own.positions) for own in ranks_of(case.plan)}
    assert rows == {case.plan.rows}
    assert bucket is None or rows == {bucket.rows}


@for_all(case=sharded(max_cp=6))
def test_plans_of_ranks_differ_in_the_rank_alone(case: Sharded) -> None:
    given = {"remainder": case.plan.layout.remainder, "bucket": case.plan.bucket, "pad_slot": case.batch.pad_slot}
    fields = [field.name for field in dataclasses.fields(StepPlan) if field.name != "number"]  # of each plan made
    for meant in ranks_of(case.plan):
        seen = case.batch.plan(case.plan.cp_size, meant.rank, **given)
        for name in fields:
            a, b = getattr(seen, name), getattr(meant, name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@for_all(case=sharded())
def test_the_owner_of_each_last_row(case: Sharded) -> None:
    own = ranks_of(case.plan)
    seen = [own[rank].positions[row] for rank, row in case.plan.last_rows]
    assert seen == [end - 1 for end in itertools.accumulate(case.batch.lengths)]


def sglang_rows(lengths: tuple[int, ...], cp_size: int, rank: int) -> list[int]:
    """SGLang's zigzag split: L // n rows a block, one more for the first L % n; rank r owns blocks r and n - 1 - r."""
    n, rows, first = 2 * cp_size, ([], []), 0
    for length in lengths:
        sizes = [length // n + 1] * (length % n) + [length // n] * (n - length % n)
        for half, block in zip(rows, (rank, n - 1 - rank), strict=True):
            start = first + sum(sizes[:block])
            half.extend(range(start, start + sizes[block]))
        first += length
    return rows[0] + rows[1]


@for_all(case=sharded("first"))
def test_first_shards_as_sglang_does(case: Sharded) -> None:
    for own in ranks_of(case.plan):
        meant = sglang_rows(case.batch.lengths, case.plan.cp_size, own.rank)
        assert own.positions == meant + [None] * (case.plan.rows - len(meant))


def test_balanced_does_not_shard_as_sglang_does() -> None:
    """Control: the formula above tells the policies apart."""
    plan = batch_of([5, 5, 5]).plan(2, remainder="balanced")
    assert [p for p in plan.positions if p is not None] != sglang_rows((5, 5, 5), 2, 0)


# -- tensors -----------------------------------------------------------------------------------------------------------


def numbered(tokens: int, dim: int) -> torch.Tensor:
    """Three axes, no two values alike; axis `dim` has size `tokens`."""
    shape = [2, 3]
    shape.insert(dim % 3, tokens)
    return torch.arange(6 * tokens).reshape(shape)


@for_all(case=sharded(), dim=st.integers(-3, 2), pad=st.sampled_from([0, -7]))
def test_restore_undoes_shard(case: Sharded, dim: int, pad: int) -> None:
    x = numbered(case.batch.tokens, dim)
    parts = [own.shard(x, dim, pad) for own in ranks_of(case.plan)]
    assert {part.shape[dim] for part in parts} == {case.plan.rows}
    assert torch.equal(case.plan.restore(torch.cat(parts, dim), dim), x)


@for_all(case=sharded(), dim=st.integers(0, 2))
def test_padding_rows_hold_the_pad_value(case: Sharded, dim: int) -> None:
    for own in ranks_of(case.plan):
        padding = torch.tensor([p is None for p in own.positions])
        part = own.shard(numbered(case.batch.tokens, dim), dim, -7).movedim(dim, 0)
        assert torch.equal((part == -7).flatten(1).all(1), padding)
        assert torch.equal((part == -7).flatten(1).any(1), padding)


@for_all(case=sharded(), data=st.data())
def test_some_rows_alone(case: Sharded, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, case.batch.tokens - 1), max_size=8))
    x = numbered(case.batch.tokens, 0)
    gathered = torch.cat([own.shard(x) for own in ranks_of(case.plan)])
    assert torch.equal(case.plan.restore_rows(gathered, rows), x[rows])


@for_all(case=sharded())
def test_the_index_that_restores(case: Sharded) -> None:
    gathered = [p for own in ranks_of(case.plan) for p in own.positions]
    assert [gathered[place] for place in case.plan.restore_index] == list(range(case.batch.tokens))


def test_gathered_rows_are_not_in_natural_order() -> None:
    """Control: without restore the rows are others."""
    plan, x = batch_of([16]).plan(2), torch.arange(16)
    gathered = torch.cat([own.shard(x) for own in ranks_of(plan)])
    assert not torch.equal(gathered, x)


@for_all(batch=batches(), cp_size=st.integers(1, 16))
def test_a_step_that_is_not_sharded_is_handed_on_as_it_is(batch: Batch, cp_size: int) -> None:
    plan = batch.plan(cp_size, cp_size - 1, min_tokens=10**9)
    x = numbered(batch.tokens, 0)
    assert not plan.sharded and plan.reason
    assert plan.shard(x) is x and plan.restore(x) is x
    assert torch.equal(plan.restore_rows(x, [batch.tokens - 1]), x[-1:])
    assert plan.slot_mapping is batch.slots and plan.rows == batch.tokens


@for_all(batch=batches(), cp_size=st.integers(1, 16))
def test_a_step_is_sharded_where_a_sequence_has_a_token_for_each_block(batch: Batch, cp_size: int) -> None:
    assert batch.plan(cp_size).sharded == (cp_size > 1 and max(batch.lengths) >= 2 * cp_size)


# -- attention of the halves -------------------------------------------------------------------------------------------


@for_all(case=sharded())
def test_query_lengths_count_the_rows_of_each_half(case: Sharded) -> None:
    natural = case.batch.rows
    for own in ranks_of(case.plan):
        for half, rows in enumerate(halves(own)):
            counts = [sum(natural[p][0] == s for p in rows) for s in range(len(case.batch.lengths))]
            assert own.half(half).q_lens == counts  # type: ignore[arg-type]
            assert own.half(half).cu_q == list(itertools.accumulate(counts))  # type: ignore[arg-type]


@for_all(case=sharded())
def test_all_halves_together_are_the_step(case: Sharded) -> None:
    q_lens = [case.plan.half(half, rank).q_lens for rank in range(case.plan.cp_size) for half in (0, 1)]
    assert tuple(map(sum, zip(*q_lens, strict=True))) == case.batch.lengths


@for_all(case=sharded())
def test_keys_of_a_half_are_the_prefix_and_all_up_to_the_end_of_its_block(case: Sharded) -> None:
    """The block ends where its last row is; an empty one ends where the blocks before it do."""
    n = 2 * case.plan.cp_size
    by_block = [case.plan.half(*((0, b) if b < n // 2 else (1, n - 1 - b))) for b in range(n)]  # type: ignore[arg-type]
    for s, prefix in enumerate(case.batch.prefixes):
        ends = list(itertools.accumulate(lengths.q_lens[s] for lengths in by_block))
        assert [lengths.kv_lens[s] for lengths in by_block] == [prefix + end for end in ends]


@for_all(case=sharded())
def test_no_half_has_more_queries_than_keys(case: Sharded) -> None:
    for rank, half in itertools.product(range(case.plan.cp_size), (0, 1)):
        seen = case.plan.half(half, rank)  # type: ignore[arg-type]
        assert all(q <= kv for q, kv in zip(seen.q_lens, seen.kv_lens, strict=True))
        assert seen.cu_kv == list(itertools.accumulate(seen.kv_lens))


@for_all(case=sharded())
def test_a_token_sees_the_keys_that_it_sees_on_one_device(case: Sharded) -> None:
    """Causal from the bottom right: query i of q sees the first kv - q + i + 1 keys of its sequence."""
    batch, seen = case.batch, {}
    for own in ranks_of(case.plan):
        for half, rows in enumerate(halves(own)):
            lengths, row = own.half(half), iter(rows)  # type: ignore[arg-type]
            for s, (q, kv) in enumerate(zip(lengths.q_lens, lengths.kv_lens, strict=True)):
                seen |= {next(row): (s, kv - q + i + 1) for i in range(q)}
    meant = {p: (s, batch.prefixes[s] + offset + 1) for p, (s, offset) in enumerate(batch.rows)}
    assert seen == meant


# -- slots, block table, lengths of the step ---------------------------------------------------------------------------


@for_all(case=sharded())
def test_every_row_is_written_to_its_own_slot_and_padding_to_the_pad_slot(case: Sharded) -> None:
    gathered = [p for own in ranks_of(case.plan) for p in own.positions]
    slots = case.batch.slots.tolist()
    assert case.plan.slot_mapping.tolist() == [case.batch.pad_slot if p is None else slots[p] for p in gathered]
    assert case.plan.slot_mapping.dtype == case.batch.slots.dtype


@for_all(case=sharded())
def test_lengths_of_the_whole_step_are_padded_to_the_bucket(case: Sharded) -> None:
    batch, plan = case.batch, case.plan
    more = plan.bucket.sequences - len(batch.lengths) if plan.bucket else 0
    ends = list(itertools.accumulate([*batch.lengths, *[0] * more]))
    assert plan.cu_q == ends == plan.cu_q_tensor.tolist()
    totals = [a + b for a, b in zip(batch.lengths, batch.prefixes, strict=True)]
    assert plan.kv_lens == totals + [1] * more
    assert plan.cu_kv == list(itertools.accumulate(totals + [0] * more))


@for_all(case=sharded())
def test_the_block_table_is_padded_with_page_0(case: Sharded) -> None:
    table, padded, bucket = case.batch.table, case.plan.block_table, case.plan.bucket
    rows, columns = table.shape
    size = (bucket.sequences, bucket.blocks or columns) if bucket else (rows, columns)
    assert tuple(padded.shape) == size and padded.dtype == table.dtype
    assert torch.equal(padded[:rows, :columns], table)
    assert not padded[rows:].any() and not padded[:, columns:].any()


@for_all(case=sharded())
def test_the_tensors_handed_in_are_left_alone(case: Sharded) -> None:
    """Reordering and padding make tensors of their own."""
    before = case.batch.slots.clone(), case.batch.table.clone()
    case.plan.slot_mapping.fill_(-5)
    case.plan.block_table.fill_(-5)
    assert torch.equal(case.batch.slots, before[0]) and torch.equal(case.batch.table, before[1])


# -- balance -----------------------------------------------------------------------------------------------------------


def real(plan: StepPlan) -> list[int]:
    return [sum(p is not None for p in own.positions) for own in ranks_of(plan)]


@for_all(case=sharded("balanced"))
def test_balanced_ranks_differ_by_one_row(case: Sharded) -> None:
    assert max(real(case.plan)) - min(real(case.plan)) <= 1


@for_all(case=sharded("balanced"))
def test_balanced_halves_differ_by_one_row(case: Sharded) -> None:
    rows = [len(half) for own in ranks_of(case.plan) for half in halves(own)]
    assert max(rows) - min(rows) <= 1
    if case.plan.bucket is None:
        assert max(rows) == case.plan.rows // 2  # no half without a full one


@for_all(case=sharded("first"))
def test_first_has_as_many_rows_as_its_fullest_rank(case: Sharded) -> None:
    assert case.plan.bucket is not None or case.plan.rows == max(real(case.plan))


def test_first_ranks_may_differ_by_a_row_of_every_sequence() -> None:
    """Control: what balanced blocks are there to avoid."""
    assert real(batch_of([9] * 64).plan(4, remainder="first")) == [192, 128, 128, 128]


@pytest.mark.parametrize(("remainder", "factor"), [("balanced", 1.0), ("first", 4 / 3)])
def test_padding_of_many_short_sequences(remainder: Any, factor: float) -> None:
    """64 sequences of 9 tokens on 4 ranks; the peers are at 1.333 to 1.778."""
    plan = batch_of([9] * 64).plan(4, remainder=remainder)
    assert plan.cp_size * plan.rows / plan.tokens == pytest.approx(factor)


def imbalance(plan: Zigzag, prefixes: tuple[int, ...]) -> Fraction:
    """(query, key) pairs of the slowest rank over the mean: 1 is perfect."""
    pairs = [plan.attention_pairs(rank, prefixes) for rank in range(plan.cp_size)]
    return Fraction(max(pairs) * len(pairs), sum(pairs))


@for_all(
    cp_size=st.integers(2, 16),
    rows=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    prefix=st.integers(0, 99),
    remainder=st.sampled_from(POLICIES),
)
def test_work_is_equal_where_the_blocks_are(cp_size: int, rows: list[int], prefix: int, remainder: Any) -> None:
    lengths = tuple(2 * cp_size * n for n in rows)
    assert imbalance(Zigzag(lengths, cp_size, remainder=remainder), (prefix,) * len(rows)) == 1


@for_all(case=sharded())
def test_attention_pairs_are_those_that_the_halves_compute(case: Sharded) -> None:
    natural = case.batch.rows
    for own in ranks_of(case.plan):
        seen = sum(case.batch.prefixes[natural[p][0]] + natural[p][1] + 1 for p in own.positions if p is not None)
        assert case.plan.layout.attention_pairs(own.rank, case.batch.prefixes) == seen


@for_all(case=sharded())
def test_work_of_ranks_differs_by_about_a_row_of_every_sequence(case: Sharded) -> None:
    """One row more, which sees prefix + L keys at most, and L / 2P rows that begin up to P rows later: L / 2 pairs."""
    batch, layout = case.batch, case.plan.layout
    pairs = [layout.attention_pairs(rank, batch.prefixes) for rank in range(layout.cp_size)]
    assert max(pairs) - min(pairs) <= 1.5 * sum(batch.lengths) + sum(batch.prefixes)


@pytest.mark.parametrize("remainder", POLICIES)
@pytest.mark.parametrize(("cp_size", "worst"), [(2, 1.002), (4, 1.006), (8, 1.0141), (16, 1.03)])
def test_work_of_one_uneven_sequence(remainder: Any, cp_size: int, worst: float) -> None:
    """1001 to 1099 tokens: the worst is a remainder of P rows or so; about 2P / L."""
    seen = [imbalance(Zigzag((n,), cp_size, remainder=remainder), (0,)) for n in range(1001, 1100)]
    assert 1 < max(seen) <= worst


@pytest.mark.parametrize("remainder", POLICIES)
def test_work_of_33_tokens_on_8_ranks(remainder: Any) -> None:
    assert float(imbalance(Zigzag((33,), 8, remainder=remainder), (0,))) == pytest.approx(1.01248, abs=1e-5)


def test_one_sequence_cannot_be_shared_better_with_equal_rows() -> None:
    """1,000 tokens on 8 ranks leave 8 rows over: no choice of blocks that gives each rank one of them does better."""
    length, cp_size = 1000, 8
    n = 2 * cp_size
    best = min(
        max(work_of_blocks([length // n + (block in longer) for block in range(n)]))
        for longer in map(set, itertools.product(*((r, n - 1 - r) for r in range(cp_size))))
    )
    layout = Zigzag((length,), cp_size, remainder="balanced")
    assert max(layout.attention_pairs(rank, (0,)) for rank in range(cp_size)) == best
    assert float(imbalance(layout, (0,))) == pytest.approx(1.00699, abs=1e-5)


def work_of_blocks(rows: list[int]) -> list[int]:
    """(query, key) pairs of every rank, counted block by block."""
    ends = list(itertools.accumulate(rows))
    pairs = [count * end - count * (count - 1) // 2 for count, end in zip(rows, ends, strict=True)]
    return [pairs[rank] + pairs[len(rows) - 1 - rank] for rank in range(len(rows) // 2)]


MIXED = (133, 139, 68, 141, 8, 189, 149, 110, 146, 72, 32)


@pytest.mark.parametrize(
    ("remainder", "seen"),
    [("balanced", [1.00092, 1.00125, 1.01292, 1.00943]), ("first", [1.00329, 1.02715, 1.0271, 1.05135])],
)
def test_work_of_many_uneven_sequences(remainder: Any, seen: list[float]) -> None:
    """1187 tokens in 11 sequences, on 2, 4, 8 and 16 ranks: blocks that take turns share the work better."""
    ratios = [float(imbalance(Zigzag(MIXED, p, remainder=remainder), (0,) * 11)) for p in (2, 4, 8, 16)]
    assert ratios == pytest.approx(seen, abs=1e-5)


def test_a_bucket_keeps_owners_of_first() -> None:
    """Rows of a bucket are padding at the end of every rank; nothing moves."""
    batch = batch_of([13, 50, 1])
    tight = batch.plan(2, remainder="first")
    wide = batch.plan(2, remainder="first", bucket=Bucket(64, 4))
    assert wide.positions[: tight.rows] == tight.positions


@pytest.mark.parametrize(("remainder", "most"), [("balanced", 1.012), ("first", 1.019)])
def test_uneven_batches_of_a_thousand_tokens_are_nearly_balanced(remainder: Remainder, most: float) -> None:
    """Attention work of the busiest of four ranks against the mean, over 200 batches (docs/decisions/0005)."""
    rng, worst = random.Random(0), 0.0
    for _ in range(200):
        lengths: list[int] = []
        while sum(lengths) < 1000:
            lengths.append(rng.choice((rng.randrange(1, 9), rng.randrange(1, 200), rng.randrange(100, 700))))
        layout = Zigzag(tuple(lengths), 4, remainder=remainder)
        worst = max(worst, float(imbalance(layout, (0,) * len(lengths))))
    assert 1.0 < worst <= most
