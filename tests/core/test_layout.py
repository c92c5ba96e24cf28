"""The zigzag layout: a bijection of rows, balanced work, and shard/restore that lose nothing.

Shape suffixes: S tokens, m local rows, F one row's elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppass import layout
from cppass.layout import Zigzag, zigzag
from cppass.ops import MEANINGS, local_row_index, restore_index
from lowering.host import ops as host

RANKS = st.integers(1, 16)
TOKENS = st.integers(1, 200)
LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=4).map(tuple).filter(any)
fixed = settings(derandomize=True, max_examples=80, deadline=None, database=None)
steps = given(lengths=LENGTHS, cp_size=RANKS)


def rows_of(lengths: tuple[int, ...], cp_size: int) -> list[list[int | None]]:
    return [list(zigzag(lengths, cp_size).positions(rank)) for rank in range(cp_size)]


@pytest.mark.parametrize(
    ("lengths", "cp_size", "expected"),
    [
        ((8,), 2, [[0, 1, 6, 7], [2, 3, 4, 5]]),  # the pictures of layout.py
        ((7,), 2, [[0, 1, 6, None], [2, 3, 4, 5]]),
        ((4, 8), 2, [[0, 4, 5, 3, 10, 11], [1, 6, 7, 2, 8, 9]]),
        ((5,), 1, [[0, 1, 2, 3, 4]]),
        ((1,), 2, [[0], [None]]),
        ((13,), 3, [[0, 1, 2, 11, 12], [3, 4, 9, 10, None], [5, 6, 7, 8, None]]),
    ],
)
def test_who_owns_which_rows(lengths: tuple[int, ...], cp_size: int, expected: list[list[int | None]]) -> None:
    """Rank r owns block r, then block 2P - 1 - r, of every sequence; None is padding."""
    assert rows_of(lengths, cp_size) == expected


@fixed
@steps
def test_every_token_has_one_owner(lengths: tuple[int, ...], cp_size: int) -> None:
    owned = [p for rows in rows_of(lengths, cp_size) for p in rows if p is not None]
    assert sorted(owned) == list(range(sum(lengths)))


@fixed
@steps
def test_owner_is_the_inverse_of_positions(lengths: tuple[int, ...], cp_size: int) -> None:
    rows = rows_of(lengths, cp_size)
    for position in range(sum(lengths)):
        rank, row = zigzag(lengths, cp_size).owner(position)
        assert rows[rank][row] == position


@fixed
@given(cp_size=RANKS)
def test_block_owner_is_the_inverse_of_owned_blocks(cp_size: int) -> None:
    held = {
        block: (rank, half) for rank in range(cp_size) for half, block in enumerate(layout.owned_blocks(rank, cp_size))
    }
    assert held == {block: layout.block_owner(block, cp_size) for block in range(layout.blocks(cp_size))}


@fixed
@steps
def test_every_rank_has_the_same_number_of_rows(lengths: tuple[int, ...], cp_size: int) -> None:
    counts = {len(rows) for rows in rows_of(lengths, cp_size)}
    assert counts == {zigzag(lengths, cp_size).local_rows}


@fixed
@given(tokens=TOKENS, cp_size=RANKS)
def test_one_sequence_is_not_padded_beyond_its_fullest_rank(tokens: int, cp_size: int) -> None:
    assert min(rows.count(None) for rows in rows_of((tokens,), cp_size)) == 0


@fixed
@steps
def test_blocks_tile_each_sequence(lengths: tuple[int, ...], cp_size: int) -> None:
    cut = zigzag(lengths, cp_size)
    for sequence, length in enumerate(lengths):
        starts = [cut.block_start(sequence, block) for block in range(2 * cp_size)]
        ends = [start + cut.block_rows(sequence, block) for block, start in enumerate(starts)]
        assert [*starts, length] == [0, *ends]


@fixed
@steps
def test_halves_are_blocks_of_every_sequence(lengths: tuple[int, ...], cp_size: int) -> None:
    """Query lengths and ends of a half, against the positions its rows have."""
    cut, first = zigzag(lengths, cp_size), [sum(lengths[:i]) for i in range(len(lengths))]
    for rank in range(cp_size):
        seen = [p for half in (0, 1) for p in _half(cut, first, rank, half)]
        assert seen == [p for p in cut.positions(rank) if p is not None]


def _half(cut: Zigzag, first: list[int], rank: int, half: Any) -> Iterator[int]:
    for rows, end, start in zip(cut.half_rows(rank, half), cut.half_ends(rank, half), first, strict=True):
        yield from range(start + end - rows, start + end)


@fixed
@given(lengths=LENGTHS, cp_size=RANKS)
def test_sizes_of_symbols_are_the_sizes_of_ints(lengths: tuple[int, ...], cp_size: int) -> None:
    symbols = sympy.symbols(f"L:{len(lengths)}", positive=True, integer=True)
    values = dict(zip(symbols, lengths, strict=True))
    meant, seen = zigzag(lengths, cp_size), Zigzag(symbols, cp_size)
    assert seen.local_rows.subs(values) == Zigzag(lengths, cp_size).local_rows == meant.local_rows
    for block in (1, cp_size, 2 * cp_size - 1):
        assert seen.block_start(0, block).subs(values) == meant.block_start(0, block)
        assert seen.block_rows(0, block).subs(values) == meant.block_rows(0, block)


# -- balance -----------------------------------------------------------------------------------------------------------


def contiguous_pairs(tokens: int, cp_size: int, rank: int) -> int:
    """(query, key) pairs of a rank that owns tokens [rank * S/P, (rank + 1) * S/P): what zigzag is there to avoid."""
    rows = tokens // cp_size
    return sum(position + 1 for position in range(rank * rows, (rank + 1) * rows))


def imbalance(pairs: list[int]) -> Fraction:
    """Slowest rank over the mean: 1 is perfect."""
    return Fraction(max(pairs) * len(pairs), sum(pairs))


@fixed
@given(cp_size=RANKS, rows=st.integers(1, 12), prefix=st.integers(0, 300))
def test_zigzag_is_balanced_where_the_tokens_divide(cp_size: int, rows: int, prefix: int) -> None:
    tokens = 2 * cp_size * rows
    assert imbalance([zigzag((tokens,), cp_size).attention_pairs(rank, (prefix,)) for rank in range(cp_size)]) == 1


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8, 16])
def test_contiguous_is_not_balanced(cp_size: int) -> None:
    """Control: contiguous chunks tend to 2 - 1/P, which the zigzag test above would notice at once."""
    tokens = 2000 * cp_size
    seen = imbalance([contiguous_pairs(tokens, cp_size, rank) for rank in range(cp_size)])
    assert float(seen) == pytest.approx(2 - 1 / cp_size, rel=1e-3)
    assert seen > Fraction(7, 5)


@fixed
@given(tokens=TOKENS, cp_size=RANKS, prefix=st.integers(0, 50))
def test_the_ranks_share_all_of_the_work(tokens: int, cp_size: int, prefix: int) -> None:
    whole = tokens * prefix + tokens * (tokens + 1) // 2
    assert sum(zigzag((tokens,), cp_size).attention_pairs(rank, (prefix,)) for rank in range(cp_size)) == whole


# -- tensors: the meanings of the canonical ops, and the host's ops --------------------------------------------------


def numbered(outer: int, tokens: int, inner: int, dim: int) -> Tensor:
    """A tensor of three axes without equal values; axis `dim` has size outer * tokens * inner."""
    shape = [2, 3]
    shape.insert(dim, outer * tokens * inner)
    return torch.arange(outer * tokens * inner * 6, dtype=torch.float64).reshape(shape)


def host_gather(xs: list[list[Tensor]], dims: list[int], inners: list[int], cut: Cut) -> list[Tensor]:
    """What the host runs: pack on every rank, an all-gather (rank-major concatenation), unpack."""
    gathered = torch.cat([host.pack(x, dims, inners, *cut) for x in xs])
    return host.unpack(gathered, xs[0], dims, inners, *cut)


Cut = tuple[list[int], int, bool]


def cut_of(lengths: tuple[int, ...], cp_size: int) -> Cut:
    """How ops name a layout."""
    return list(lengths), cp_size, zigzag(lengths, cp_size).even


layouts = given(lengths=LENGTHS, cp_size=RANKS, outer=st.integers(1, 3), inner=st.integers(1, 3), dim=st.integers(0, 2))


@fixed
@layouts
def test_gather_restores_what_shard_cut(
    lengths: tuple[int, ...], cp_size: int, outer: int, inner: int, dim: int
) -> None:
    """x [.., outer * S * inner, ..] -> shard -> P times [.., outer * m * inner, ..] -> gather -> x, bit for bit."""
    x, cut = numbered(outer, sum(lengths), inner, dim), cut_of(lengths, cp_size)
    local = MEANINGS["shard"]([x] * cp_size, dim, inner, *cut)
    assert {tuple(part.shape) for part in local} == {
        (*x.shape[:dim], outer * Zigzag(*cut).local_rows * inner, *x.shape[dim + 1 :])
    }
    for (restored,) in MEANINGS["gather"]([[part] for part in local], [dim], [inner], *cut):
        assert torch.equal(restored, x)


@fixed
@layouts
def test_host_shard_and_gather_are_the_meanings(
    lengths: tuple[int, ...], cp_size: int, outer: int, inner: int, dim: int
) -> None:
    tokens, cut = sum(lengths), cut_of(lengths, cp_size)
    x, flat = numbered(outer, tokens, inner, dim), torch.arange(tokens)
    meant = MEANINGS["shard"]([x] * cp_size, dim, inner, *cut)
    local = [host.shard(x, dim, inner, *cut, rank) for rank in range(cp_size)]
    assert all(torch.equal(a, b) for a, b in zip(local, meant, strict=True))
    flats = [host.shard(flat, 0, 1, *cut, rank).double() for rank in range(cp_size)]
    restored = host_gather([list(pair) for pair in zip(local, flats, strict=True)], [dim, 0], [inner, 1], cut)
    assert torch.equal(restored[0], x)
    assert torch.equal(restored[1], flat.double())


@pytest.mark.parametrize("cp_size", [2, 3, 8])
def test_rank_major_rows_are_not_natural_rows(cp_size: int) -> None:
    """Control: gathered rows as they come are a permutation, and restore_index is what undoes it."""
    cut = zigzag((4 * cp_size,), cp_size)
    gathered = torch.cat([local_row_index(cut, rank, torch.device("cpu")) for rank in range(cp_size)])
    assert not torch.equal(gathered, torch.arange(4 * cp_size))
    assert torch.equal(gathered[restore_index(cut, torch.device("cpu"))], torch.arange(4 * cp_size))


@fixed
@given(tokens=TOKENS, cp_size=RANKS, data=st.data())
def test_picked_rows_come_from_their_owners(tokens: int, cp_size: int, data: st.DataObject) -> None:
    """gather_rows(start, count) == x[start : start + count]; a negative start counts back from the last token."""
    start = data.draw(st.integers(-tokens, tokens - 1))
    count = data.draw(st.integers(1, -start if start < 0 else tokens - start))
    x = numbered(1, tokens, 1, 1)
    first, cut = start % tokens, cut_of((tokens,), cp_size)
    local = MEANINGS["shard"]([x] * cp_size, 1, 1, *cut)
    for picked in MEANINGS["gather_rows"](local, 1, start, count, *cut):
        assert torch.equal(picked, x[:, first : first + count])
    picks = [host.pick_rows(part, 1, start, count, *cut, rank) for rank, part in enumerate(local)]
    placed = host.place_rows(torch.cat(picks), local[0], 1, start, count, *cut)
    assert torch.equal(placed, x[:, first : first + count])
