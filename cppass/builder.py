"""Builds a new graph beside an old one: calls with metadata, and where they come from."""

from __future__ import annotations

from typing import Any

from torch import fx

from cppass.shapes import Shapes

KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "original_aten", "from_node", "seq_nr")


class Builder:
    """What the rewriters share.

    Attributes:
        old, new: the graphs.
        origin: the old node on whose account nodes are emitted; they get its stack trace and module path.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.old, self.new = graph, fx.Graph(graph.owning_module)
        self.origin: fx.Node | None = None
        self.shapes = Shapes(graph)

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A call in the new graph, its value worked out by the op's shape function."""
        kwargs = kwargs or {}
        node = self.new.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta.update({k: self.origin.meta[k] for k in KEPT_META if k in self.origin.meta})
        node.meta["val"] = self.shapes(target, args, kwargs)
        return node
