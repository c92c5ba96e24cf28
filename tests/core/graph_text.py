"""A graph as text for expected values: one node a line, shapes behind names, what says nothing left out.

Names are made from ops in order of appearance, so that texts do not depend on how fx counts.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import fx

SHORT = {"_scaled_dot_product_flash_attention_for_cpu": "flash_for_cpu"}
SILENT = {"device", "pin_memory", "layout"}


def graph_text(graph: fx.Graph) -> str:
    """attention[1, 2, 4, 8] = cppass.attention(shard, k, v, None, None, 0, 8, 2, True, 0, None), and so on."""
    names: dict[fx.Node, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = str(node.target)
            continue
        if node.op == "output":
            lines.append(f"return {_named(node.args[0], names)}")
            continue
        base = _op(node).split(".")[1] if "." in _op(node) else _op(node)
        names[node] = f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1
        given = [_named(a, names) for a in node.args]
        given += [f"{k}={_named(v, names)}" for k, v in node.kwargs.items() if k not in SILENT]
        call = f"self.{node.target}" if node.op == "get_attr" else f"{_op(node)}({', '.join(given)})"
        lines.append(f"{names[node]}{_shape(node)} = {call}")
    return "\n".join(lines) + "\n"


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


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else ""
