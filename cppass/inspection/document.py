"""An Explanation as one JSON object. schema.json beside this file says what is in it; docs/explain.md explains it."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from typing import Any

from cppass.inspection import summary
from cppass.inspection.advice import meaning
from cppass.inspection.views import Explanation, GraphView, ModuleView, NodeView

SCHEMA = 1
"""Version of the object: raised when a reader of the last one could fail."""


def document(explanation: Explanation) -> dict[str, Any]:
    """Everything that the Explanation holds, as dicts, lists, text and numbers."""
    return {
        "schema": SCHEMA,
        "ok": True,
        "title": explanation.title,
        "status": explanation.status,
        "reason": explanation.reason,
        "summary": summary.verdict(explanation),
        "cp_size": explanation.cp_size,
        "main": explanation.main,
        "graphs": [_graph(view) for view in explanation.graphs],
        "graph_breaks": list(explanation.breaks),
    }


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of that object."""
    text = importlib.resources.files("cppass.inspection").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _graph(view: GraphView) -> dict[str, Any]:
    report = view.report
    return {
        "graph": report.graph,
        "status": report.status,
        "reason": report.reason,
        "tokens": report.tokens,
        "collectives": report.collectives,
        "received_bytes": summary.received(view) if view.after else 0,
        "sites": [dataclasses.asdict(site) for site in report.sites],
        "gathers": [
            {"nodes": list(g.nodes), "why": g.why, "formula": g.formula, "received_bytes": known}
            for g, known in zip(report.gathers, view.gather_bytes, strict=True)
        ],
        "refusals": [{**dataclasses.asdict(r), "meaning": meaning(r)} for r in report.refusals],
        "notes": list(report.notes),
        "layout": _plain(dataclasses.asdict(view.layout)) if view.layout else None,
        "cost": _plain(dataclasses.asdict(view.cost)) if view.cost else None,
        "modules": _module(view.modules),
        "before": [_node(node) for node in view.nodes],
        "after": [_node(node) for node in view.after] if view.after else None,
    }


def _module(module: ModuleView) -> dict[str, Any]:
    return {
        "path": module.path,
        "type": module.type,
        "nodes": module.nodes,
        "roles": module.roles,
        "states": module.kinds,
        "same": list(module.same),
        "children": [_module(child) for child in module.children],
    }


def _node(node: NodeView) -> dict[str, Any]:
    found: dict[str, Any] = _plain(dataclasses.asdict(node))
    found["state"] = {"kind": node.state.kind, "dim": node.state.dim, "text": node.state.text}
    return found


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
