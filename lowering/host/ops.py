"""What the host target runs: row movement and attention as opaque ops that know their rank.

Collectives are not in here: they stay visible in the graph as torch's functional collectives.

    pack      Local values -> one flat buffer, rows first, so that an all-gather of it is rank-major
    unpack    the gathered buffer -> Full values in natural order
    shard     this rank's rows of a Full value
    pick_rows, place_rows      the same for a few rows
    attention one rank's two zigzag halves
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppass import layout
from cppass.ops import (
    attention_shape,
    causal_rows,
    gather_shape,
    local_row_index,
    merge_axis,
    shard_shape,
    split_axis,
)
from cppass.torch_private import OpLibrary
from lowering.host.attention import zigzag_attention

_library = OpLibrary("cppass_host")


def shard(x: Tensor, dim: int, inner: int, tokens: int, cp_size: int, rank: int) -> Tensor:
    """[.., outer * S * inner, ..] -> [.., outer * m * inner, ..]: blocks `rank` and `2P - 1 - rank`."""
    rows = layout.block_rows(tokens, cp_size)
    spread = split_axis(x, dim, tokens, inner)
    if rows * 2 * cp_size == tokens:
        blocks = [spread.narrow(dim + 1, b * rows, rows) for b in layout.owned_blocks(rank, cp_size)]
        return merge_axis(torch.cat(blocks, dim + 1), dim).contiguous()
    index = local_row_index(tokens, cp_size, rank, x.device)
    return merge_axis(spread.index_select(dim + 1, index), dim).contiguous()


def _shard_shape(x: Tensor, dim: int, inner: int, tokens: int, cp_size: int, rank: int) -> Tensor:
    return shard_shape(x, dim, inner, tokens, cp_size)


def pack(xs: list[Tensor], dims: list[int], inners: list[int], tokens: int, cp_size: int) -> Tensor:
    """Local values, one after the other, each with its local rows first: [sum of sizes]."""
    rows = layout.local_rows(tokens, cp_size)
    parts = [split_axis(x, d, rows, i).movedim(d + 1, 0).reshape(-1) for x, d, i in zip(xs, dims, inners, strict=True)]
    return torch.cat(parts)


def _pack_shape(xs: list[Tensor], dims: list[int], inners: list[int], tokens: int, cp_size: int) -> Tensor:
    return xs[0].new_empty(sum(x.numel() for x in xs))


def unpack(
    gathered: Tensor, xs: list[Tensor], dims: list[int], inners: list[int], tokens: int, cp_size: int
) -> list[Tensor]:
    """The gathered buffers [P * sum of sizes] -> Full values in natural order; one copy each.

    Args:
        xs: the Local values that were packed (their shapes are used, not their values).
    """
    block = layout.block_rows(tokens, cp_size)
    by_rank = gathered.view(cp_size, -1)
    start, full = 0, []
    for x, dim, inner in zip(xs, dims, inners, strict=True):
        part = by_rank.narrow(1, start, x.numel()).view(cp_size, 2, block, -1)
        start += x.numel()
        natural = part.new_empty(layout.blocks(cp_size), block, part.shape[3])
        for number in range(layout.blocks(cp_size)):
            rank, half = layout.block_owner(number, cp_size)
            natural[number].copy_(part[rank, half])
        rest = (*x.shape[:dim], x.shape[dim] // (2 * block * inner), inner, *x.shape[dim + 1 :])
        rows = natural.view(2 * cp_size * block, -1)[:tokens].view(tokens, *rest)
        full.append(merge_axis(rows.movedim(0, dim + 1), dim))
    return full


def _unpack_shape(
    gathered: Tensor, xs: list[Tensor], dims: list[int], inners: list[int], tokens: int, cp_size: int
) -> list[Tensor]:
    return gather_shape(xs, dims, inners, tokens, cp_size)


def pick_rows(x: Tensor, dim: int, start: int, count: int, tokens: int, cp_size: int, rank: int) -> Tensor:
    """Rows [start, start + count) of the natural order that this rank owns, zeros for the others: [count * row]."""
    first = start + tokens if start < 0 else start
    owners = [layout.row_owner(p, tokens, cp_size) for p in range(first, first + count)]
    picked = x.new_zeros(*x.shape[:dim], count, *x.shape[dim + 1 :])
    for i, (owner, row) in enumerate(owners):
        if owner == rank:
            picked.select(dim, i).copy_(x.select(dim, row))
    return picked.view(-1)


def _pick_rows_shape(x: Tensor, dim: int, start: int, count: int, tokens: int, cp_size: int, rank: int) -> Tensor:
    return x.new_empty(x.numel() // x.shape[dim] * count)


def place_rows(gathered: Tensor, x: Tensor, dim: int, start: int, count: int, tokens: int, cp_size: int) -> Tensor:
    """The gathered picks [P * count * row] -> the rows, each from its owner. `x` gives the shape."""
    first = start + tokens if start < 0 else start
    by_rank = gathered.view(cp_size, *x.shape[:dim], count, *x.shape[dim + 1 :])
    owners = [layout.row_owner(p, tokens, cp_size)[0] for p in range(first, first + count)]
    return torch.stack([by_rank[owner].select(dim, i) for i, owner in enumerate(owners)], dim)


def _place_rows_shape(
    gathered: Tensor, x: Tensor, dim: int, start: int, count: int, tokens: int, cp_size: int
) -> Tensor:
    return x.new_empty(*x.shape[:dim], count, *x.shape[dim + 1 :])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix_tensor: Tensor | None,
    prefix: int,
    tokens: int,
    cp_size: int,
    causal: bool,
    window: int,
    scale: float | None,
    rank: int,
) -> Tensor:
    """One rank's zigzag halves [B, Hq, m, D]; a prefix in a tensor is read here (host memory, no device sync)."""
    if prefix_tensor is not None:
        prefix += int(prefix_tensor)
    if causal and not 0 <= prefix <= k.shape[2] - tokens:
        # rows that see no key, or all of them and more: unusual, so by a mask of the local rows
        mask, causal = causal_rows(tokens, cp_size, rank, prefix, window, k), False
        prefix = window = 0
    return zigzag_attention(
        q,
        k,
        v,
        mask=mask,
        prefix=prefix,
        tokens=tokens,
        cp_size=cp_size,
        rank=rank,
        causal=causal,
        window=window,
        scale=scale,
    )


def _attention_shape(*args: Any) -> Tensor:
    return attention_shape(*args[:-1])


_ROWS = "int dim, SymInt inner, SymInt tokens, int cp_size"
_MANY = "int[] dims, SymInt[] inners, SymInt tokens, int cp_size"
_FEW = "int dim, SymInt start, int count, SymInt tokens, int cp_size"
OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "shard": (f"(Tensor x, {_ROWS}, int rank) -> Tensor", shard, _shard_shape),
    "pack": (f"(Tensor[] xs, {_MANY}) -> Tensor", pack, _pack_shape),
    "unpack": (f"(Tensor gathered, Tensor[] xs, {_MANY}) -> Tensor[]", unpack, _unpack_shape),
    "pick_rows": (f"(Tensor x, {_FEW}, int rank) -> Tensor", pick_rows, _pick_rows_shape),
    "place_rows": (f"(Tensor gathered, Tensor x, {_FEW}) -> Tensor", place_rows, _place_rows_shape),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? prefix_tensor, SymInt prefix, SymInt tokens, "
        "int cp_size, bool causal, int window, float? scale, int rank) -> Tensor",
        attention,
        _attention_shape,
    ),
}

for _name, (_schema, _run, _shape) in OPS.items():
    _library.define(_name, _schema, _run, _shape, "CPU")
