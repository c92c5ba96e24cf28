"""Bring a graph into the form the pass reads: modules inlined, shape-only operands dropped, duplicates merged."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from cppass.match import matcher_of
from cppass.rules import is_random, writes

aten = torch.ops.aten

NEW_FACTORIES = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_full.default: aten.full.default,
}

MAYBE_VIEWS = {aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default, aten._to_copy.default}


def prepare(gm: fx.GraphModule) -> fx.Graph:
    """A copy of the module's graph that computes the same; the module itself keeps its graph."""
    graph = fx.Graph(gm)
    graph.output(graph.graph_copy(gm.graph, {}))
    inline_modules(gm, graph)
    drop_shape_only_operands(graph)
    merge_duplicates(graph)
    graph.eliminate_dead_code(lambda node: node.is_impure() and matcher_of(node) is None)  # dead attention goes
    graph.lint()
    return graph


def inline_modules(gm: fx.GraphModule, graph: fx.Graph) -> None:
    """Inline nested GraphModules, so that attention inside them is found and counted.

    before:  y = call_module[layer](x)            after:  the nodes of `layer`, in place
    """
    while nested := [n for n in graph.nodes if _inner(gm, n) is not None]:
        for node in nested:
            inner = _inner(gm, node)
            assert inner is not None
            _inline(gm, graph, node, inner)


def _inner(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return module if isinstance(module, fx.GraphModule) else None
    if node.op == "call_function" and node.target is torch.ops.higher_order.invoke_subgraph:
        attribute = node.args[0]
        if isinstance(attribute, fx.Node) and attribute.op == "get_attr":
            module = gm.get_submodule(str(attribute.target))
            return module if isinstance(module, fx.GraphModule) else None
    return None


def _inline(gm: fx.GraphModule, graph: fx.Graph, node: fx.Node, inner: fx.GraphModule) -> None:
    given = list(node.args[2:] if node.op == "call_function" else node.args)
    prefix = node.name
    values: dict[fx.Node, fx.Node] = {}
    inputs = iter(given)
    with graph.inserting_before(node):
        for old in inner.graph.nodes:
            if old.op == "placeholder":
                values[old] = next(inputs)  # type: ignore[assignment]
            elif old.op == "output":
                result = fx.map_arg(old.args[0], lambda n: values[n])
            else:
                new = graph.node_copy(old, lambda n: values[n])
                if old.op in ("get_attr", "call_module"):
                    new.target = _adopt(gm, inner, str(old.target), prefix)
                values[old] = new
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


def _adopt(gm: fx.GraphModule, inner: fx.GraphModule, target: str, prefix: str) -> str:
    """Make an attribute of an inner module one of the outer module."""
    value = inner
    for part in target.split("."):
        value = getattr(value, part)
    name = f"{prefix}_{target.replace('.', '_')}"
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        gm.register_buffer(name, value)
    else:
        setattr(gm, name, value)
    return name


def drop_shape_only_operands(graph: fx.Graph) -> None:
    """new_zeros(x, size) takes no value of x: zeros(size), so that x need not be gathered for it."""
    for node in list(graph.nodes):
        factory = NEW_FACTORIES.get(node.target) if node.op == "call_function" else None
        value = node.meta.get("val")
        if factory is None or not isinstance(value, torch.Tensor):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(factory, node.args[1:], {"dtype": value.dtype, "device": value.device})
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def merge_duplicates(graph: fx.Graph) -> None:
    """Equal ops on equal operands become one node: masks, positions and their shards are made once, not per layer.

    before:  m1 = where(seen, 0, -inf); m2 = where(seen, 0, -inf)            after:  m1 in both places

    Random ops stay apart, and so do values whose memory leaves the graph or is written to.
    """
    first: dict[Hashable, fx.Node] = {}
    apart = _escaping(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in apart or not _mergeable(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _mergeable(node: fx.Node) -> bool:
    return getattr(node.target, "_schema", None) is not None and not (writes(node) or is_random(node))


def _escaping(graph: fx.Graph) -> set[fx.Node]:
    """Values that are an output or written to, and values that such a one may be a view of."""
    escaping: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or writes(node) or (node in escaping and _may_be_view(node)):
            escaping.update(node.all_input_nodes)
    return escaping


def _may_be_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or node.target in MAYBE_VIEWS or any(r.alias_info is not None for r in schema.returns)


def _frozen(value: Any) -> Hashable:
    """Arguments as a key; 1, 1.0 and True stay different."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(v)) for name, v in value.items())
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return (type(value), repr(value) if isinstance(value, float) else value)  # 0.0 is not -0.0
