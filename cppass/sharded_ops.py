"""Canonical ops of graphs whose token-wise inputs arrive sharded: a runner has cut the rows, the graph never does.

Shapes: T new tokens of all sequences, P ranks, m local rows (a bucket: the step's rows, then padding), TND axes. The
layout follows from the cumulative query lengths of the whole step, the remainder policy and m.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cppass.fused_meaning import attend
from cppass.layout import Remainder, Zigzag

SCHEMAS = {
    "gather_sharded": "(Tensor[] xs, int cp_size) -> Tensor[]",
    "look_up_sharded": "(Tensor x, Tensor index, SymInt[] q_lengths, int cp_size, str remainder) -> Tensor",
    "fused_attention_sharded": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? block_table, Tensor? sink, SymInt[] q_lengths, "
        "SymInt[] kv_lengths, int cp_size, str remainder, str op, int num_heads, int num_key_value_heads, float scale, "
        "int sparse_mode, int pre_tokens, int next_tokens, int block_size, int inner_precise, bool lse) "
        "-> (Tensor, Tensor)"
    ),
}


def layout_of(q_lengths: Sequence[Any], cp_size: int, remainder: str, rows: Any) -> Zigzag:
    """The layout of a step, from its cumulative query lengths and the local rows it was given."""
    starts = [0, *q_lengths[:-1]]
    lengths = tuple(end - start for start, end in zip(starts, q_lengths, strict=True))
    return Zigzag(lengths, cp_size, remainder=cast(Remainder, remainder), rows=rows)


def gathered_positions(layout: Zigzag) -> list[int | None]:
    """Natural row of every gathered row [P * m], None for padding."""
    return list(itertools.chain.from_iterable(layout.positions(rank) for rank in range(layout.cp_size)))


def restore_sharded(x: Tensor, layout: Zigzag) -> Tensor:
    """Gathered rows [P * m, ...] -> the step's rows [T, ...] in natural order."""
    places = {p: i for i, p in enumerate(gathered_positions(layout)) if p is not None}
    return x[torch.tensor([places[p] for p in range(layout.tokens)], device=x.device, dtype=torch.int64)]


# -- meanings: every rank's operands in, every rank's result out ------------------------------------------------------


def gather_sharded(xs: list[list[Tensor]], cp_size: int) -> list[list[Tensor]]:
    """Several local values [m, ...] -> [P * m, ...], rank after rank, padding included."""
    full = [torch.cat([x[i] for x in xs]) for i in range(len(xs[0]))]
    return [full for _ in range(cp_size)]


def look_up_sharded(
    xs: list[Tensor], index: Tensor, q_lengths: list[int], cp_size: int, remainder: str
) -> list[Tensor]:
    """The natural rows that `index` [n] names, from the ranks that own them."""
    layout = layout_of(q_lengths, cp_size, remainder, xs[0].shape[0])
    owners = [layout.owner(int(p)) for p in index]
    picked = torch.stack([xs[rank][row] for rank, row in owners])
    return [picked for _ in range(cp_size)]


def fused_attention_sharded(
    qs: list[Tensor],
    ks: list[Tensor],
    vs: list[Tensor],
    masks: list[Tensor | None],
    block_tables: list[Tensor | None],
    sinks: list[Tensor | None],
    q_lengths: list[int],
    kv_lengths: list[int],
    cp_size: int,
    remainder: str,
    op: str,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    block_size: int,
    inner_precise: int,
    lse: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Attention of each rank's rows over whole keys and values, which arrive in gathered order or as a paged cache."""
    layout, results = layout_of(q_lengths, cp_size, remainder, qs[0].shape[0]), []
    for rank, q in enumerate(qs):
        k, v, table = ks[rank], vs[rank], block_tables[rank]
        if table is None:
            k, v = restore_sharded(k, layout), restore_sharded(v, layout)
        out = attend(
            layout, rank, q, k, v, masks[rank], table, sinks[rank], q_lengths, kv_lengths, "TND", num_heads,
            num_key_value_heads, scale, sparse_mode, pre_tokens, lse,
        )  # fmt: skip
        results.append(out)
    return results


MEANINGS: dict[str, Callable[..., list[Any]]] = {
    "gather_sharded": gather_sharded,
    "look_up_sharded": look_up_sharded,
    "fused_attention_sharded": fused_attention_sharded,
}
PER_RANK = {"fused_attention_sharded": 6}


# -- shapes ------------------------------------------------------------------------------------------------------------


def gather_sharded_shape(xs: list[Tensor], cp_size: int) -> list[Tensor]:
    return [x.new_empty(x.shape[0] * cp_size, *x.shape[1:]) for x in xs]


def look_up_sharded_shape(x: Tensor, index: Tensor, q_lengths: list[int], cp_size: int, remainder: str) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


def fused_attention_sharded_shape(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Output like the queries; log-sum-exp [m, N, 1]."""
    lse = q.new_empty(q.shape[0], q.shape[1], 1, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, lse if given[-1] else q.new_empty(0, dtype=torch.float32)


SHAPES: dict[str, Callable[..., Any]] = {
    "gather_sharded": gather_sharded_shape,
    "look_up_sharded": look_up_sharded_shape,
    "fused_attention_sharded": fused_attention_sharded_shape,
}
