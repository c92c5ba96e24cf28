"""Integer arithmetic that writes itself into a graph: what layout.py computes with ints, over nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

Emit = Callable[[Callable[..., Any], tuple[Any, ...]], fx.Node]


class Numbers:
    """The numbers of one graph: equal arithmetic on equal operands is one node.

    Args:
        emit: appends a call to the graph, with metadata.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.made: dict[tuple[Any, ...], fx.Node] = {}

    def __call__(self, value: int | fx.Node) -> int | Number:
        return value if isinstance(value, int) else Number(value, self)

    def apply(self, function: Callable[..., Any], a: Any, b: Any) -> Number:
        args = (node_of(a), node_of(b))
        key = (function, *args)
        if key not in self.made:
            self.made[key] = self.emit(function, args)
        return Number(self.made[key], self)


class Number:
    """An integer of the graph. Arithmetic with ints and other numbers gives nodes; x + 0 and x * 1 give x."""

    def __init__(self, node: fx.Node, numbers: Numbers) -> None:
        self.node, self.numbers = node, numbers

    def _apply(self, function: Callable[..., Any], a: Any, b: Any) -> Number:
        return self.numbers.apply(function, a, b)

    def __add__(self, other: Any) -> Number:
        return self if _is(other, 0) else self._apply(operator.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Number) and other.node is self.node:
            return 0
        return self if _is(other, 0) else self._apply(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Number:
        return self._apply(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        if _is(other, 0):
            return 0
        return self if _is(other, 1) else self._apply(operator.mul, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Number:
        return self if other == 1 else self._apply(operator.floordiv, self, other)

    def __rfloordiv__(self, other: int) -> Number:
        return self._apply(operator.floordiv, other, self)

    def __mod__(self, other: int) -> Number:
        return self._apply(operator.mod, self, other)


def node_of(value: Any) -> Any:
    """What stands for a number in a node's arguments."""
    return value.node if isinstance(value, Number) else value


def value_of(value: Any) -> Any:
    """The int or SymInt behind a number."""
    return value.node.meta["val"] if isinstance(value, Number) else value


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number
