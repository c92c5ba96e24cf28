"""Finding and editing nodes of a rewritten graph, for mutations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from cppass.ops import named_arguments
from cppass.rules import is_tensor, tensor_operands


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function"]


def one_of(r: random.Random, nodes: list[Any]) -> Any:
    return r.choice(nodes) if nodes else None


def of(graph: fx.Graph, targets: set[Any]) -> list[fx.Node]:
    return [n for n in calls(graph) if n.target in targets]


def set_named(node: fx.Node, **given: Any) -> None:
    """Arguments of a canonical op, by name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    values = named_arguments(node) | given
    node.args = tuple(values[name] for name in names)


def replace_operand(node: fx.Node, place: int, by: fx.Node) -> None:
    """The operand at this place among the tensor operands; the others stay, though they may be the same node."""
    places = iter(range(len(tensor_operands(node))))
    swap = lambda x: by if is_tensor(x) and next(places) == place else x  # noqa: E731
    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), swap)


def before(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    for other in graph.nodes:
        if other is node:
            return
        if is_tensor(other) and isinstance(other.meta["val"], torch.Tensor):
            yield other


def kind_of(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return (value.dtype, *value.shape)
