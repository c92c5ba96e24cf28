"""Rows between ranks and orders, in ops that every Ascend compiler converts: index_select, cat, slice, all-gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cppass.arithmetic import node_of, value_of
from cppass.emitter import Emitter
from cppass.layout import Zigzag
from cppass.ops import named_arguments
from cppass.target import Ranks
from cppass.torch_private import same_size
from lowering.npu.rows import Rows

aten = torch.ops.aten


def shard(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> fx.Node:
    """[.., outer * S * inner, ..] -> [.., outer * m * inner, ..]."""
    x, dim, inner, *layout = _arguments(node)
    cut = rows.layout(*layout)
    if _carries_rows_alone(x, dim, cut.tokens):
        return emit(aten.index_select.default, x, dim, rows.local(cut))
    spread = _split(emit, x, dim, cut.tokens, inner)
    return _merge(emit, emit(aten.index_select.default, spread, dim + 1, rows.local(cut)), dim)


def gather(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> list[fx.Node]:
    """One all-gather of all values, side by side in a row.

    before:  k [m, H, D], v [m, H, D]      after:  all_gather([m, 2 * H * D]) -> k [S, H, D], v [S, H, D]
    """
    given = named_arguments(node)
    xs, dims, inners = given["xs"], given["dims"], given["inners"]
    layout = rows.layout(given["lengths"], given["cp_size"], given["even"])
    first = [_rows_first(emit, x, d, layout.local_rows, i) for x, d, i in zip(xs, dims, inners, strict=True)]
    flat = [emit(aten.reshape.default, x, [node_of(layout.local_rows), -1]) for x in first]
    packed = flat[0] if len(flat) == 1 else emit(aten.cat.default, flat, 1)
    gathered = emit.all_gather(packed, ranks)
    start: Any = 0
    results = []
    for x, part, source, dim in zip(first, flat, xs, dims, strict=True):
        width = emit.numbers(emit.size(part, 1))
        own = gathered
        if len(flat) > 1:
            own = emit(aten.slice.Tensor, gathered, 1, node_of(start), node_of(start + width))
        start = start + width
        if given["natural"]:
            own = emit(aten.index_select.default, own, 0, rows.restored(layout))
        whole = emit(aten.reshape.default, own, [node_of(layout.tokens), *_sizes(emit, x, 1)])
        results.append(whole if x is source else _merge(emit, _moved(emit, whole, 0, dim + 1), dim))
    return results


def gather_rows(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> fx.Node:
    """Rows [start, start + count), a negative start counting from the last token."""
    x, dim, start, count, *layout = _arguments(node)
    cut = rows.layout(*layout)
    first = emit.numbers(start) + cut.tokens if isinstance(start, int) and start < 0 else emit.numbers(start)
    return _rows_at(emit, rows, x, dim, rows.spans([(first, count)]), cut, ranks)


def gather_rows_at(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> fx.Node:
    x, dim, index, *layout = _arguments(node)
    return _rows_at(emit, rows, x, dim, index, rows.layout(*layout), ranks)


def _rows_at(emit: Emitter, rows: Rows, x: fx.Node, dim: int, index: fx.Node, layout: Zigzag, ranks: Ranks) -> fx.Node:
    owner, row = rows.homes_of(layout, index)
    return _moved(emit, fetched(emit, rows, _moved(emit, x, dim, 0), owner, row, ranks), 0, dim)


def fetched(emit: Emitter, rows: Rows, x: fx.Node, owner: fx.Node, row: fx.Node, ranks: Ranks) -> fx.Node:
    """Every rank sends the local rows [n] at which the owners hold them; then each row is taken from its owner."""
    gathered = emit.all_gather(emit(aten.index_select.default, x, 0, row), ranks)
    count = emit.size(row, 0)
    place = emit(aten.add.Tensor, emit(aten.mul.Tensor, owner, count), rows.spans([(0, emit.numbers(count))]))
    return emit(aten.index_select.default, gathered, 0, place)


def gathered_order(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> fx.Node:
    """Natural rows [S, ..] in the order in which gathered rows arrive."""
    x, *layout = _arguments(node)
    return emit(aten.index_select.default, x, 0, rows.gathered(rows.layout(*layout)))


def _arguments(node: fx.Node) -> Any:
    return node.args


# -- axes --------------------------------------------------------------------------------------------------------------


def _sizes(emit: Emitter, x: fx.Node, first: int = 0, last: int | None = None) -> list[Any]:
    """Sizes of some dimensions, as ints or nodes."""
    return [emit.size(x, d) for d in range(x.meta["val"].dim())[first:last]]


def _carries_rows_alone(x: fx.Node, dim: int, rows: Any) -> bool:
    """Whether a dimension is the rows and nothing else."""
    return same_size(x.meta["val"].shape[dim], value_of(rows))


def _split(emit: Emitter, x: fx.Node, dim: int, rows: Any, inner: Any) -> fx.Node:
    """[.., outer * rows * inner, ..] -> [.., outer, rows, inner, ..]."""
    return emit(
        aten.reshape.default, x, [*_sizes(emit, x, 0, dim), -1, node_of(rows), inner, *_sizes(emit, x, dim + 1)]
    )


def _merge(emit: Emitter, x: fx.Node, dim: int) -> fx.Node:
    """The inverse of _split."""
    return emit(aten.reshape.default, x, [*_sizes(emit, x, 0, dim), -1, *_sizes(emit, x, dim + 3)])


def _rows_first(emit: Emitter, x: fx.Node, dim: int, rows: Any, inner: Any) -> fx.Node:
    """[.., outer * rows * inner, ..] -> [rows, .., outer, inner, ..]; x itself where it is that."""
    if dim == 0 and _carries_rows_alone(x, 0, rows):
        return x
    return _moved(emit, _split(emit, x, dim, rows, inner), dim + 1, 0)


def _moved(emit: Emitter, x: fx.Node, source: int, to: int) -> fx.Node:
    """One axis moved, the others in their order."""
    if source == to:
        return x
    order = [d for d in range(x.meta["val"].dim()) if d != source]
    order.insert(to, source)
    return emit(aten.permute.default, x, order)
