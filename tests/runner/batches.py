"""Batches for tests of plan_step: lengths, prefixes, a fragmented block table and its slots, all by pure Python.

Shape suffixes: T tokens, S sequences.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppass.runner import Bucket, StepPlan, plan_step

fixed = settings(derandomize=True, max_examples=120, deadline=None, database=None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step of a paged cache of `pages` pages, the last of which (in a shuffled order) belongs to no sequence."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    block_size: int
    slots: Tensor
    table: Tensor
    pages: int
    pad_slot: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def starts(self) -> list[int]:
        """The first natural row of each sequence."""
        return [0, *itertools.accumulate(self.lengths)][:-1]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(sequence, offset in its new tokens) of every natural row."""
        return [(s, o) for s, length in enumerate(self.lengths) for o in range(length)]

    def plan(self, cp_size: int, rank: int = 0, **given: Any) -> StepPlan:
        step = {"slot_mapping": self.slots, "block_table": self.table, "block_size": self.block_size}
        return plan_step(self.lengths, self.prefixes, cp_size=cp_size, rank=rank, **{**step, **given})


def batch_of(
    lengths: Sequence[int], prefixes: Sequence[int] | None = None, block_size: int = 16, seed: int = 0
) -> Batch:
    """Sequences with scattered pages; unused entries of the block table name page 0, as runners leave them."""
    old = [0] * len(lengths) if prefixes is None else list(prefixes)
    needed = [-(-(new + cached) // block_size) for new, cached in zip(lengths, old, strict=True)]
    order = list(range(sum(needed) + 1))
    random.Random(seed).shuffle(order)
    pages = iter(order)
    held = [[next(pages) for _ in range(n)] for n in needed]
    slots = [
        held[s][p // block_size] * block_size + p % block_size
        for s, (new, cached) in enumerate(zip(lengths, old, strict=True))
        for p in range(cached, cached + new)
    ]
    table = [own + [0] * (max(needed) - len(own)) for own in held]
    return Batch(
        tuple(lengths), tuple(old), block_size, torch.tensor(slots, dtype=torch.int32),
        torch.tensor(table, dtype=torch.int32), len(order), next(pages) * block_size,
    )  # fmt: skip


def ranks_of(plan: StepPlan) -> list[StepPlan]:
    """The plan as every rank has it. Plans of ranks differ in `rank` alone, which has a test of its own."""
    return [dataclasses.replace(plan, rank=rank) for rank in range(plan.cp_size)]


@st.composite
def batches(draw: Callable[..., Any], least: int = 1) -> Batch:
    """Up to 12 sequences of 1 to 200 new tokens, with and without a prefix; decode rows and short prompts are common.

    Args:
        least: new tokens of one sequence at least, in any place of the batch.
    """
    lengths = draw(st.lists(st.one_of(st.integers(1, 200), st.integers(1, 9)), min_size=0, max_size=11))
    lengths.insert(draw(st.integers(0, len(lengths))), draw(st.integers(least, max(200, least))))
    prefixes = [draw(st.one_of(st.just(0), st.integers(0, 150))) for _ in lengths]
    return batch_of(lengths, prefixes, draw(st.sampled_from([8, 16, 128])), draw(st.integers(0, 5)))


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A batch and its plan, which is sharded."""

    batch: Batch
    plan: StepPlan


@st.composite
def sharded(draw: Callable[..., Any], remainder: str | None = None, max_cp: int = 16) -> Sharded:
    """Plans of 2 to `max_cp` ranks, both remainders, with and without a bucket that leaves room."""
    cp_size = draw(st.integers(2, max_cp))
    batch = draw(batches(least=2 * cp_size))
    policy = remainder or draw(st.sampled_from(["balanced", "first"]))
    plan = batch.plan(cp_size, remainder=policy, pad_slot=batch.pad_slot)
    if draw(st.booleans()):
        rows = plan.rows + plan.rows % 2 + 2 * draw(st.integers(0, 9))
        columns = draw(st.one_of(st.none(), st.integers(0, 3)))
        blocks = None if columns is None else batch.table.shape[1] + columns
        bucket = Bucket(rows, len(batch.lengths) + draw(st.integers(0, 4)), blocks)
        plan = batch.plan(cp_size, remainder=policy, pad_slot=batch.pad_slot, bucket=bucket)
    return Sharded(batch, plan)


def for_all(**given_: Any) -> Callable[..., Any]:
    """A deterministic property test."""
    return lambda test: fixed(given(**given_)(test))
