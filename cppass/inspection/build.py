"""From what the stages gave for each graph to the Explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import fx

from cppass import torch_private
from cppass.cost import Hardware
from cppass.explain_node import modules_of, path_of, source_of
from cppass.graph_text import lines_of, op_text
from cppass.inspection import states
from cppass.inspection.cost import cost_view
from cppass.inspection.layout import layout_view, number
from cppass.inspection.modules import tree_of
from cppass.inspection.views import Explanation, GraphView, NodeState, NodeView
from cppass.match.kv import write_of
from cppass.ops import CANONICAL
from cppass.pipeline import Stages
from cppass.report import REFUSED, Report
from cppass.rules import is_tensor

LONGEST_CALL = 600
"""Characters of a call that are kept: constants of packed batches can be long lists."""

CANONICAL_ROLES = {
    "shard": "shard",
    "gather": "gather",
    "gather_rows": "gather",
    "gather_rows_at": "gather",
    "gather_sharded": "gather",
    "look_up_sharded": "gather",
    "attention": "attention",
    "fused_attention": "attention",
    "fused_attention_sharded": "attention",
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """One graph that Dynamo compiled.

    Attributes:
        stages: what the pass made of it.
        hardware: the device whose figures its cost is told by.
        inputs: what the model calls the inputs, by placeholder.
    """

    stages: Stages
    hardware: Hardware
    inputs: Mapping[str, str]


def explanation_of(title: str, graphs: Sequence[Seen], breaks: tuple[str, ...] = ()) -> Explanation:
    """The Explanation of a model's graphs."""
    views = tuple(graph_view(seen) for seen in graphs)
    main = max(range(len(views)), key=lambda i: _weight(views[i].report))
    report = views[main].report
    others = tuple(
        f"another graph: {v.report.status}, {len(v.report.sites)} sites {v.report.reason}".rstrip()
        for i, v in enumerate(views)
        if i != main
    )
    given = {f.name: getattr(report, f.name) for f in dataclasses.fields(Report)}
    given["notes"] = report.notes + others
    return Explanation(**given, title=title, graphs=views, main=main, breaks=breaks)


def _weight(report: Report) -> tuple[bool, int, int]:
    """A refused graph decides for the model, then the one with most attention."""
    return report.status == REFUSED, len(report.sites), len(report.refusals)


def graph_view(seen: Seen) -> GraphView:
    """Everything there is to show of one graph."""
    stages = seen.stages
    report, hints = stages.report, torch_private.hints_of(stages.before)
    refused = {refusal.node for refusal in report.refusals}
    roles = {site.node: "attention" for site in stages.sites}
    roles |= {write: "kv write" for site in stages.sites for write in site.writes}
    roles |= {node: "refused" for node in stages.before.nodes if node.name in refused}
    kinds = states.before(stages.before, stages.plan, report.status == REFUSED)
    nodes = _views(stages.before, kinds, roles, seen.inputs)
    after: tuple[NodeView, ...] = ()
    if stages.after is not None and stages.plan is not None:
        kinds = states.after(stages.after, stages.plan)
        after = _views(stages.after, kinds, _roles_after(stages.after), seen.inputs)
    return GraphView(
        report=report,
        nodes=nodes,
        after=after,
        modules=tree_of(nodes, _module_types(stages.before)),
        layout=layout_view(stages, hints),
        cost=cost_view(stages, seen.hardware),
        gather_bytes=tuple(_bytes(g.formula, hints) for g in report.gathers),
    )


def _views(
    graph: fx.Graph, kinds: Mapping[fx.Node, NodeState], roles: Mapping[fx.Node, str], inputs: Mapping[str, str]
) -> tuple[NodeView, ...]:
    found = []
    for line in lines_of(graph):
        node = line.node
        value = node.meta.get("val")
        role = roles.get(node, "")
        if not role and kinds[node].kind in ("gathered", "fetched"):
            role = "gather"
        modules = modules_of(node)
        call, module = line.call, next(reversed(modules), "")
        if node.op == "placeholder" and (source := inputs.get(node.name, "")):
            call, module = f"input {path_of(source)}", _module_of_weight(source)
        found.append(
            NodeView(
                name=node.name,
                op=op_text(node),
                shape=line.shape,
                dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else "",
                call=call if len(call) <= LONGEST_CALL else call[:LONGEST_CALL] + " ...",
                state=kinds[node],
                module=module,
                module_type=modules.get(module, ""),
                where=source_of(node),
                role=role,
                inputs=tuple(n.name for n in node.all_input_nodes),
            )
        )
    return tuple(found)


def _module_types(graph: fx.Graph) -> dict[str, str]:
    """Path -> class of every module of a graph."""
    return {path: kind for node in graph.nodes for path, kind in modules_of(node).items()}


def _module_of_weight(source: str) -> str:
    """The path of the module that a weight or buffer is of, "" for other inputs."""
    is_own = "_parameters[" in source or "_buffers[" in source
    return path_of(source).rpartition(".")[0] if is_own else ""


def _roles_after(graph: fx.Graph) -> dict[fx.Node, str]:
    roles = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        role = CANONICAL_ROLES.get(CANONICAL.get(node.target, ""))
        write = write_of(node) if role is None and is_tensor(node) else None
        if role is not None:
            roles[node] = role
        elif write is not None and write.node is node and write.form != "cat":
            roles[node] = "kv write"
    return roles


def _bytes(formula: str, hints: Mapping[sympy.Symbol, int]) -> int | None:
    """A report's formula in numbers; None where a symbol has no value."""
    by_name = {str(symbol): symbol for symbol in hints}
    return number(sympy.sympify(formula, locals=by_name), hints)
