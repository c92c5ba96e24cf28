"""Rules of mixture-of-experts routing: a local sort of the (token, expert) pairs, and what may meet its rows.

    expert_ids[S*K]                       Local, inner K
    values, perm = sort(expert_ids)       rows in the sort's order; perm's values are row numbers of [S*K]
    rows = x[perm // K]                   perm // K: row numbers of [S]; rows: Local in the sort's order
    counts = cumsum(histc(values))        rank-local counts of that sort
    y = grouped_mm(rows, w, counts)       Local in the sort's order
    inverse = empty; inverse[perm] = arange(S*K)    natural rows; values are row numbers of the sort's order
    y[inverse]                            Local, natural order again

Every value between the sort and its inverse means something on its own rank only. States say so (`order`, `points`,
`Counts`), and no rule lets such a value out: whatever else needs it is computed from gathered inputs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from cppass.rules import Rule, Transfer, argument, pointwise_axes, shape_of, static, tensor_operands
from cppass.tokens import Counts, Points, Size, State, Tokens, divide

aten = torch.ops.aten


class SortRule:
    """sort along the token axis of a 1-D value: rows in a new, rank-local order. Along another axis: row by row."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        if not isinstance(state, Tokens):
            return None
        ndim = len(shape_of(node))
        position = 2 if node.target is aten.sort.stable else 1
        if argument(node, position, "dim", -1) % ndim != state.dim:
            return None if state.points else Transfer(state, (state,))
        if ndim != 1 or state.order:
            return None
        if state.points:  # sorting a permutation inverts it
            return None
        points = Points(state.outer, state.inner)
        return Transfer(dataclasses.replace(state, order=node.name, points=points), (state,))

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return None


class ValueRule:
    """floor_divide: pointwise, but row numbers of [S*K] divided by K are row numbers of [S]."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        axes = pointwise_axes(node)
        if not isinstance(state, Tokens):
            return None
        if state.points is None:
            label = axes.operands[slot][state.dim]
            if label is None:
                return None
            operands = tuple(state.at(op.index(label)) if label in op else None for op in axes.operands)
            return Transfer(state.at(axes.out.index(label)), operands)
        divisor = static(node.args[1]) if slot == 0 else None
        inner = divide(state.points.inner, divisor) if divisor else None
        if inner is None:
            return None
        return Transfer(dataclasses.replace(state, points=dataclasses.replace(state.points, inner=inner)), (state,))

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return None


def index_points(node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
    """x[rows], where `rows` are row numbers of exactly the axis that x carries: x's rows, in the order of `rows`."""
    if not isinstance(state, Tokens) or slot != 1 or state.points is None:
        return None
    indices = argument(node, 1, "indices")
    if len(indices) != 1 or len(shape_of(tensor_operands(node)[1])) != 1:
        return None
    looked_up = Tokens(0, state.points.outer, state.points.inner, state.points.order)
    if shape_of(tensor_operands(node)[0])[0] != looked_up.outer * rows * looked_up.inner:
        return None
    out = dataclasses.replace(state, dim=0, points=None)
    return Transfer(out, (looked_up, state))


class IndexPutRule:
    """empty_like(perm)[perm] = arange(n): the inverse of a permutation."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        target, indices, values = node.args[:3]
        if not (
            isinstance(state, Tokens) and state.points and isinstance(indices, (list, tuple)) and len(indices) == 1
        ):
            return None
        empty = isinstance(target, fx.Node) and target.target in (aten.empty_like.default, aten.zeros_like.default)
        counting = isinstance(values, fx.Node) and values.target is aten.arange.default
        if not (empty and counting and tensor_operands(node)[slot] is indices[0] and state.order):
            return None
        axis = Points(state.outer, state.inner, state.order)
        out = Tokens(0, state.points.outer, state.points.inner, state.points.order, axis)
        unset = Tokens(0, state.outer, state.inner, state.order)
        counted = Tokens(0, state.outer, state.inner, state.order, axis)  # rows of the sort, numbered
        return Transfer(out, (unset, state, counted))

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return None


@dataclasses.dataclass(frozen=True)
class RowsOfSort:
    """Ops that meet the rows of one sort: histc and cumsum count them, grouped_mm multiplies them group by group.

    Counts may also be cast to another dtype.

    Args:
        otherwise: the rule for values that are not counts.
    """

    otherwise: Rule | None

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        operands = tensor_operands(node)
        if isinstance(state, Counts):
            if len(operands) == 1:
                return Transfer(state, (state,))
            return None  # grouped_mm is entered through its rows
        if node.target is aten.histc.default:
            return Transfer(Counts(state.order), (state,)) if state.order and state.points is None else None
        if len(operands) == 3 and slot == 0 and state.order and state.points is None and state.dim == 0:
            return Transfer(state, (state, None, Counts(state.order)))
        return self.otherwise.forward(node, slot, state, rows) if self.otherwise else None

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return self.otherwise.backward(node, state, rows) if self.otherwise else None
