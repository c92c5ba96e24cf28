"""Index tensors that the host works out from a step's lengths: ops without a tensor operand, made once a step.

Under npugraph_ex and torchair they become inputs of the graph (lowering/npu/hoist.py): a captured graph would hold the
numbers of the step it was captured with, and GE has no converter for them. The host only sends; nothing is read back.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from cppass.arithmetic import node_of
from cppass.emitter import Emitter
from cppass.layout import Zigzag
from cppass.sharded_ops import gathered_positions, layout_of
from cppass.torch_private import OpLibrary
from lowering.npu.rows import Rows

aten = torch.ops.aten
_library = OpLibrary("cppass_npu")
_STEP = "SymInt[] q_lengths, int cp_size, str remainder, SymInt rows"


def row_table(q_lengths: list[int], cp_size: int, remainder: str, rows: int) -> Tensor:
    """int64 [3, sequences * 2P], a column a block in natural order: its first row, its rank, what to add to a row."""
    homes = list(layout_of(q_lengths, cp_size, remainder, rows).homes())
    starts = [0, *itertools.accumulate(count for _, _, count in homes)][:-1]
    offsets = [first - start for (_, first, _), start in zip(homes, starts, strict=True)]
    return torch.tensor([starts, [rank for rank, _, _ in homes], offsets], dtype=torch.int64)


def key_table(
    q_lengths: list[int], cp_size: int, remainder: str, rows: int, firsts: list[int], counts: list[int]
) -> Tensor:
    """int64 [P * rows + sequences + 1]: where spans of natural rows are among gathered rows, then zeros."""
    positions = gathered_positions(layout_of(q_lengths, cp_size, remainder, rows))
    places = {p: i for i, p in enumerate(positions) if p is not None}
    seen = [places.get(p, 0) for first, n in zip(firsts, counts, strict=True) for p in range(first, first + n)]
    return torch.tensor(seen + [0] * (len(positions) + len(q_lengths) + 1 - len(seen)), dtype=torch.int64)


def _row_table_shape(q_lengths: list[int], cp_size: int, remainder: str, rows: int) -> Tensor:
    return torch.empty(3, len(q_lengths) * 2 * cp_size, dtype=torch.int64)


def _key_table_shape(q_lengths: list[int], cp_size: int, remainder: str, rows: int, *spans: list[int]) -> Tensor:
    return torch.empty(cp_size * rows + len(q_lengths) + 1, dtype=torch.int64)


_library.define("row_table", f"({_STEP}) -> Tensor", row_table, _row_table_shape, "CompositeExplicitAutograd")
_library.define(
    "key_table",
    f"({_STEP}, SymInt[] firsts, SymInt[] counts) -> Tensor",
    key_table,
    _key_table_shape,
    "CompositeExplicitAutograd",
)

TABLES = (torch.ops.cppass_npu.row_table.default, torch.ops.cppass_npu.key_table.default)


def tables(gm: fx.GraphModule) -> list[fx.Node]:
    """The index tensors of a lowered graph that the host works out."""
    return [node for node in gm.graph.nodes if node.target in TABLES]


def row_homes(emit: Emitter, rows: Rows, layout: Zigzag, index: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(rank, local row on that rank) of the natural rows that `index` [n] names."""
    table = _table(emit, rows, torch.ops.cppass_npu.row_table.default, layout, ())
    starts, ranks, offsets = (emit(aten.select.int, table, 0, i) for i in range(3))
    index = emit(aten._to_copy.default, index, dtype=torch.int64)
    reached = emit(aten.ge.Tensor, emit(aten.unsqueeze.default, index, 1), emit(aten.unsqueeze.default, starts, 0))
    block = emit(aten.sub.Tensor, emit(aten.sum.dim_IntList, reached, [1], dtype=torch.int64), 1)
    offset = emit(aten.index_select.default, offsets, 0, block)
    return emit(aten.index_select.default, ranks, 0, block), emit(aten.add.Tensor, index, offset)


def half_keys(emit: Emitter, rows: Rows, layout: Zigzag, spans: list[tuple[Any, Any]]) -> fx.Node:
    """Where the keys are, among gathered rows, that a half's queries may see: sequence after sequence, then padding."""
    op = torch.ops.cppass_npu.key_table.default
    return _table(emit, rows, op, layout, ([node_of(n) for n, _ in spans], [node_of(n) for _, n in spans]))


def _table(emit: Emitter, rows: Rows, op: Any, layout: Zigzag, more: tuple[list[Any], ...]) -> fx.Node:
    ends = [node_of(n) for n in itertools.accumulate(layout.lengths)]
    given = (ends, layout.cp_size, layout.remainder, node_of(layout.local_rows), *more)
    key = (op, *(tuple(x) if isinstance(x, list) else x for x in given))

    def make() -> fx.Node:
        made = emit(op, *given)
        return made if rows.device.type == "cpu" else emit(aten._to_copy.default, made, device=rows.device)

    return rows.once(key, make)
