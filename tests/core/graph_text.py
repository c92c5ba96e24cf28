"""A graph as text for expected values: one node a line, shapes behind names, what says nothing left out."""

from __future__ import annotations

import re

import torch
from torch import fx

FLASH = "_scaled_dot_product_flash_attention_for_cpu"
SILENT = {"device", "pin_memory", "layout"}


def graph_text(graph: fx.Graph) -> str:
    """attention[1, 2, 4, 8] = cppass.attention(shard, k, v, None, None, 0, 8, 2, True, 0, None), and so on."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op == "get_attr":
            lines.append(f"{node.name}{_shape(node)} = self.{node.target}")
        elif node.op != "placeholder":
            given = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items() if k not in SILENT]
            lines.append(f"{node.name}{_shape(node)} = {_op(node)}({', '.join(given)})")
    names = {node.name for node in graph.nodes}
    short = {name: name.replace("_default", "") for name in names if name.replace("_default", "") not in names}
    text = re.sub(r"\w+", lambda word: short.get(word[0], word[0]), "\n".join(lines) + "\n")
    return text.replace(FLASH, "flash_for_cpu")


def _op(node: fx.Node) -> str:
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else ""
