"""Canonical ops `cppass::*`: what a rewritten graph says, before a target lowers it. Rank-free.

A canonical op has a schema, a shape (fake) function and a meaning: a plain torch function of every rank's operands that
returns every rank's result. Targets re-implement it; `cppass.simulate` runs the meaning itself; tests compare the two.
Running a canonical op in a process of its own is an error, since it does not know its rank.

Shapes: S tokens (the sum of `lengths`), P ranks, m local rows (see cppass/layout.py). The token dimension has size
outer * S * inner (Full) or outer * m * inner (Local). Every op names the layout: `lengths`, `cp_size`, `even`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppass.errors import VerifyError
from cppass.layout import Zigzag
from cppass.torch_private import OpLibrary

_library = OpLibrary("cppass")

SCHEMAS = {
    "shard": "(Tensor x, int dim, SymInt inner, SymInt[] lengths, int cp_size, bool even) -> Tensor",
    "gather": "(Tensor[] xs, int[] dims, SymInt[] inners, SymInt[] lengths, int cp_size, bool even) -> Tensor[]",
    "gather_rows": "(Tensor x, int dim, SymInt start, int count, SymInt[] lengths, int cp_size, bool even) -> Tensor",
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? prefix_tensor, SymInt prefix, SymInt[] lengths, "
        "int cp_size, bool even, bool causal, int window, float? scale) -> Tensor"
    ),
}


# -- the layout of one tensor ----------------------------------------------------------------------------------------


def split_axis(x: Tensor, dim: int, rows: int, inner: int) -> Tensor:
    """[.., outer * rows * inner, ..] -> [.., outer, rows, inner, ..]; a view where strides allow."""
    outer = x.shape[dim] // (rows * inner)
    return x.reshape(*x.shape[:dim], outer, rows, inner, *x.shape[dim + 1 :])


def merge_axis(x: Tensor, dim: int) -> Tensor:
    """[.., outer, rows, inner, ..] -> [.., outer * rows * inner, ..]; the inverse of split_axis."""
    return x.reshape(*x.shape[:dim], x.shape[dim] * x.shape[dim + 1] * x.shape[dim + 2], *x.shape[dim + 3 :])


def local_row_index(layout: Zigzag, rank: int, device: torch.device) -> Tensor:
    """Natural rows of a rank's local rows [m]; padding rows repeat the last token."""
    last = layout.tokens - 1
    return torch.tensor([last if p is None else p for p in layout.positions(rank)], device=device)


def restore_index(layout: Zigzag, device: torch.device) -> Tensor:
    """Where the natural rows [S] are among gathered, rank-major rows [P * m]."""
    m = layout.local_rows
    homes = [torch.arange(rank * m + first, rank * m + first + rows) for rank, first, rows in layout.homes()]
    return torch.cat(homes).to(device)


def causal_rows(layout: Zigzag, rank: int, prefix: int, window: int, k: Tensor) -> Tensor:
    """Local rows of a causal mask over k [B, H, T, D], with a window of keys where it is not 0: bool [m, T]."""
    last = prefix + local_row_index(layout, rank, k.device)[:, None]
    key = torch.arange(k.shape[2], device=k.device)
    return (key <= last) & (key > last - window) if window else key <= last


# -- meanings: every rank's operands in, every rank's result out ------------------------------------------------------


def shard(xs: list[Tensor], dim: int, inner: int, lengths: list[int], cp_size: int, even: bool) -> list[Tensor]:
    """Full [.., outer * S * inner, ..] -> this rank's rows [.., outer * m * inner, ..]."""
    layout, results = Zigzag(tuple(lengths), cp_size, even), []
    for rank, x in enumerate(xs):
        index = local_row_index(layout, rank, x.device)
        results.append(merge_axis(split_axis(x, dim, layout.tokens, inner).index_select(dim + 1, index), dim))
    return results


def gather(
    xs: list[list[Tensor]], dims: list[int], inners: list[int], lengths: list[int], cp_size: int, even: bool
) -> list[list[Tensor]]:
    """Several Local values [.., outer * m * inner, ..] -> Full ones, natural order, the same bits on every rank."""
    layout, full = Zigzag(tuple(lengths), cp_size, even), []
    rows = layout.local_rows
    for i, (dim, inner) in enumerate(zip(dims, inners, strict=True)):
        parts = [split_axis(x[i], dim, rows, inner).movedim(dim + 1, 0) for x in xs]
        shape = parts[0].shape[1:]
        flat = torch.cat([p.reshape(rows, -1) for p in parts])
        restored = flat[restore_index(layout, flat.device)].reshape(layout.tokens, *shape)
        full.append(merge_axis(restored.movedim(0, dim + 1), dim))
    return [full for _ in range(cp_size)]


