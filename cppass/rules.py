"""What an op does to the token axis: the two kinds of rule, and the arithmetic behind them.

A rule answers one question in both directions: *if this operand (or the output) carries tokens in this dimension, what
do the output (or the operands) carry?* The answer is a `Transfer`; None means the op mixes tokens there, so it has to
run on Full values. The table of ops is `cppass/op_rules.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from cppass.tokens import Size, State, Tokens, follow_view, size_of, sizes_of

Label = Hashable | None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One way to run an op on Local values.

    Attributes:
        out: state of the output (of every element, where the op returns several).
        operands: per tensor operand, in argument order: the state it must have, None for Full.
        size_arg: position in node.args of a size list whose entry for the token axis must become the local size.
        kwargs: keyword arguments that are other ones on local rows.
    """

    out: State
    operands: tuple[State | None, ...]
    size_arg: int | None = None
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


class Rule(Protocol):
    """Both directions of an op. `rows` counts one pass over the tokens: the token count, or the local rows."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None: ...
    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None: ...


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Operands that are tensors (or tuples of them), one entry per occurrence, in argument order."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda a: found.append(a) if is_tensor(a) else None)
    return found


def is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, tuple, list))


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """Sizes of a tensor node; of the first element where the node returns several."""
    value = node.meta["val"]
    return sizes_of((value[0] if isinstance(value, (tuple, list)) else value).shape)


def name_of(node: fx.Node) -> str:
    """ "npu::npu_rms_norm": the op of a node by name, for ops whose library may not be installed; "" for others."""
    return getattr(node.target, "_name", "") if node.op == "call_function" else ""


def writes(node: fx.Node) -> bool:
    """copy_ into an input, and whatever else writes in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def starts_collective(node: fx.Node) -> bool:
    """A functional collective; its rows are there after its wait alone."""
    return name_of(node).startswith("_c10d_functional::") and not waits(node)


def waits(node: fx.Node) -> bool:
    return name_of(node) == "_c10d_functional::wait_tensor"


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


# -- rules that map axes --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of the operands become which axes of the output: equal labels are one axis, None goes nowhere.

    mm is  out ("m", "n"), operands (("m", None), (None, "n")).
    """

    out: tuple[Label, ...]
    operands: tuple[tuple[Label, ...], ...]


@dataclasses.dataclass(frozen=True)
class AxisRule:
    """A rule given by the op's axes.

    Args:
        axes: the axes of a node.
        moves: True for ops that only move values, so row numbers stay row numbers.
        size_arg: position of an explicit output size.
    """

    axes: Callable[[fx.Node], Axes | None]
    moves: bool = False
    size_arg: int | None = None

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        axes = self.axes(node)
        if axes is None or not isinstance(state, Tokens):
            return None
        label = axes.operands[slot][state.dim]
        return self._transfer(axes, label, state)

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        axes = self.axes(node)
        return None if axes is None else self._transfer(axes, axes.out[state.dim], state)

    def _transfer(self, axes: Axes, label: Label, state: Tokens) -> Transfer | None:
        if label is None or label not in axes.out or (state.points and not self.moves):
            return None
        operands = tuple(state.at(op.index(label)) if label in op else None for op in axes.operands)
        return Transfer(state.at(axes.out.index(label)), operands, self.size_arg)


def einsum(equation: str) -> AxisRule:
    """Axes from an einsum equation; axes that the output lacks are contracted. Size-1 axes broadcast.

    before:  mm(x_MK, w_KN), tokens in M        after: the same mm on local rows of x, whole w, tokens in M
    """
    inputs, output = equation.split("->")
    operands = inputs.split(",")

    def axes(node: fx.Node) -> Axes | None:
        labelled = []
        for letters, operand in zip(operands, tensor_operands(node), strict=True):
            shape = shape_of(operand)
            letters = letters[len(letters) - len(shape) :]  # a bias broadcasts from the right
            labelled.append(tuple(a if a in output and n != 1 else None for a, n in zip(letters, shape, strict=True)))
        return Axes(tuple(output), tuple(labelled))

    return AxisRule(axes)


def broadcast_labels(shape: tuple[Size, ...], out: tuple[Size, ...]) -> tuple[Label, ...]:
    """Labels of an operand that broadcasts to `out`: the output's axis, None where it is expanded."""
    first = len(out) - len(shape)
    return tuple(first + d if n != 1 or out[first + d] == 1 else None for d, n in enumerate(shape))


def pointwise_axes(node: fx.Node) -> Axes:
    out = shape_of(node)
    return Axes(tuple(range(len(out))), tuple(broadcast_labels(shape_of(x), out) for x in tensor_operands(node)))


def same_axes(mixed: Callable[[fx.Node, int], list[int]]) -> Callable[[fx.Node], Axes]:
    """Axes of an op whose tensors all have the output's axes, but for the `mixed` ones (softmax, cat, topk ...)."""

    def axes(node: fx.Node) -> Axes:
        ndim = len(shape_of(node))
        gone = {d % ndim for d in mixed(node, ndim)}
        labels = tuple(None if d in gone else d for d in range(ndim))
        shapes = [shape_of(x) for x in tensor_operands(node)]
        return Axes(labels, tuple(labels if len(s) == ndim else (None,) * len(s) for s in shapes))

    return axes


def moved_axes(source: Callable[[fx.Node, int], list[int | None]]) -> Callable[[fx.Node], Axes]:
    """Axes of a one-operand op: `source(node, ndim)` lists, per output axis, the input axis it comes from."""

    def axes(node: fx.Node) -> Axes:
        ndim = len(shape_of(tensor_operands(node)[0]))
        out = source(node, ndim)
        return Axes(tuple(out), (tuple(d if d in out else None for d in range(ndim)),))

    return axes


# -- views ----------------------------------------------------------------------------------------------------------


class ViewRule:
    """view, reshape, _unsafe_view: the token axis may be merged with, or split from, its neighbours."""

    def forward(self, node: fx.Node, slot: int, state: State, rows: Size) -> Transfer | None:
        if not isinstance(state, Tokens):
            return None
        out = follow_view(shape_of(tensor_operands(node)[0]), state, shape_of(node), rows)
        return None if out is None else Transfer(out, (state,), size_arg=1)

    def backward(self, node: fx.Node, state: Tokens, rows: Size) -> Transfer | None:
        source = follow_view(shape_of(node), state, shape_of(tensor_operands(node)[0]), rows)
        return None if source is None else Transfer(state, (source,), size_arg=1)


def iter_nodes(value: Any) -> Iterator[fx.Node]:
    """Every node inside nested arguments."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return iter(found)


def static(value: object) -> int | None:
    """The int behind an argument or symbolic size, None where it is not known while compiling."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        size = size_of(value)
        return size if isinstance(size, int) else (int(size) if size.is_Integer else None)
    return value if isinstance(value, int) else None
