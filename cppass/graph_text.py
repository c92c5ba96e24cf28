"""A graph as text: one node a line, shapes behind names, what says nothing left out."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

SHORT = {"_scaled_dot_product_flash_attention_for_cpu": "flash_for_cpu"}
SILENT = {"device", "pin_memory", "layout"}
PLAIN_OPS = {"placeholder": "input", "get_attr": "attribute", "output": "output"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One node: `name shape = call`; the output has no name.

    Attributes:
        node: the node.
        name: of its value in the text.
        shape: "[1, 8]", "([1, 8], [4])" for several tensors, "" for what is no tensor.
        call: "aten.mm(x, w)", "self.w" for an attribute, "input" for a placeholder.
    """

    node: fx.Node
    name: str
    shape: str
    call: str

    def __str__(self) -> str:
        return f"{self.name}{self.shape} = {self.call}" if self.name else f"return {self.call}"


def graph_text(graph: fx.Graph) -> str:
    """attention[1, 2, 4, 8] = cppass.attention(shard, k, v, None, None, 0, 8, 2, True, 0, None), and so on.

    Names are made from ops in order of appearance, so that texts do not depend on how fx counts; inputs have no line.
    """
    return "".join(f"{line}\n" for line in lines_of(graph, own_names=False) if line.node.op != "placeholder")


def lines_of(graph: fx.Graph, own_names: bool = True) -> Iterator[Line]:
    """A line for every node, in graph order.

    Args:
        own_names: call values as fx does, as refusals and reports do; else by op, counted in order of appearance.
    """
    names: dict[fx.Node, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    for node in graph.nodes:
        if node.op == "output":
            yield Line(node, "", "", _named(node.args[0], names))
            continue
        if own_names:
            names[node] = node.name
        elif node.op == "placeholder":
            names[node] = str(node.target)
        else:
            base = _op(node).split(".")[1] if "." in _op(node) else _op(node)
            names[node] = f"{base}_{counts[base]}" if counts[base] else base
            counts[base] += 1
        shape = shape_text(node) if own_names else _sizes(node.meta.get("val"))
        yield Line(node, names[node], shape, _call(node, names))


def op_text(node: fx.Node) -> str:
    """ "aten.mm.default", "getitem"; "input", "attribute" and "output" for nodes that call nothing."""
    if node.op in PLAIN_OPS:
        return PLAIN_OPS[node.op]
    target = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else str(getattr(target, "__name__", target))


def shape_text(node: fx.Node) -> str:
    """ "[1, 8]", "([1, 8], [4])" of a node with several tensors, "" of one without."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_sizes(v) for v in value) + ")"
    return _sizes(value)


def _sizes(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else ""


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"self.{node.target}"
    given = [_named(a, names) for a in node.args]
    given += [f"{k}={_named(v, names)}" for k, v in node.kwargs.items() if k not in SILENT]
    return f"{_op(node)}({', '.join(given)})"


def _op(node: fx.Node) -> str:
    if node.op == "get_attr":
        return "attribute"
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        namespace, name, *overload = str(node.target).removesuffix(".default").split(".")
        return ".".join([namespace, SHORT.get(name, name), *overload])
    return str(getattr(node.target, "__name__", node.target))


def _named(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_named(v, names) for v in value) + "]"
    return names[value] if isinstance(value, fx.Node) else str(value)
