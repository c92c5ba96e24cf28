"""The table: one row per op, the rule that says what it does to the token axis.

To add an op, add a row; for an op of another library, cppass.rule (docs/extending.md). An op without either runs on
Full values: its inputs are gathered and the report says so.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from cppass.moe_rules import IndexPutRule, RowsOfSort, SortRule, ValueRule, index_points
from cppass.npu_rules import NPU_RULES, element_state
from cppass.registry import registered_rule
from cppass.rules import (
    Axes,
    AxisRule,
    Rule,
    Transfer,
    ViewRule,
    argument,
    broadcast_labels,
    einsum,
    moved_axes,
    name_of,
    pointwise_axes,
    same_axes,
    shape_of,
    static,
    tensor_operands,
)
from cppass.tokens import Size, State, Tokens

aten = torch.ops.aten
prims = torch.ops.prims


# -- the axes of single ops ------------------------------------------------------------------------------------------


def _transposed(node: fx.Node, ndim: int) -> list[int | None]:
    order: list[int | None] = list(range(ndim))
    a, b = argument(node, 1, "dim0") % ndim, argument(node, 2, "dim1") % ndim
    order[a], order[b] = order[b], order[a]
    return order


def _permuted(node: fx.Node, ndim: int) -> list[int | None]:
    return [d % ndim for d in argument(node, 1, "dims")]


def _unsqueezed(node: fx.Node, ndim: int) -> list[int | None]:
    order: list[int | None] = list(range(ndim))
    order.insert(argument(node, 1, "dim") % (ndim + 1), None)
    return order


def _squeezed(node: fx.Node, ndim: int) -> list[int | None]:
    given = argument(node, 1, "dim", list(range(ndim)))
    dims = {d % ndim for d in (given if isinstance(given, (list, tuple)) else [given])}
    shape = shape_of(tensor_operands(node)[0])
    return [d for d in range(ndim) if not (d in dims and shape[d] == 1)]


def _selected(node: fx.Node, ndim: int) -> list[int | None]:
    gone = argument(node, 1, "dim", 0) % ndim
    return [d for d in range(ndim) if d != gone]


def _sliced(node: fx.Node, ndim: int) -> list[int | None]:
    dim = argument(node, 1, "dim", 0) % ndim
    whole = shape_of(node)[dim] == shape_of(tensor_operands(node)[0])[dim] and argument(node, 4, "step", 1) == 1
    return [d if d != dim or whole else None for d in range(ndim)]


def _expanded(node: fx.Node, ndim: int) -> list[int | None]:
    out, source = shape_of(node), shape_of(tensor_operands(node)[0])
    first = len(out) - ndim
    return [d - first if d >= first and source[d - first] == out[d] else None for d in range(len(out))]


def _repeated(node: fx.Node, ndim: int) -> list[int | None]:
    repeats = list(argument(node, 1, "repeats"))
    first = len(repeats) - ndim
    return [d - first if d >= first and repeats[d] == 1 else None for d in range(len(repeats))]


def _reduced(node: fx.Node, ndim: int) -> list[int | None]:
    given = argument(node, 1, "dim", None)
    dims = range(ndim) if given in (None, []) else given if isinstance(given, (list, tuple)) else [given]
    gone = {d % ndim for d in dims}
    if len(shape_of(node)) == ndim:  # keepdim
        return [None if d in gone else d for d in range(ndim)]
    return [d for d in range(ndim) if d not in gone]


def _dim(position: int, default: int = -1) -> Any:
    return lambda node, ndim: [argument(node, position, "dim", default)]


def _all_in_one_dim(node: fx.Node, ndim: int) -> list[int]:
    return [argument(node, 1, "dim", 0)]


def _embedding(node: fx.Node) -> Axes:
    ndim = len(shape_of(node))
    return Axes((*range(ndim - 1), "h"), ((None, "h"), tuple(range(ndim - 1))))


def _index(node: fx.Node) -> Axes | None:
    """x[..., i, j, ...]: the indexed axes of x are looked up, the indices' axes take their place."""
    indices = list(argument(node, 1, "indices"))
    indexed = [d for d, i in enumerate(indices) if i is not None]
    operands = tensor_operands(node)
    if any(i.meta["val"].dtype == torch.bool for i in operands[1:]):
        return None
    out, ndim = shape_of(node), len(shape_of(operands[0]))
    width = len(out) - (ndim - len(indexed))  # axes the broadcast indices have
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if adjacent else 0
    middle: tuple[Any, ...] = tuple(("i", d) for d in range(width))
    kept = [None if d in indexed else ("x", d) for d in range(ndim)]
    rest = [label for label in kept if label is not None]
    labels = (*rest[:first], *middle, *rest[first:])
    looked_up = out[first : first + width]
    index_labels = [
        tuple(None if lab is None else ("i", lab) for lab in broadcast_labels(shape_of(i), looked_up))
        for i in operands[1:]
    ]
    return Axes(labels, (tuple(kept), *index_labels))


