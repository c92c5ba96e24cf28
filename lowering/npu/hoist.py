"""Computed lengths and index tables as graph inputs: an ACL graph rebinds lengths from its inputs, and only from those.

before:  n = floordiv(s, 4)                            after:  def host(x, s): return (s // 4,)
         attention(..., actual_seq_lengths=[n])               attention(..., actual_seq_lengths=[length_0])
         graph(x, s)                                          graph(x, s, *host(x, s))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cppass.errors import CPError
from cppass.fused_op import V1, V2
from lowering.npu.attention import is_fused
from lowering.npu.tables import TABLES

LISTS = tuple(names[key] for names in (V1, V2) for key in ("q_lengths", "kv_lengths"))

Host = Callable[..., tuple[Any, ...]]


def computed_lengths(gm: fx.GraphModule) -> list[fx.Node]:
    """Elements of length lists that are neither numbers nor inputs of the graph."""
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        for length in _lengths(node):
            if isinstance(length, fx.Node) and length.op != "placeholder":
                found[length] = None
    return list(found)


def hoist(gm: fx.GraphModule, example_inputs: Sequence[Any], lengths: list[fx.Node]) -> tuple[list[Any], Host]:
    """Make computed lengths and tables new inputs of `gm`, in place.

    Returns:
        The example inputs with those of the new ones, and what computes the new inputs from the old ones before a call.

    Raises:
        CPError: CP506, a length is not arithmetic on the graph's inputs.
    """
    host = _program(gm, lengths)
    inputs: dict[fx.Node, fx.Node] = {}
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    for i, length in enumerate(lengths):
        with gm.graph.inserting_after(last):
            last = inputs[length] = gm.graph.placeholder(f"length_{i}")
        last.meta["val"] = length.meta["val"]
        if length.target in TABLES:
            length.replace_all_uses_with(last)
    for node in gm.graph.nodes:
        for name in LISTS:
            if is_fused(node) and isinstance(node.kwargs.get(name), (list, tuple)):
                taken = [inputs.get(n, n) if isinstance(n, fx.Node) else n for n in node.kwargs[name]]
                node.kwargs = {**node.kwargs, name: taken}
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return [*example_inputs, *(n.meta["val"] for n in lengths)], host


def _lengths(node: fx.Node) -> list[Any]:
    if not is_fused(node):
        return []
    given = [node.kwargs.get(name) for name in LISTS]
    return [length for lengths in given if isinstance(lengths, (list, tuple)) for length in lengths]


def _program(gm: fx.GraphModule, lengths: list[fx.Node]) -> Host:
    """The arithmetic of the lengths alone, as a function of the graph's inputs."""
    program = fx.Graph()
    copied = {n: program.placeholder(n.name) for n in gm.graph.nodes if n.op == "placeholder"}
    needed: set[fx.Node] = set()
    stack = list(lengths)
    while stack:
        node = stack.pop()
        if node not in needed and node not in copied:
            _check_arithmetic(node)
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in gm.graph.nodes:
        if node in needed:
            copied[node] = program.node_copy(node, lambda n: copied[n])
    program.output(tuple(copied[n] for n in lengths))
    return fx.GraphModule(torch.nn.Module(), program).forward


def _check_arithmetic(node: fx.Node) -> None:
    if node.op == "call_function" and isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return
    if node.target in TABLES:
        return
    raise CPError(
        "CP506",
        f"a length of fused-infer-attention comes from {node.name}, which is no arithmetic on the graph's inputs",
        "hand the lengths to the model as a list of ints",
    )
