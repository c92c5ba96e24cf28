"""Builds a new graph beside an old one: calls with metadata, and where they come from."""

from __future__ import annotations

from typing import Any

from torch import fx

from cppass.shapes import Shapes

KEPT_META = (
    *("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom"),  # where it is in the user's code
    *("original_aten", "from_node", "seq_nr"),  # what it was before decomposition, and its number for profilers
)


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
        """A call in the new graph, its value worked out by the op's shape function.

        The op of an old node keeps that node's name, so that the two graphs can be read side by side.
        """
        kwargs = kwargs or {}
        name = self.origin.name if self.origin is not None and self.origin.target is target else None
        node = self.new.call_function(target, args, kwargs, name=name)
        place = self._place()
        if place is not None:
            node.meta.update({k: place.meta[k] for k in KEPT_META if k in place.meta})
        node.meta["val"] = self.shapes(target, args, kwargs)
        return node

    def _place(self) -> fx.Node | None:
        """The node whose place in the user's code is told; for an input, which has none, the first op that reads it."""
        origin = self.origin
        if origin is None or origin.op == "call_function":
            return origin
        return next((user for user in origin.users if user.stack_trace), None)
