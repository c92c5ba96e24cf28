"""What the page's script is handed: graphs as rows of numbers and text, what repeats said once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cppass.inspection.pairs import rows_of
from cppass.inspection.states import KINDS
from cppass.inspection.units import place
from cppass.inspection.views import Explanation, GraphView, ModuleView, NodeView


class _Table:
    """Texts by number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    @property
    def texts(self) -> list[str]:
        return list(self.numbers)


def explorer_data(explanation: Explanation) -> dict[str, Any]:
    """Node: [name, op, shape, dtype, call, kind, state, module, where, role, inputs]; op and the like as numbers.

    `texts` lists what the numbers stand for; inputs are positions in the same graph.
    """
    table = _Table()
    graphs = [_graph(view, table) for view in explanation.graphs]
    return {"main": explanation.main, "kinds": KINDS, "graphs": graphs, "texts": table.texts}


def _graph(view: GraphView, table: _Table) -> dict[str, Any]:
    return {
        "before": _nodes(view.nodes, table),
        "after": _nodes(view.after, table),
        "rows": rows_of(view.nodes, view.after) if view.after else [],
        "tree": _module(view.modules),
    }


def _nodes(nodes: Sequence[NodeView], table: _Table) -> list[list[Any]]:
    places = {node.name: i for i, node in enumerate(nodes)}
    return [
        [
            n.name,
            table(n.op),
            table(n.shape),
            table(n.dtype),
            n.call,
            table(n.state.kind),
            table(n.state.text),
            table(n.module),
            table(place(n.where)),
            table(n.role),
            [places[name] for name in n.inputs],
        ]
        for n in nodes
    ]


def _module(module: ModuleView) -> dict[str, Any]:
    """A module of the tree; `same` are the paths of equal siblings, `marks` what to look for in it."""
    return {
        "path": module.path,
        "label": _range(module) if module.same else module.name,
        "type": module.type,
        "nodes": module.nodes,
        "marks": module.roles,
        "same": list(module.same),
        "children": [_module(child) for child in module.children],
    }


def _range(module: ModuleView) -> str:
    """ "1 .. 27" """
    return f"{module.name} .. {module.same[-1].rpartition('.')[2]}"
