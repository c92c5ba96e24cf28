"""Canonical ops `cppass::*`: what a rewritten graph says, before a target lowers it. Rank-free.

A canonical op has a schema, a shape (fake) function and a meaning: a plain torch function of every rank's operands that
returns every rank's result. Targets re-implement it; `cppass.simulate` runs the meaning itself; tests compare the two.
Running a canonical op in a process of its own is an error, since it does not know its rank.

Shapes: S tokens (the sum of `lengths`), P ranks, m local rows (see cppass/layout.py). The token dimension has size
outer * S * inner (Full) or outer * m * inner (Local). Every op names the layout: `lengths`, `cp_size`, `even`.
Ops of graphs whose inputs arrive sharded are in cppass/sharded_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from cppass import sharded_ops
from cppass.errors import VerifyError
from cppass.fused_meaning import PER_RANK as FUSED_PER_RANK
from cppass.fused_meaning import fused_attention
from cppass.layout import Zigzag
from cppass.torch_private import OpLibrary

_library = OpLibrary("cppass")

SCHEMAS = {
    "shard": "(Tensor x, int dim, SymInt inner, SymInt[] lengths, int cp_size, bool even) -> Tensor",
    "gather": (
        "(Tensor[] xs, int[] dims, SymInt[] inners, SymInt[] lengths, int cp_size, bool even, "
        "bool natural=True) -> Tensor[]"
    ),
    "gather_rows": "(Tensor x, int dim, SymInt start, int count, SymInt[] lengths, int cp_size, bool even) -> Tensor",
    "gather_rows_at": "(Tensor x, int dim, Tensor index, SymInt[] lengths, int cp_size, bool even) -> Tensor",
    "gathered_order": "(Tensor x, SymInt[] lengths, int cp_size, bool even) -> Tensor",
    "fused_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? block_table, Tensor? sink, Tensor? q_tensor, "
        "Tensor? kv_tensor, SymInt[]? q_lengths, SymInt[]? kv_lengths, SymInt[] lengths, int cp_size, bool even, "
        "str op, str input_layout, int num_heads, int num_key_value_heads, float scale, int sparse_mode, "
        "int pre_tokens, int next_tokens, int block_size, int inner_precise, bool lse) -> (Tensor, Tensor)"
    ),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? prefix_tensor, SymInt prefix, SymInt[] lengths, "
        "int cp_size, bool even, bool causal, int window, float? scale) -> Tensor"
    ),
    **sharded_ops.SCHEMAS,
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
    xs: list[list[Tensor]],
    dims: list[int],
    inners: list[int],
    lengths: list[int],
    cp_size: int,
    even: bool,
    natural: bool = True,
) -> list[list[Tensor]]:
    """Several Local values [.., outer * m * inner, ..] -> Full ones, the same bits on every rank.

    natural: rows in natural order; else as they arrive, rank after rank (no padding rows: `even` layouts only).
    """
    layout, full = Zigzag(tuple(lengths), cp_size, even), []
    rows = layout.local_rows
    for i, (dim, inner) in enumerate(zip(dims, inners, strict=True)):
        parts = [split_axis(x[i], dim, rows, inner).movedim(dim + 1, 0) for x in xs]
        shape = parts[0].shape[1:]
        flat = torch.cat([p.reshape(rows, -1) for p in parts])
        restored = (flat[restore_index(layout, flat.device)] if natural else flat).reshape(layout.tokens, *shape)
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


def gather_rows_at(
    xs: list[Tensor], dim: int, index: Tensor, lengths: list[int], cp_size: int, even: bool
) -> list[Tensor]:
    """The natural rows that `index` [n] names, from the ranks that own them."""
    layout = Zigzag(tuple(lengths), cp_size, even)
    owners = [layout.owner(int(p) % layout.tokens) for p in index]
    picked = torch.cat([xs[rank].narrow(dim, row, 1) for rank, row in owners], dim)
    return [picked for _ in range(cp_size)]


def gathered_order(xs: list[Tensor], lengths: list[int], cp_size: int, even: bool) -> list[Tensor]:
    """Full rows [S, ..] in natural order -> in the order in which gathered rows arrive; `even` layouts only."""
    layout = Zigzag(tuple(lengths), cp_size, even)
    return [x[torch.cat([local_row_index(layout, rank, x.device) for rank in range(cp_size)])] for x in xs]


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
    "gather_rows_at": gather_rows_at,
    "gathered_order": gathered_order,
    "attention": attention,
    "fused_attention": fused_attention,
    **sharded_ops.MEANINGS,
}
PER_RANK = {"attention": 5, "fused_attention": FUSED_PER_RANK, **sharded_ops.PER_RANK}
"""Leading arguments of a meaning that are lists with one entry a rank; 1 for the others."""


# -- shapes ------------------------------------------------------------------------------------------------------------


def shard_shape(x: Tensor, dim: int, inner: int, lengths: list[int], cp_size: int, even: bool) -> Tensor:
    layout = Zigzag(tuple(lengths), cp_size, even)
    outer = x.shape[dim] // (layout.tokens * inner)
    return x.new_empty(*x.shape[:dim], outer * layout.local_rows * inner, *x.shape[dim + 1 :])


def gather_shape(
    xs: list[Tensor],
    dims: list[int],
    inners: list[int],
    lengths: list[int],
    cp_size: int,
    even: bool,
    natural: bool = True,
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


def gather_rows_at_shape(x: Tensor, dim: int, index: Tensor, lengths: list[int], cp_size: int, even: bool) -> Tensor:
    return x.new_empty(*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])


def gathered_order_shape(x: Tensor, lengths: list[int], cp_size: int, even: bool) -> Tensor:
    return torch.empty_like(x)


def fused_attention_shape(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Output like the queries; log-sum-exp [m, N, 1] for TND, else [B, N, m, 1]."""
    input_layout, heads, lse = given[11], given[12], given[-1]
    sums = empty_lse(q, input_layout, heads) if lse else q.new_empty(0, dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), sums


def empty_lse(q: Tensor, input_layout: str, heads: int) -> Tensor:
    if input_layout == "TND":
        return q.new_empty(q.shape[0], heads, 1, dtype=torch.float32)
    rows = q.shape[2] if input_layout == "BNSD" else q.shape[1]
    return q.new_empty(q.shape[0], heads, rows, 1, dtype=torch.float32)


SHAPES: dict[str, Callable[..., Any]] = {
    "shard": shard_shape,
    "gather": gather_shape,
    "gather_rows": gather_rows_shape,
    "gather_rows_at": gather_rows_at_shape,
    "gathered_order": gathered_order_shape,
    "fused_attention": fused_attention_shape,
    "attention": attention_shape,
    **sharded_ops.SHAPES,
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


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a canonical node by name, defaults filled in. Canonical nodes are called by position."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = zip(arguments, node.args, strict=False)
    return {a.name: a.default_value for a in arguments} | {a.name: value for a, value in given}
