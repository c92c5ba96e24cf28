"""Builds a new graph beside an old one: calls with metadata, and where they come from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import fx

from cppass.torch_private import fake_mode_of

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
        self.fake_mode = fake_mode_of(graph)

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A call in the new graph, its value worked out by the op's shape function."""
        kwargs = kwargs or {}
        node = self.new.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta.update({k: self.origin.meta[k] for k in KEPT_META if k in self.origin.meta})
        with self._shapes():
            node.meta["val"] = target(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))
        return node

    def _shapes(self) -> AbstractContextManager[Any]:
        return self.fake_mode if self.fake_mode is not None else nullcontext()


def _value(node: fx.Node) -> Any:
    return node.meta["val"]
