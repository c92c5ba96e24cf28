"""What the host target runs: row movement and attention as opaque ops that know their rank.

Collectives are not in here: they stay visible in the graph as torch's functional collectives.

    pack      Local values -> one buffer, rows first, so that an all-gather of it is rank-major
    unpack    the gathered rows -> Full values in natural order
    gathered_order  slots of natural rows -> of gathered rows, which then need not be put in order
    shard     this rank's rows of a Full value
    pick_rows, place_rows      the same for a few rows
    attention one rank's two zigzag halves
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppass.layout import Zigzag
from cppass.ops import (
    attention_shape,
    causal_rows,
    gather_shape,
    merge_axis,
    shard_shape,
    split_axis,
)
from cppass.torch_private import OpLibrary
from lowering.host.attention import zigzag_attention

_library = OpLibrary("cppass_host")


def shard(x: Tensor, dim: int, inner: int, lengths: list[int], cp_size: int, even: bool, rank: int) -> Tensor:
    """[.., outer * S * inner, ..] -> [.., outer * m * inner, ..]: the rank's spans, the last token in padding rows."""
    layout = Zigzag(tuple(lengths), cp_size, even)
    spread = split_axis(x, dim, layout.tokens, inner)
    pieces = [spread.narrow(dim + 1, first, rows) for first, rows in layout.spans(rank) if rows]
    padding = layout.local_rows - layout.real_rows(rank)
    pieces += [spread.narrow(dim + 1, layout.tokens - 1, 1)] * padding
    return merge_axis(torch.cat(pieces, dim + 1), dim).contiguous()


def _shard_shape(x: Tensor, dim: int, inner: int, lengths: list[int], cp_size: int, even: bool, rank: int) -> Tensor:
    return shard_shape(x, dim, inner, lengths, cp_size, even)


