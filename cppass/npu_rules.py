"""Rules of torch_npu's ops, by name (torch_npu may not be installed): norms, rope, activations, quantisation, experts.

The experts of a step:

    weights, experts, rows = gating_top_k_softmax(logits)      Local; `rows` numbers the local pairs
    x, places, counts, _ = init_routing_v2(x, experts)         x: Local in the order of this rank's routing
    y = grouped_matmul([x], [w], group_list=counts)            Local in that order
    out = finalize_routing(y, ..., weights, places, ...)       Local, natural order again

`places` and `counts` mean something on their own rank only (tokens.Counts); no rule lets them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from cppass.axes import operand_names, row_wise
from cppass.rules import (
    Axes,
    AxisRule,
    Rule,
    Transfer,
    broadcast_labels,
    is_tensor,
    iter_nodes,
    name_of,
    pointwise_axes,
    same_axes,
    shape_of,
    static,
)
from cppass.tokens import Counts, Points, Size, State, Tokens


def _named(node: fx.Node, states: Mapping[str, State]) -> tuple[State | None, ...]:
    return tuple(states.get(name) for name in operand_names(node))


# -- axes --------------------------------------------------------------------------------------------------------------


def _rope(node: fx.Node) -> Axes:
    """query, key, cos, sin: the axes before the heads are the same, or 1 where they are broadcast."""
    out = shape_of(node)
    labels = []
    for operand in (x for x in iter_nodes((node.args, node.kwargs)) if is_tensor(x)):
        shape = shape_of(operand)
        known = broadcast_labels(shape, (*out[: len(shape) - 1], shape[-1]))
        labels.append(tuple(None if d >= _rows(node) else label for d, label in enumerate(known)))
    return Axes(tuple(d if d < _rows(node) else None for d in range(len(out))), tuple(labels))


def _rows(node: fx.Node) -> int:
    """Axes in front of heads and head size: tokens, or batch and tokens; BNSD has its tokens behind the heads."""
    layout = node.args[4] if len(node.args) > 4 else node.kwargs.get("layout", "BSND")
    return {"TND": 1, "BSND": 2, "BSH": 2}.get(str(layout), 0)


def _rotary_mul(node: fx.Node) -> Axes:
    axes = pointwise_axes(node)
    last = len(axes.out) - 1
    operands = tuple(tuple(None if label == last else label for label in labels) for labels in axes.operands)
    return Axes((*axes.out[:-1], None), operands)


def _quant_matmul(node: fx.Node) -> Axes | None:
    """x1 [m, k] @ x2 [k, n], a scale a row: [m, n]."""
    labels = {"x1": ("m", None), "pertoken_scale": ("m",)}
    operands = [x for x in iter_nodes((node.args, node.kwargs)) if is_tensor(x)]
    if len(shape_of(node)) != 2:
        return None
    named = zip(operand_names(node), operands, strict=True)
    return Axes(("m", "n"), tuple(labels.get(name, (None,) * len(shape_of(x))) for name, x in named))


# -- experts -----------------------------------------------------------------------------------------------------------


class Routing:
    """npu_moe_init_routing and its version 2: rows in the order of this rank's own experts."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        places = static(shape_of_operand(node, "expert_idx")[-1])
        if not isinstance(state, Tokens) or not state.plain or (state.dim, state.inner) != (0, 1):
            return None
        if operand_names(node)[slot] != "x" or places is None or not _all_rows(node, rows * state.outer, places):
            return None
        numbers = Tokens(0, state.outer, points=Points(state.outer, places))
        states = {"x": state, "expert_idx": state, "scale": state, "row_idx": numbers}
        every = {} if name_of(node) == "npu::npu_moe_init_routing" else {"active_num": -1}
        return Transfer(Tokens(0, state.outer, places, node.name), _named(node, states), kwargs=every)

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return None


def shape_of_operand(node: fx.Node, wanted: str) -> tuple[Size, ...]:
    operands = [x for x in iter_nodes((node.args, node.kwargs)) if is_tensor(x)]
    return next(shape_of(x) for name, x in zip(operand_names(node), operands, strict=True) if name == wanted)


