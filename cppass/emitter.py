"""Emits what stands in for a canonical op: nodes with metadata, in place, in graph order."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from cppass.arithmetic import Numbers
from cppass.errors import Unsupported
from cppass.ops import CANONICAL
from cppass.shapes import Shapes
from cppass.target import Ranks
from cppass.tokens import Size, size_of
from cppass.torch_private import without_fakes

c10d = torch.ops._c10d_functional
Lowering = TypeVar("Lowering")


class Emitter:
    """Emits nodes in front of the canonical node that is being lowered, with its stack trace and module path."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.shapes = Shapes(gm.graph)
        self.origin: fx.Node | None = None
        self.sizes: dict[Size, fx.Node | None] = {}
        self.numbers = Numbers(lambda function, args: self(function, *args))

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        assert self.origin is not None
        with self.graph.inserting_before(self.origin):
            node = self.graph.call_function(target, args, kwargs)
            self._as_origin(node)
            node.meta["val"] = self.shapes(target, args, kwargs)
        return node

    def _as_origin(self, node: fx.Node) -> None:
        """What profilers and tracebacks show of it is what they showed of the node it stands for."""
        assert self.origin is not None
        node.meta.update({k: v for k, v in self.origin.meta.items() if k != "val"})

    def size(self, x: fx.Node, dim: int) -> int | fx.Node:
        """A size of a tensor, as an int or a node."""
        size = size_of(x.meta["val"].shape[dim])
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            self.sizes[size] = self._input_size(size)
        known = self.sizes[size]
        return known if known is not None else self(torch.ops.aten.sym_size.int, x, dim)

    def _input_size(self, size: Size) -> fx.Node | None:
        """A size as one of the graph's inputs gives it, so that the host can tell it before a call."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        numbers = [node for node in inputs if isinstance(node.meta.get("val"), torch.SymInt)]
        return next((node for node in numbers if size_of(node.meta["val"]) == size), None)

    def all_gather(self, packed: fx.Node, ranks: Ranks) -> fx.Node:
        """[n, ...] of every rank -> [P * n, ...], rank after rank."""
        started = self(c10d.all_gather_into_tensor.default, packed, ranks.cp_size, ranks.group_name)
        return self(c10d.wait_tensor.default, started)

    def constant(self, values: list[int], device: torch.device) -> fx.Node:
        """int64 numbers that are part of the graph. npugraph_ex 2.13.0 knows constants by "_constant" in their name."""
        with without_fakes():
            tensor = torch.tensor(values, dtype=torch.int64, device=device)
        number = 0
        while hasattr(self.gm, f"rows_constant_{number}"):
            number += 1
        self.gm.register_buffer(f"rows_constant_{number}", tensor)
        assert self.origin is not None
        with self.graph.inserting_before(self.origin):
            node = self.graph.get_attr(f"rows_constant_{number}")
        self._as_origin(node)
        node.meta["val"] = self.shapes.mode.from_tensor(tensor) if self.shapes.mode is not None else tensor
        return self(torch.ops.aten.lift_fresh_copy.default, node)

    def lowerings(self, known: Mapping[str, Lowering], target: str, hint: str) -> Iterator[tuple[fx.Node, Lowering]]:
        """The canonical nodes and what lowers them, in graph order; nodes are emitted in front of the one at hand.

        Raises:
            Unsupported: CP505, the target has no form of an op.
        """
        nodes = [n for n in self.graph.nodes if n.op == "call_function" and n.target in CANONICAL]
        for node in nodes:
            name = CANONICAL[node.target]
            if name not in known:
                raise Unsupported("CP505", f"cppass::{name} (node {node.name}) has no {target}", hint)
            self.origin = node
            yield node, known[name]

    def replace(self, node: fx.Node, lowered: fx.Node | list[fx.Node]) -> None:
        """A list holds the elements of a node that returns several."""
        if isinstance(lowered, fx.Node):
            node.replace_all_uses_with(lowered)
        else:
            for user in list(node.users):
                assert user.target is operator.getitem
                user.replace_all_uses_with(lowered[user.args[1]])  # type: ignore[index]
                self.graph.erase_node(user)
        self.graph.erase_node(node)