def _index_select(node: fx.Node) -> Axes:
    ndim = len(shape_of(node))
    dim = argument(node, 1, "dim") % ndim
    source = tuple(None if d == dim else d for d in range(ndim))
    return Axes(tuple(range(ndim)), (source, (dim,)))


def _gather(node: fx.Node) -> Axes:
    ndim, dim = len(shape_of(node)), argument(node, 1, "dim")
    source, index = (shape_of(x) for x in tensor_operands(node))
    kept = tuple(None if d == dim % ndim or source[d] != index[d] else d for d in range(ndim))
    return Axes(kept, (kept, kept))


def _scatter(node: fx.Node) -> Axes:
    ndim, dim = len(shape_of(node)), argument(node, 1, "dim")
    shapes = [shape_of(x) for x in tensor_operands(node)]
    whole = [all(s[d] == shapes[0][d] for s in shapes) for d in range(ndim)]
    labels = tuple(d if whole[d] and d != dim % ndim else None for d in range(ndim))
    return Axes(labels, tuple(labels for x in shapes))


def _layer_norm(node: fx.Node) -> Axes:
    ndim, operands = len(shape_of(node)), tensor_operands(node)
    rows = ndim - len(argument(node, 1, "normalized_shape"))
    labels = tuple(d if d < rows else None for d in range(ndim))
    return Axes(labels, (labels, *((None,) * len(shape_of(x)) for x in operands[1:])))


def _split(node: fx.Node) -> Axes:
    ndim = len(shape_of(node))
    dim = argument(node, 2, "dim", 0) % ndim
    labels = tuple(None if d == dim else d for d in range(ndim))
    return Axes(labels, (labels,))


class GetItem:
    """Elements of a tuple carry what the tuple carries; the second element of a sort is a permutation."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target in SORTS and isinstance(state, Tokens) and node.args[1] == 0:
            return Transfer(dataclasses.replace(state, points=None), (state,))
        assert isinstance(source, fx.Node)
        return Transfer(element_state(source, state, node.args[1]), (state,))

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return Transfer(state, (state,))


def _stack(node: fx.Node) -> Axes:
    ndim = len(shape_of(node))
    new = argument(node, 1, "dim", 0) % ndim
    kept = tuple(d for d in range(ndim) if d != new)
    return Axes(tuple(None if d == new else d for d in range(ndim)), tuple(kept for x in tensor_operands(node)))


class LikeRule:
    """empty_like and its kin take a shape, no values."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        return Transfer(dataclasses.replace(state, points=None), (state,)) if isinstance(state, Tokens) else None

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return Transfer(state, (state,))


