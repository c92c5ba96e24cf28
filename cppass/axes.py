"""Axes of ops by argument name: the kinds of rule that most ops fit.

A kind is called with a node and returns its Axes. Each is a frozen dataclass, so that it prints as it was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from cppass.rules import Axes, Label, is_tensor, iter_nodes, pointwise_axes, shape_of, tensor_operands

AxesOf = Callable[[fx.Node], Axes | None]


def operand_names(node: fx.Node) -> list[str]:
    """The argument that each tensor operand belongs to, in the order of rules.tensor_operands."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: node.args[i] for i, a in enumerate(schema.arguments) if i < len(node.args)}
    return [name for name, value in {**given, **node.kwargs}.items() for x in iter_nodes(value) if is_tensor(x)]


def given(node: fx.Node, name: str) -> Any:
    """An argument of a node by its name in the op's schema; its default where it is left out."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def named_axes(node: fx.Node, out: tuple[Label, ...], operands: Mapping[str, tuple[Label, ...]]) -> Axes:
    """Axes from labels by argument name; arguments that are not named are whole on every rank."""
    pairs = zip(operand_names(node), tensor_operands(node), strict=True)
    return Axes(out, tuple(operands.get(name, (None,) * len(shape_of(x))) for name, x in pairs))


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """See pointwise."""

    names: tuple[str, ...] = ()

    def __call__(self, node: fx.Node) -> Axes:
        return pointwise_axes(node)

    def __repr__(self) -> str:
        return "pointwise"


pointwise = Pointwise()
"""A token-wise op: every element of the output is made from the elements in its place; operands broadcast.

gate(x [B, S, H], g [B, S, 1], bias [H]) -> [B, S, H]            tokens may be in any dimension
"""


@dataclasses.dataclass(frozen=True)
class RowWise:
    """See row_wise."""

    names: tuple[str, ...]
    used: int = 1

    def __call__(self, node: fx.Node) -> Axes:
        named = [shape_of(x) for name, x in _named(node) if name in self.names]
        rows = len(named[0]) - self.used if named else 0
        labels: list[tuple[Label, ...]] = []
        for name, operand in _named(node):
            ndim = len(shape_of(operand))
            labels.append(tuple(d if d < rows and name in self.names else None for d in range(ndim)))
        return Axes(tuple(d if d < rows else None for d in range(len(shape_of(node)))), tuple(labels))

    def __repr__(self) -> str:
        return f"row_wise({', '.join(map(repr, self.names))}, used={self.used})"


def row_wise(*names: str, used: int = 1) -> RowWise:
    """An op that needs whole rows, each for itself: norms, softmax, quantisation, a fused MLP.

    norm(x [B, S, H], weight [H]) -> [B, S, H]        row_wise("x")            tokens in dim 0 or 1
    rope(q [S, N, D], cos [S, D], ...) -> [S, N, D]   row_wise("q", used=2)    tokens in dim 0

    Args:
        names: the arguments that hold rows; the leading axes of these and of the output are the same. Other arguments
            (weights) are whole on every rank.
        used: trailing axes of the first of them that make up a row.
    """
    return RowWise(names, used)


@dataclasses.dataclass(frozen=True)
class Reduction:
    """See reduction."""

    name: str
    dim: int | tuple[int, ...] | str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *([self.dim] if isinstance(self.dim, str) else []))

    def __call__(self, node: fx.Node) -> Axes:
        shape = next(shape_of(x) for name, x in _named(node) if name == self.name)
        ndim, out = len(shape), len(shape_of(node))
        dims = given(node, self.dim) if isinstance(self.dim, str) else self.dim
        gone = {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        labels = tuple(None if d in gone else d for d in range(ndim))
        kept = labels if out == ndim else tuple(d for d in labels if d is not None)
        return named_axes(node, kept, {self.name: labels})

    def __repr__(self) -> str:
        return f"reduction({self.name!r}, dim={self.dim!r})"


def reduction(name: str, dim: int | tuple[int, ...] | str) -> Reduction:
    """An op that uses up one or more dimensions of an argument; tokens may be in the others.

    energy(x [B, S, H]) -> [B, S] or [B, S, 1]        reduction("x", dim=-1)
    total(x [B, S, H], int dim)                       reduction("x", dim="dim")    as the call says

    Args:
        name: the argument; others are whole on every rank.
        dim: the dimension or dimensions, or the name of the argument that gives them.
    """
    return Reduction(name, dim)


@dataclasses.dataclass(frozen=True)
class Lettered:
    """See axes."""

    out: tuple[Label, ...]
    operands: tuple[tuple[str, tuple[Label, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.operands)

    def __call__(self, node: fx.Node) -> Axes:
        return named_axes(node, self.out, dict(self.operands))

    def __repr__(self) -> str:
        named = "".join(f", {name}={_letters(labels)!r}" for name, labels in self.operands)
        return f"axes({_letters(self.out)!r}{named})"


def axes(out: str, /, **operands: str) -> Lettered:
    """Axes by letters, as einsum writes them: equal letters are one axis, "." is one that can carry no tokens.

    mix(x [B, S, H], weight [H, F]) -> [B, S, F]      axes("bsf", x="bs.", weight=".f")
    fold(x [B, H, S, D]) -> [B, S, H * D]             axes("bs.", x="b.s.")

    Arguments that are not named, and those named with dots alone, are whole on every rank.
    """
    return Lettered(_labels(out), tuple((name, _labels(letters)) for name, letters in operands.items()))


def _labels(letters: str) -> tuple[Label, ...]:
    return tuple(None if letter == "." else letter for letter in letters)


def _letters(labels: tuple[Label, ...]) -> str:
    return "".join("." if label is None else str(label) for label in labels)


def _named(node: fx.Node) -> list[tuple[str, fx.Node]]:
    return list(zip(operand_names(node), tensor_operands(node), strict=True))
