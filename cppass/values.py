"""Does a rewritten graph compute the values of the original? One half of verification; cppass/verify.py types rows.

Rows apart, a canonical op changes no value: what `shard` and `gather` return is the value they are handed, what
`gather_rows` returns is a slice of it, and `attention` is what a site of the original computes. So values are numbered,
equal ops on equal operands alike, over both graphs; what is returned and written must have the same numbers in both.

before:  k = mm(x, wk)                      #3 = mm(#1, #2)
         new = index_copy(cache, 2, at, k)  #7 = index_copy(#4, 2, #5, #3)
after:   k = mm(shard(x), wk)               #3
         new = index_copy(cache, 2, at, gather([k])[0])  #7
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from cppass.ops import CANONICAL, named_arguments
from cppass.rules import is_tensor, tensor_operands, writes
from cppass.site import AttentionSite, Rewrite
from cppass.site_values import SAID, described, result_of
from cppass.tokens import Size
from cppass.value_numbers import Shape, Values, expanded

aten, canonical = torch.ops.aten, torch.ops.cppass
Difference = tuple[fx.Node, str]  # a node of the rewritten graph, and what is wrong with it


class RewrittenValues(Values):
    """The same in terms of the original graph.

    Args:
        table: of the original graph.
        sites: what each attention of the original reads (see `described`) -> the number of its result.
        shapes: the original's shape of a node.
        counted: sizes of the original's arange, for operands that number local rows: (node, operand's place) -> size.
    """

    def __init__(
        self,
        table: dict[Hashable, int],
        sites: dict[Hashable, int],
        shapes: Callable[[fx.Node], Shape],
        counted: Callable[[fx.Node, int], Size | None],
    ) -> None:
        super().__init__(table)
        self.sites, self.shapes, self.counted = sites, shapes, counted
        self.elements: dict[fx.Node, list[int]] = {}
        self.lost: fx.Node | None = None  # an attention that no site describes

    def shape(self, node: fx.Node) -> Shape:
        return tuple(expanded(n) for n in self.shapes(node))

    def operands(self, node: fx.Node) -> list[int]:
        numbers = super().operands(node)
        for place, operand in enumerate(tensor_operands(node)):
            size = self.counted(node, place)
            if size is not None:
                numbers[place] = self.numbered((operand.target, (expanded(size),), self._keywords(operand, ())))
        return numbers

    def number(self, node: fx.Node) -> int:
        name = CANONICAL.get(node.target) if node.op == "call_function" else None
        if name is not None:
            return self._canonical(node, name, named_arguments(node))
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and source in self.elements:
            return self.elements[source][node.args[1]]  # type: ignore[index]
        return super().number(node)

    def _canonical(self, node: fx.Node, name: str, given: dict[str, Any]) -> int:
        if name in ("shard", "gathered_order"):
            return self.of[given["x"]]
        if name in ("gather", "gather_sharded"):
            self.elements[node] = [self.of[x] for x in given["xs"]]
            return self.numbered(("several", *self.elements[node]))
        if name == "gather_rows":
            start = self.frozen(given["start"])
            return self.numbered(("rows", self.of[given["x"]], given["dim"], start, given["count"]))
        if name in ("gather_rows_at", "look_up_sharded"):
            return self.numbered(("look up", self.of[given["x"]], given.get("dim", 0), self.of[given["index"]]))
        said = self.frozen([given[x] for x in SAID[name]])
        if said not in self.sites:
            self.lost = self.lost or node
        return self.sites.get(said, self.numbered((name, said)))


def difference(
    old: fx.Graph,
    new: fx.Graph,
    sites: tuple[AttentionSite, ...],
    shapes: Callable[[fx.Node], Shape],
    counted: Callable[[fx.Node, int], Size | None],
    sharded: bool = False,
) -> Difference | None:
    """Where a rewritten graph computes, returns or writes something else than the original; None where it does not.

    Args:
        shapes: the shape that a value of the new graph has in the old one.
        counted: see RewrittenValues.
    """
    before = Values({}).run(old)
    known = len(before.table)
    rewritten = [site for site in sites if site.rewrite is not Rewrite.ROWWISE]
    table = {described(site, before, sharded): result_of(site, before) for site in rewritten}
    after = RewrittenValues(before.table, table, shapes, counted)
    after.run(new)
    if after.lost is not None:
        return after.lost, "attends over a query, keys, values or a mask that no attention of the model has together"
    theirs, ours = _effects(old, before), _effects(new, after)
    for (node, made), (_, meant) in zip(ours, theirs, strict=False):
        if made != meant:
            return _first_strange(after, node, known), "computes a value that the model does not have there"
    if len(ours) != len(theirs):
        return ours[-1][0], f"is one of {len(ours)} writes and outputs; the model has {len(theirs)}"
    return None


def _effects(graph: fx.Graph, values: Values) -> list[tuple[fx.Node, Hashable]]:
    """What is written, in order, and what is returned."""
    return [(n, values.frozen((n.args, n.kwargs))) for n in graph.nodes if n.op == "output" or writes(n)]


def _first_strange(values: Values, node: fx.Node, known: int) -> fx.Node:
    """The first node in front of an effect whose value the original graph does not have; the effect itself else."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    strange = (n for n in node.graph.nodes if n in seen and n in values.of and values.of[n] >= known and is_tensor(n))
    return next((n for n in strange if n.target not in CANONICAL), node)