class IndexRule(AxisRule):
    """Indexing; rows may also be looked up by a local permutation of them."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        if slot > 0 and state.points is not None:
            return index_points(node, slot, state, rows)  # row numbers are looked up in their own axis only
        return super().forward(node, slot, state, rows)


POINTWISE = AxisRule(pointwise_axes)
MOVES = AxisRule(pointwise_axes, moves=True)
VIEW = ViewRule()
SORT = SortRule()
SORTS = {aten.sort.default, aten.sort.stable}

RULES: dict[Any, Rule] = {
    # values stay where they are
    aten.clone.default: MOVES,
    aten.alias.default: MOVES,
    aten.detach.default: MOVES,
    aten.lift_fresh_copy.default: MOVES,
    aten.contiguous.default: MOVES,
    aten.copy.default: POINTWISE,
    aten._to_copy.default: RowsOfSort(POINTWISE),
    aten.floor_divide.default: ValueRule(),
    aten.empty_like.default: LikeRule(),
    aten.zeros_like.default: LikeRule(),
    aten.ones_like.default: LikeRule(),
    aten.full_like.default: LikeRule(),
    prims.convert_element_type.default: RowsOfSort(POINTWISE),
    # axes move
    aten.view.default: VIEW,
    aten.reshape.default: VIEW,
    aten._unsafe_view.default: VIEW,
    aten.transpose.int: AxisRule(moved_axes(_transposed), moves=True),
    aten.permute.default: AxisRule(moved_axes(_permuted), moves=True),
    aten.t.default: AxisRule(moved_axes(lambda node, ndim: list(reversed(range(ndim)))), moves=True),
    aten.unsqueeze.default: AxisRule(moved_axes(_unsqueezed), moves=True),
    aten.squeeze.dim: AxisRule(moved_axes(_squeezed), moves=True),
    aten.squeeze.dims: AxisRule(moved_axes(_squeezed), moves=True),
    aten.squeeze.default: AxisRule(moved_axes(_squeezed), moves=True),
    aten.select.int: AxisRule(moved_axes(_selected), moves=True),
    aten.slice.Tensor: AxisRule(moved_axes(_sliced), moves=True),
    aten.expand.default: AxisRule(moved_axes(_expanded), moves=True, size_arg=1),
    aten.repeat.default: AxisRule(moved_axes(_repeated), moves=True),
    aten.cat.default: AxisRule(same_axes(_all_in_one_dim), moves=True),
    aten.stack.default: AxisRule(_stack, moves=True),
    aten.split.Tensor: AxisRule(_split, moves=True),
    aten.split_with_sizes.default: AxisRule(_split, moves=True),
    aten.unbind.int: AxisRule(moved_axes(_selected), moves=True),
    aten.constant_pad_nd.default: AxisRule(
        same_axes(lambda node, ndim: [ndim - 1 - d for d in range(len(argument(node, 1, "pad")) // 2)])
    ),
    operator.getitem: GetItem(),
    # an axis is used up
    aten.mean.dim: AxisRule(moved_axes(_reduced)),
    aten.sum.dim_IntList: AxisRule(moved_axes(_reduced)),
    aten.amax.default: AxisRule(moved_axes(_reduced)),
    aten.amin.default: AxisRule(moved_axes(_reduced)),
    aten.argmax.default: AxisRule(moved_axes(_reduced)),
    aten.any.dim: AxisRule(moved_axes(_reduced)),
    aten.all.dim: AxisRule(moved_axes(_reduced)),
    aten.max.dim: AxisRule(moved_axes(_reduced)),
    aten.min.dim: AxisRule(moved_axes(_reduced)),
    aten.argmin.default: AxisRule(moved_axes(_reduced)),
    aten.prod.dim_int: AxisRule(moved_axes(_reduced)),
    aten.var.correction: AxisRule(moved_axes(_reduced)),
    aten.logsumexp.default: AxisRule(moved_axes(_reduced)),
    aten.linalg_vector_norm.default: AxisRule(moved_axes(lambda n, ndim: _reduced_norm(n, ndim))),
    aten._softmax.default: AxisRule(same_axes(_dim(1))),
    aten._safe_softmax.default: AxisRule(same_axes(_dim(1))),
    aten._log_softmax.default: AxisRule(same_axes(_dim(1))),
    aten.cumsum.default: RowsOfSort(AxisRule(same_axes(_dim(1)))),
    aten.topk.default: AxisRule(same_axes(_dim(2))),
    aten.sort.default: SORT,
    aten.sort.stable: SORT,
    aten.gather.default: AxisRule(_gather),
    aten.scatter.src: AxisRule(_scatter),
    aten.scatter.value: AxisRule(_scatter),
    aten.flip.default: AxisRule(same_axes(lambda node, ndim: list(argument(node, 1, "dims"))), moves=True),
    aten.roll.default: AxisRule(
        same_axes(lambda node, ndim: list(argument(node, 2, "dims", ()) or range(ndim))), moves=True
    ),
    aten.glu.default: AxisRule(same_axes(lambda node, ndim: [argument(node, 1, "dim", -1)])),
    aten.cumprod.default: AxisRule(same_axes(_dim(1))),
    aten.view_as_complex.default: AxisRule(moved_axes(lambda node, ndim: list(range(ndim - 1)))),
    aten.view_as_real.default: AxisRule(moved_axes(lambda node, ndim: [*range(ndim), None])),
    aten.native_layer_norm.default: AxisRule(_layer_norm),
    aten._fused_rms_norm.default: AxisRule(_layer_norm),
    # matrix products
    aten.mm.default: einsum("mk,kn->mn"),
    aten.bmm.default: einsum("bmk,bkn->bmn"),
    aten.addmm.default: einsum("mn,mk,kn->mn"),
    aten.baddbmm.default: einsum("bmn,bmk,bkn->bmn"),
    aten.mv.default: einsum("mk,k->m"),
    # look-ups
    aten.embedding.default: AxisRule(_embedding),
    aten.index.Tensor: IndexRule(_index, moves=True),
    aten.index_select.default: AxisRule(_index_select),
    # experts: rows of a local sort
    aten.histc.default: RowsOfSort(None),
    aten._grouped_mm.default: RowsOfSort(None),
    aten.index_put.default: IndexPutRule(),
}


def _reduced_norm(node: fx.Node, ndim: int) -> list[int | None]:
    given = argument(node, 2, "dim", None)
    gone = {d % ndim for d in (given if given is not None else range(ndim))}
    keep = len(shape_of(node)) == ndim
    return [None if d in gone else d for d in range(ndim) if keep or d not in gone]


MATMULS = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.dot.default,
    aten._grouped_mm.default,
}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a node's op, None where there is none."""
    target = node.target
    if target in RULES:
        return RULES[target]
    if name_of(node) in NAMED_RULES:
        return NAMED_RULES[name_of(node)]
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return None if torch.Tag.nondeterministic_seeded in target.tags else POINTWISE
    return registered_rule(node)


