"""The zigzag layout: a bijection of rows, balanced work, and shard/restore that lose nothing.

Shape suffixes: S tokens, c = ceil(S / 2P) rows of a block, m = 2c local rows, F one row's elements.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppass import layout
from cppass.ops import MEANINGS, local_row_index, restore_rows
from lowering.host import ops as host

RANKS = st.integers(1, 16)
TOKENS = st.integers(1, 200)
fixed = settings(derandomize=True, max_examples=80, deadline=None, database=None)


def rows_of(tokens: int, cp_size: int, rank: int) -> list[int | None]:
    return list(layout.local_positions(tokens, cp_size, rank))


@pytest.mark.parametrize(
    ("tokens", "cp_size", "expected"),
    [
        (8, 2, [[0, 1, 6, 7], [2, 3, 4, 5]]),  # the pictures of layout.py
        (7, 2, [[0, 1, 6, None], [2, 3, 4, 5]]),
        (5, 1, [[0, 1, 2, 3, 4, None]]),
        (1, 2, [[0, None], [None, None]]),
        (13, 3, [[0, 1, 2, None, None, None], [3, 4, 5, 12, None, None], [6, 7, 8, 9, 10, 11]]),
    ],
)
def test_who_owns_which_rows(tokens: int, cp_size: int, expected: list[list[int | None]]) -> None:
    """block = ceil(tokens / 2P); rank r owns block r, then block 2P - 1 - r; None is padding."""
    assert [rows_of(tokens, cp_size, rank) for rank in range(cp_size)] == expected


@fixed
@given(tokens=TOKENS, cp_size=RANKS)
def test_every_token_has_one_owner(tokens: int, cp_size: int) -> None:
    owned = [p for rank in range(cp_size) for p in rows_of(tokens, cp_size, rank) if p is not None]
    assert sorted(owned) == list(range(tokens))


@fixed
@given(tokens=TOKENS, cp_size=RANKS)
def test_row_owner_is_the_inverse_of_local_positions(tokens: int, cp_size: int) -> None:
    for position in range(tokens):
        rank, row = layout.row_owner(position, tokens, cp_size)
        assert rows_of(tokens, cp_size, rank)[row] == position


@fixed
@given(cp_size=RANKS)
def test_block_owner_is_the_inverse_of_owned_blocks(cp_size: int) -> None:
    held = {
        block: (rank, half) for rank in range(cp_size) for half, block in enumerate(layout.owned_blocks(rank, cp_size))
    }
    assert held == {block: layout.block_owner(block, cp_size) for block in range(layout.blocks(cp_size))}


@fixed
@given(tokens=TOKENS, cp_size=RANKS)
def test_every_rank_has_the_same_number_of_rows(tokens: int, cp_size: int) -> None:
    counts = {len(rows_of(tokens, cp_size, rank)) for rank in range(cp_size)}
    assert counts == {layout.local_rows(tokens, cp_size)}


@fixed
@given(tokens=TOKENS, cp_size=RANKS)
def test_padding_is_behind_the_last_token(tokens: int, cp_size: int) -> None:
    """Put the blocks in natural order: the tokens come first, in order, then nothing but padding."""
    rows = layout.block_rows(tokens, cp_size)
    natural: list[int | None] = []
    for block in range(layout.blocks(cp_size)):
        rank, half = layout.block_owner(block, cp_size)
        natural += rows_of(tokens, cp_size, rank)[half * rows : (half + 1) * rows]
    assert natural == [*range(tokens), *[None] * (2 * cp_size * rows - tokens)]


@fixed
@given(tokens=TOKENS, cp_size=RANKS)
def test_block_spans_tile_the_tokens(tokens: int, cp_size: int) -> None:
    spans = [layout.block_span(block, tokens, cp_size) for block in range(layout.blocks(cp_size))]
    assert [p for start, end in spans for p in range(start, end)] == list(range(tokens))


@fixed
@given(tokens=TOKENS, cp_size=RANKS)
def test_sizes_of_symbols_are_the_sizes_of_ints(tokens: int, cp_size: int) -> None:
    S = sympy.Symbol("S", positive=True, integer=True)
    assert layout.block_rows(S, cp_size).subs(S, tokens) == layout.block_rows(tokens, cp_size)
    assert layout.local_rows(S, cp_size).subs(S, tokens) == layout.local_rows(tokens, cp_size)


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
    assert imbalance([layout.attention_pairs(tokens, cp_size, rank, prefix) for rank in range(cp_size)]) == 1


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
    assert sum(layout.attention_pairs(tokens, cp_size, rank, prefix) for rank in range(cp_size)) == whole


# -- tensors: the meanings of the canonical ops, and the host's ops --------------------------------------------------


def numbered(outer: int, tokens: int, inner: int, dim: int) -> Tensor:
    """A tensor of three axes without equal values; axis `dim` has size outer * tokens * inner."""
    shape = [2, 3]
    shape.insert(dim, outer * tokens * inner)
    return torch.arange(outer * tokens * inner * 6, dtype=torch.float64).reshape(shape)


def host_gather(xs: list[list[Tensor]], dims: list[int], inners: list[int], tokens: int, cp_size: int) -> list[Tensor]:
    """What the host runs: pack on every rank, an all-gather (rank-major concatenation), unpack."""
    gathered = torch.cat([host.pack(x, dims, inners, tokens, cp_size) for x in xs])
    return host.unpack(gathered, xs[0], dims, inners, tokens, cp_size)


layouts = given(tokens=TOKENS, cp_size=RANKS, outer=st.integers(1, 3), inner=st.integers(1, 3), dim=st.integers(0, 2))


@fixed
@layouts
def test_gather_restores_what_shard_cut(tokens: int, cp_size: int, outer: int, inner: int, dim: int) -> None:
    """x [.., outer * S * inner, ..] -> shard -> P times [.., outer * m * inner, ..] -> gather -> x, bit for bit."""
    x = numbered(outer, tokens, inner, dim)
    local = MEANINGS["shard"]([x] * cp_size, dim, inner, tokens, cp_size)
    assert {tuple(part.shape) for part in local} == {
        (*x.shape[:dim], outer * layout.local_rows(tokens, cp_size) * inner, *x.shape[dim + 1 :])
    }
    for (restored,) in MEANINGS["gather"]([[part] for part in local], [dim], [inner], tokens, cp_size):
        assert torch.equal(restored, x)


@fixed
@layouts
def test_host_shard_and_gather_are_the_meanings(tokens: int, cp_size: int, outer: int, inner: int, dim: int) -> None:
    x, flat = numbered(outer, tokens, inner, dim), torch.arange(tokens)
    meant = MEANINGS["shard"]([x] * cp_size, dim, inner, tokens, cp_size)
    local = [host.shard(x, dim, inner, tokens, cp_size, rank) for rank in range(cp_size)]
    assert all(torch.equal(a, b) for a, b in zip(local, meant, strict=True))
    flats = [host.shard(flat, 0, 1, tokens, cp_size, rank).double() for rank in range(cp_size)]
    restored = host_gather(
        [list(pair) for pair in zip(local, flats, strict=True)], [dim, 0], [inner, 1], tokens, cp_size
    )
    assert torch.equal(restored[0], x)
    assert torch.equal(restored[1], flat.double())


@pytest.mark.parametrize("cp_size", [2, 3, 8])
def test_rank_major_rows_are_not_natural_rows(cp_size: int) -> None:
    """Control: gathered rows as they come are a permutation, and restore_rows is what undoes it."""
    tokens = 4 * cp_size
    local = [local_row_index(tokens, cp_size, rank, torch.device("cpu")) for rank in range(cp_size)]
    gathered = torch.stack(local)[:, :, None]
    assert not torch.equal(gathered.flatten(), torch.arange(tokens))
    assert torch.equal(restore_rows(gathered, tokens, cp_size).flatten(), torch.arange(tokens))


@fixed
@given(tokens=TOKENS, cp_size=RANKS, data=st.data())
def test_picked_rows_come_from_their_owners(tokens: int, cp_size: int, data: st.DataObject) -> None:
    """gather_rows(start, count) == x[start : start + count]; a negative start counts back from the last token."""
    start = data.draw(st.integers(-tokens, tokens - 1))
    count = data.draw(st.integers(1, -start if start < 0 else tokens - start))
    x = numbered(1, tokens, 1, 1)
    first = start % tokens
    local = MEANINGS["shard"]([x] * cp_size, 1, 1, tokens, cp_size)
    for picked in MEANINGS["gather_rows"](local, 1, start, count, tokens, cp_size):
        assert torch.equal(picked, x[:, first : first + count])
    picks = [host.pick_rows(part, 1, start, count, tokens, cp_size, rank) for rank, part in enumerate(local)]
    placed = host.place_rows(torch.cat(picks), local[0], 1, start, count, tokens, cp_size)
    assert torch.equal(placed, x[:, first : first + count])