def gather_rows(
    xs: list[Tensor], dim: int, start: int, count: int, lengths: list[int], cp_size: int, even: bool
) -> list[Tensor]:
    """Rows [start, start + count) of the natural order, from the ranks that own them; a negative start counts back."""
    layout = Zigzag(tuple(lengths), cp_size, even)
    first = start + layout.tokens if start < 0 else start
    owners = [layout.owner(p) for p in range(first, first + count)]
    picked = torch.cat([xs[rank].narrow(dim, row, 1) for rank, row in owners], dim)
    return [picked for _ in range(cp_size)]


def attention(
    qs: list[Tensor],
    ks: list[Tensor],
    vs: list[Tensor],
    masks: list[Tensor | None],
    prefix_tensors: list[Tensor | None],
    prefix: int,
    lengths: list[int],
    cp_size: int,
    even: bool,
    causal: bool,
    window: int,
    scale: float | None,
) -> list[Tensor]:
    """softmax(q @ k.T * scale) @ v for local query rows q [B, Hq, m, D] over whole k [B, Hkv, T, D], v [B, Hkv, T, E].

    causal: the query at position p sees keys (prefix + p - window, prefix + p]; else the local rows' mask decides.
    """
    layout, results = Zigzag(tuple(lengths), cp_size, even), []
    for rank, (q, k, v, mask) in enumerate(zip(qs, ks, vs, masks, strict=True)):
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        if causal:
            offset = prefix_tensors[rank]
            base = prefix + (int(offset) if offset is not None else 0)
            mask = causal_rows(layout, rank, base, window, k)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        results.append(out.transpose(1, 2).contiguous().transpose(1, 2))
    return results


MEANINGS: dict[str, Callable[..., list[Any]]] = {
    "shard": shard,
    "gather": gather,
    "gather_rows": gather_rows,
    "attention": attention,
}


# -- shapes ------------------------------------------------------------------------------------------------------------


def shard_shape(x: Tensor, dim: int, inner: int, lengths: list[int], cp_size: int, even: bool) -> Tensor:
    layout = Zigzag(tuple(lengths), cp_size, even)
    outer = x.shape[dim] // (layout.tokens * inner)
    return x.new_empty(*x.shape[:dim], outer * layout.local_rows * inner, *x.shape[dim + 1 :])


def gather_shape(
    xs: list[Tensor], dims: list[int], inners: list[int], lengths: list[int], cp_size: int, even: bool
) -> list[Tensor]:
    """Rows first in memory, as an all-gather leaves them: [B, H, S, D] with the strides of [S, B, H, D]."""
    layout, full = Zigzag(tuple(lengths), cp_size, even), []
    for x, dim, inner in zip(xs, dims, inners, strict=True):
        outer = x.shape[dim] // (layout.local_rows * inner)
        rest = (*x.shape[:dim], outer, inner, *x.shape[dim + 1 :])
        full.append(merge_axis(x.new_empty(layout.tokens, *rest).movedim(0, dim + 1), dim))
    return full


def gather_rows_shape(
    x: Tensor, dim: int, start: int, count: int, lengths: list[int], cp_size: int, even: bool
) -> Tensor:
    return x.new_empty(*x.shape[:dim], count, *x.shape[dim + 1 :])


def attention_shape(
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
) -> Tensor:
    """[B, Hq, m, E] in the memory layout of [B, m, Hq, E]."""
    b, h, m, _ = q.shape
    return q.new_empty(b, m, h, v.shape[3]).transpose(1, 2)


SHAPES: dict[str, Callable[..., Any]] = {
    "shard": shard_shape,
    "gather": gather_shape,
    "gather_rows": gather_rows_shape,
    "attention": attention_shape,
}


def _rankless(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise VerifyError(
            "CP401",
            f"cppass::{name} ran without being lowered: a canonical op does not know its rank",
            "lower the graph (lower=True), or run it with cppass.simulate",
        )

    return run


for _name, _schema in SCHEMAS.items():
    _library.define(_name, _schema, _rankless(_name), SHAPES[_name], "CompositeExplicitAutograd")

CANONICAL = {getattr(torch.ops.cppass, name).default: name for name in SCHEMAS}