# ops of other libraries, by name: their library may not be installed
NAMED_RULES: dict[str, Rule] = {
    "transformers::grouped_mm_fallback": RowsOfSort(None),
    "_c10d_functional::all_reduce": POINTWISE,  # over another group than the one that shares the sequence
    "_c10d_functional::wait_tensor": POINTWISE,
    **NPU_RULES,
}

NAMED_MATMULS = {"transformers::grouped_mm_fallback", "npu::npu_grouped_matmul", "npu::npu_quant_matmul"}


def is_matmul(node: fx.Node) -> bool:
    return node.target in MATMULS or name_of(node) in NAMED_MATMULS


def factors(node: fx.Node) -> list[fx.Node]:
    """The two factors of a matrix product (without bias and group offsets)."""
    operands = tensor_operands(node)
    return operands[1:3] if node.target in (aten.addmm.default, aten.baddbmm.default) else operands[:2]


def contraction_is_one(node: fx.Node) -> bool:
    """A matmul that contracts a single element: an outer product (rope's angles), as cheap as a pointwise op."""
    return static(factors(node)[0].meta["val"].shape[-1]) == 1


def is_heavy(node: fx.Node) -> bool:
    """A matrix product that is worth sharing: no outer product."""
    return is_matmul(node) and not contraction_is_one(node)


def row_selection(node: fx.Node, state: Tokens) -> tuple[int, int] | None:
    """(start, count) where the node keeps a fixed number of rows of the token axis (the last token), else None.

    A negative start counts from the last token.
    """
    ndim = len(shape_of(tensor_operands(node)[0]))
    if node.target is aten.slice.Tensor and argument(node, 4, "step", 1) == 1:
        count = static(node.meta["val"].shape[state.dim])
        start, end = static(argument(node, 2, "start", 0) or 0), argument(node, 3, "end", None)
        if argument(node, 1, "dim", 0) % ndim != state.dim or start is None or count is None or count < 1:
            return None
        to_the_end = end is None or (isinstance(end, int) and end >= 2**62)
        if start < 0 and not (to_the_end and count == -start):
            return None  # a slice that is clamped or ends before the last token: gather and slice
        return start, count
    if node.target is aten.select.int and argument(node, 1, "dim") % ndim == state.dim:
        start = static(argument(node, 2, "index"))
        return None if start is None else (start, 1)
    return None