def pack(xs: list[Tensor], dims: list[int], inners: list[int], lengths: list[int], cp_size: int, even: bool) -> Tensor:
    """Local values side by side, rows first: [m, sum of row sizes]. One copy."""
    rows = Zigzag(tuple(lengths), cp_size, even).local_rows
    parts = [split_axis(x, d, rows, i).movedim(d + 1, 0) for x, d, i in zip(xs, dims, inners, strict=True)]
    packed, start = xs[0].new_empty(rows, sum(part.numel() // rows for part in parts)), 0
    for part in parts:
        width = part.numel() // rows
        packed.narrow(1, start, width).view(part.shape).copy_(part)
        start += width
    return packed


def _pack_shape(
    xs: list[Tensor], dims: list[int], inners: list[int], lengths: list[int], cp_size: int, even: bool
) -> Tensor:
    rows = Zigzag(tuple(lengths), cp_size, even).local_rows
    return xs[0].new_empty(rows, sum(row_size(x, d, rows, i) for x, d, i in zip(xs, dims, inners, strict=True)))


def row_size(x: Tensor, dim: int, rows: int, inner: int) -> int:
    """Elements of one token of a Local value."""
    size = x.shape[dim] // (rows * inner) * inner
    for d, extent in enumerate(x.shape):
        size = size if d == dim else size * extent
    return size


def unpack(
    gathered: Tensor, xs: list[Tensor], dims: list[int], inners: list[int], lengths: list[int], cp_size: int, even: bool
) -> list[Tensor]:
    """The gathered rows [P * m, sum of row sizes] -> Full values in natural order; one copy each.

    Args:
        xs: the Local values that were packed (their shapes are used, not their values).
    """
    layout = Zigzag(tuple(lengths), cp_size, even)
    tokens, m = layout.tokens, layout.local_rows
    start, full = 0, []
    for x, dim, inner in zip(xs, dims, inners, strict=True):
        width = x.numel() // m
        part = gathered.narrow(1, start, width)
        start += width
        natural = part.new_empty(tokens, width)
        row = 0
        for rank, first, rows in layout.homes():
            natural[row : row + rows].copy_(part[rank * m + first : rank * m + first + rows])
            row += rows
        rest = (*x.shape[:dim], x.shape[dim] // (m * inner), inner, *x.shape[dim + 1 :])
        full.append(merge_axis(natural.view(tokens, *rest).movedim(0, dim + 1), dim))
    return full


def _unpack_shape(
    gathered: Tensor, xs: list[Tensor], dims: list[int], inners: list[int], lengths: list[int], cp_size: int, even: bool
) -> list[Tensor]:
    return gather_shape(xs, dims, inners, lengths, cp_size, even)


def gathered_order(x: Tensor, lengths: list[int], cp_size: int, even: bool) -> Tensor:
    """Full rows [S, ..] in natural order -> in the order in which gathered rows arrive."""
    layout = Zigzag(tuple(lengths), cp_size, even)
    return torch.cat([x[first : first + rows] for rank in range(cp_size) for first, rows in layout.spans(rank)])


def _gathered_order_shape(x: Tensor, lengths: list[int], cp_size: int, even: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def pick_rows(
    x: Tensor, dim: int, start: int, count: int, lengths: list[int], cp_size: int, even: bool, rank: int
) -> Tensor:
    """Rows [start, start + count) of the natural order that this rank owns, zeros for the others: [count * row]."""
    owners = _owners(start, count, Zigzag(tuple(lengths), cp_size, even))
    picked = x.new_zeros(*x.shape[:dim], count, *x.shape[dim + 1 :])
    for i, (owner, row) in enumerate(owners):
        if owner == rank:
            picked.select(dim, i).copy_(x.select(dim, row))
    return picked.view(-1)


def _pick_rows_shape(
    x: Tensor, dim: int, start: int, count: int, lengths: list[int], cp_size: int, even: bool, rank: int
) -> Tensor:
    return x.new_empty(x.numel() // x.shape[dim] * count)


def place_rows(
    gathered: Tensor, x: Tensor, dim: int, start: int, count: int, lengths: list[int], cp_size: int, even: bool
) -> Tensor:
    """The gathered picks [P * count * row] -> the rows, each from its owner. `x` gives the shape."""
    by_rank = gathered.view(cp_size, *x.shape[:dim], count, *x.shape[dim + 1 :])
    owners = _owners(start, count, Zigzag(tuple(lengths), cp_size, even))
    return torch.stack([by_rank[owner].select(dim, i) for i, (owner, _) in enumerate(owners)], dim)


def pick_rows_at(x: Tensor, dim: int, index: Tensor, lengths: list[int], cp_size: int, even: bool, rank: int) -> Tensor:
    """The natural rows that `index` [n] names, zeros for those of other ranks: [n * row]."""
    layout = Zigzag(tuple(lengths), cp_size, even)
    picked = x.new_zeros(*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    for i, (owner, row) in enumerate(_owners_at(index, layout)):
        if owner == rank:
            picked.select(dim, i).copy_(x.select(dim, row))
    return picked.view(-1)


def _pick_rows_at_shape(x: Tensor, dim: int, index: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.numel() // x.shape[dim] * index.shape[0])


def place_rows_at(
    gathered: Tensor, x: Tensor, dim: int, index: Tensor, lengths: list[int], cp_size: int, even: bool
) -> Tensor:
    """The gathered picks [P * n * row] -> the rows, each from its owner. `x` gives the shape."""
    by_rank = gathered.view(cp_size, *x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    owners = _owners_at(index, Zigzag(tuple(lengths), cp_size, even))
    return torch.stack([by_rank[owner].select(dim, i) for i, (owner, _) in enumerate(owners)], dim)


def _place_rows_at_shape(gathered: Tensor, x: Tensor, dim: int, index: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])


def _owners_at(index: Tensor, layout: Zigzag) -> list[tuple[int, int]]:
    """Read here: host memory, no device sync. Raises IndexError for a row that is not there."""
    return [layout.owner(int(row)) for row in index]


def _owners(start: int, count: int, layout: Zigzag) -> list[tuple[int, int]]:
    """(rank, local row) of natural rows [start, start + count); a negative start counts from the last token."""
    first = start + layout.tokens if start < 0 else start
    return [layout.owner(row) for row in range(first, first + count)]


def _place_rows_shape(
    gathered: Tensor, x: Tensor, dim: int, start: int, count: int, lengths: list[int], cp_size: int, even: bool
) -> Tensor:
    return x.new_empty(*x.shape[:dim], count, *x.shape[dim + 1 :])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix_tensor: Tensor | None,
    prefix: int,
    lengths: list[int],
    cp_size: int,
    even: bool,
    causal: bool,
    window: int,
    scale: float | None,
    rank: int,
) -> Tensor:
    """One rank's zigzag halves [B, Hq, m, D]; a prefix in a tensor is read here (host memory, no device sync)."""
    if prefix_tensor is not None:
        prefix += int(prefix_tensor)
    layout = Zigzag(tuple(lengths), cp_size, even)
    if causal and not 0 <= prefix <= k.shape[2] - layout.tokens:
        # rows that see no key, or all of them and more: unusual, so by a mask of the local rows
        mask, causal = causal_rows(layout, rank, prefix, window, k), False
        prefix = window = 0
    return zigzag_attention(
        q,
        k,
        v,
        mask=mask,
        prefix=prefix,
        layout=layout,
        rank=rank,
        causal=causal,
        window=window,
        scale=scale,
    )


def _attention_shape(*args: Any) -> Tensor:
    return attention_shape(*args[:-1])


_ROWS = "int dim, SymInt inner, SymInt[] lengths, int cp_size, bool even"
_MANY = "int[] dims, SymInt[] inners, SymInt[] lengths, int cp_size, bool even"
_FEW = "int dim, SymInt start, int count, SymInt[] lengths, int cp_size, bool even"
_AT = "int dim, Tensor index, SymInt[] lengths, int cp_size, bool even"
OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "shard": (f"(Tensor x, {_ROWS}, int rank) -> Tensor", shard, _shard_shape),
    "pack": (f"(Tensor[] xs, {_MANY}) -> Tensor", pack, _pack_shape),
    "unpack": (f"(Tensor gathered, Tensor[] xs, {_MANY}) -> Tensor[]", unpack, _unpack_shape),
    "gathered_order": (
        "(Tensor x, SymInt[] lengths, int cp_size, bool even) -> Tensor",
        gathered_order,
        _gathered_order_shape,
    ),
    "pick_rows": (f"(Tensor x, {_FEW}, int rank) -> Tensor", pick_rows, _pick_rows_shape),
    "place_rows": (f"(Tensor gathered, Tensor x, {_FEW}) -> Tensor", place_rows, _place_rows_shape),
    "pick_rows_at": (f"(Tensor x, {_AT}, int rank) -> Tensor", pick_rows_at, _pick_rows_at_shape),
    "place_rows_at": (f"(Tensor gathered, Tensor x, {_AT}) -> Tensor", place_rows_at, _place_rows_at_shape),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? prefix_tensor, SymInt prefix, SymInt[] lengths, "
        "int cp_size, bool even, bool causal, int window, float? scale, int rank) -> Tensor",
        attention,
        _attention_shape,
    ),
}

for _name, (_schema, _run, _shape) in OPS.items():
    _library.define(_name, _schema, _run, _shape, "CPU")