def _all_rows(node: fx.Node, rows: Size, places: int) -> bool:
    """Whether every pair is routed: none is dropped for want of room, which would depend on all tokens."""
    if name_of(node) == "npu::npu_moe_init_routing":
        active = static(node.args[3] if len(node.args) > 3 else node.kwargs.get("active_num"))
        return isinstance(rows, int) and active is not None and active >= rows
    active = static(node.kwargs.get("active_num", -1))
    if node.kwargs.get("drop_pad_mode", 0) != 0 or node.kwargs.get("offset") is not None:
        return False
    return active in (-1, 0) or (isinstance(rows, int) and active is not None and active >= rows * places)


@dataclasses.dataclass(frozen=True)
class SortedRows:
    """Ops on rows in the order of a routing.

    Args:
        rows: the operands with such rows.
        counts: the operand with numbers of that routing (tokens per expert, places).
        natural: operands with rows in natural order.
        restores: the output is in natural order again.
        only_counts: the output is numbers of the routing.
    """

    rows: tuple[str, ...]
    counts: str = ""
    natural: tuple[str, ...] = ()
    restores: bool = False
    only_counts: bool = False

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        names = operand_names(node)
        if not isinstance(state, Tokens) or not state.order or state.points or names[slot] not in self.rows:
            return None
        if self.counts and self.counts not in names:
            return None  # group sizes as plain numbers: those of all ranks
        states: dict[str, State] = dict.fromkeys(self.rows, state)
        natural = Tokens(0, state.outer)
        states |= dict.fromkeys(self.natural, natural)
        states |= {self.counts: Counts(state.order)} if self.counts else {}
        out: State = natural if self.restores else Counts(state.order) if self.only_counts else state
        return Transfer(out, _named(node, states))

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        return None


def element_state(source: fx.Node, state: State, element: object) -> State:
    """The state of one element of an op's results; most have that of the others."""
    name = name_of(source)
    if name in ROUTINGS and isinstance(state, Tokens) and element in ROUTINGS[name]:
        return Counts(state.order)
    if name == "npu::npu_moe_gating_top_k_softmax" and element == 2 and isinstance(state, Tokens):
        places = static(shape_of(source)[-1])
        return dataclasses.replace(state, points=Points(state.outer, places or 1))  # numbers the local pairs
    return state


ROUTINGS = {"npu::npu_moe_init_routing": (1,), "npu::npu_moe_init_routing_v2": (1, 2)}
"""Routing -> the elements that are numbers of this rank's own routing."""

NPU_RULES: dict[str, Rule] = {
    "npu::npu_rms_norm": AxisRule(row_wise("input")),
    "npu::npu_add_rms_norm": AxisRule(row_wise("x1", "x2")),
    "npu::npu_add_rms_norm_cast": AxisRule(row_wise("x1", "x2")),
    "npu::npu_swiglu": AxisRule(same_axes(lambda node, ndim: [node.args[1] if len(node.args) > 1 else -1])),  # type: ignore[list-item]
    "npu::npu_apply_rotary_pos_emb": AxisRule(_rope),
    "npu::npu_rotary_mul": AxisRule(_rotary_mul),
    "npu::npu_dynamic_quant": AxisRule(row_wise("input")),
    "npu::npu_quant_matmul": AxisRule(_quant_matmul),
    "npu::npu_moe_gating_top_k_softmax": AxisRule(row_wise("x", "finished")),
    "npu::npu_moe_gating_top_k": AxisRule(row_wise("x")),
    "npu::npu_moe_init_routing": Routing(),
    "npu::npu_moe_init_routing_v2": Routing(),
    "npu::npu_moe_compute_expert_tokens": SortedRows(("sorted_expert_for_source_row",), only_counts=True),
    "npu::npu_grouped_matmul": SortedRows(("x", "per_token_scale"), counts="group_list"),
    "npu::npu_moe_finalize_routing": SortedRows(
        ("expanded_permuted_rows",),
        counts="expanded_src_to_dst_row",
        natural=("skip1", "skip2", "scales", "export_for_source_row"),
        restores=True,
    ),
}
