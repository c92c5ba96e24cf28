"""Numbers of values: equal ops on equal operands have one number. What cppass/values.py compares graphs by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from cppass.match.kv import SAME, VIEWS
from cppass.npu_rules import ROUTINGS
from cppass.rules import argument, is_tensor, name_of, shape_of, tensor_operands
from cppass.tokens import Size, size_of

aten = torch.ops.aten
Shape = tuple[Size, ...]


class Values:
    """Numbers of the values of a graph.

    Args:
        table: key of a value -> its number, shared by the graphs that are compared.

    Attributes:
        of: the number of each node.
    """

    def __init__(self, table: dict[Hashable, int]) -> None:
        self.table = table
        self.of: dict[fx.Node, int] = {}
        self.cuts: dict[int, tuple[int, int, Any]] = {}  # of rows from x: (number of x, dim, first row)

    def run(self, graph: fx.Graph) -> Values:
        for node in graph.nodes:
            if node.op != "output":
                self.of[node] = self.number(node)
        return self

    def number(self, node: fx.Node) -> int:
        if node.op == "call_function" and node.target in SAME:
            return self.operands(node)[0]  # a copy is the value it copies
        return self.numbered(self.key(node))

    def numbered(self, key: Hashable) -> int:
        number = self.table.setdefault(key, len(self.table))
        if isinstance(key, tuple) and key[0] == "rows":
            self.cuts[number] = key[1:4]
        return number

    def key(self, node: fx.Node) -> Hashable:
        if node.op != "call_function":
            return node.op, str(node.target)
        numbers = self.operands(node)
        read = KEYS.get(node.target)
        key = read(node, numbers, self) if read is not None else None
        return key or (node.target, self.frozen(node.args, iter(numbers)), self._keywords(node, numbers))

    def operands(self, node: fx.Node) -> list[int]:
        """Numbers of the tensor operands, in argument order."""
        return [self.of[x] for x in tensor_operands(node)]

    def shape(self, node: fx.Node) -> Shape:
        """The shape that the value has in the original graph."""
        return tuple(expanded(n) for n in shape_of(node))

    def frozen(self, value: Any, numbers: Iterator[int] | None = None) -> Hashable:
        """Arguments as a key: tensors by number, sizes by what they are."""
        if isinstance(value, fx.Node):
            size = value.meta.get("val")
            if isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool):
                number: Hashable = expanded(size_of(size))
                return number
            tensor = numbers is not None and is_tensor(value)
            return "value", next(numbers) if tensor else self.of[value]  # type: ignore[arg-type]
        if isinstance(value, (list, tuple)):
            return tuple(self.frozen(v, numbers) for v in value)
        if isinstance(value, dict):
            return tuple(sorted((k, self.frozen(v, numbers)) for k, v in value.items()))
        if isinstance(value, slice):
            return "slice", self.frozen((value.start, value.stop, value.step), numbers)
        if isinstance(value, torch.SymInt):
            return expanded(size_of(value))  # type: ignore[no-any-return]
        return repr(value) if isinstance(value, (bool, float)) else value  # True is not 1, 0.0 is not -0.0

    def _keywords(self, node: fx.Node, numbers: Sequence[int]) -> Hashable:
        """Keyword arguments by name; their tensors have the last numbers."""
        dropped = {"active_num"} if name_of(node) in ROUTINGS else set()  # rows are local ones: verify sees to it
        positional: list[fx.Node] = []
        fx.map_arg(node.args, lambda x: positional.append(x) if is_tensor(x) else None)
        own = iter(numbers[len(positional) :])
        found = [(name, self.frozen(value, own)) for name, value in node.kwargs.items()]
        return tuple(sorted(((n, v) for n, v in found if n not in dropped), key=lambda item: item[0]))


# -- ops whose arguments name sizes, or that say the same in several ways ----------------------------------------------

Key = Callable[[fx.Node, Sequence[int], Values], Hashable]


def _sized(kind: str) -> Key:
    """A view, whatever its op and however its sizes are written."""
    return lambda node, numbers, values: (kind, numbers[0], values.shape(node))


def _slice(node: fx.Node, numbers: Sequence[int], values: Values) -> Hashable:
    if argument(node, 4, "step", 1) != 1:
        return None
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    start = values.frozen(argument(node, 2, "start", 0) or 0)
    return "rows", numbers[0], dim, start, values.shape(node)[dim]


def _select(node: fx.Node, numbers: Sequence[int], values: Values) -> Hashable:
    """Row 0 of rows 7 to 9 of x is row 7 of x."""
    dim, index = argument(node, 1, "dim") % (len(shape_of(node)) + 1), values.frozen(argument(node, 2, "index"))
    source, cut, first = values.cuts.get(numbers[0], (numbers[0], dim, 0))
    if cut == dim and isinstance(index, int) and index >= 0 and isinstance(first, (int, sympy.Expr)):
        return "row", source, dim, first + index
    return "row", numbers[0], dim, index


def _index_select(node: fx.Node, numbers: Sequence[int], values: Values) -> Hashable:
    return "look up", numbers[0], argument(node, 1, "dim") % len(shape_of(node)), numbers[1]


def _index(node: fx.Node, numbers: Sequence[int], values: Values) -> Hashable:
    """x[index] with one index of rows is index_select."""
    indices = argument(node, 1, "indices")
    if len(indices) != 1 or len(shape_of(indices[0])) != 1 or indices[0].meta["val"].dtype == torch.bool:
        return None
    return "look up", numbers[0], 0, numbers[1]


KEYS: dict[Any, Key] = {
    **dict.fromkeys(VIEWS, _sized("view")),
    aten.expand.default: _sized("expand"),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
}


@functools.lru_cache(maxsize=4096)
def expanded(size: Any) -> Any:
    """Sizes that are equal look equal."""
    return sympy.expand(size) if isinstance(size, sympy.Expr) else size
