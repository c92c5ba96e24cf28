"""The Explanation of a model: everything that is shown, as frozen values without torch's objects in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cppass.report import Report


@dataclasses.dataclass(frozen=True)
class NodeState:
    """Where the rows of a value are.

    Attributes:
        kind: a key of cppass.inspection.states.KINDS: "local", "full", "gathered", "sharded", ...
        dim: the dimension that carries tokens, None where none is cut.
        text: the same for people.
    """

    kind: str
    text: str
    dim: int | None = None


@dataclasses.dataclass(frozen=True)
class NodeView:
    """One node of a graph.

    Attributes:
        name: as fx calls it; refusals and gathers name nodes so.
        op: "aten.mm.default"; "input", "attribute" and "output" for nodes that call nothing.
        shape, dtype: of its value; "" where it is no tensor.
        call: the right-hand side of its line, "aten.mm(view, w)".
        state: where its rows are.
        module, module_type: path and class of the module that made it; "" where unknown.
        where: "file:line in function: source" of the user's code; "" where unknown.
        role: "attention", "kv write", "gather", "shard" or "refused"; "" for all others.
        inputs: names of the nodes that it reads.
    """

    name: str
    op: str
    shape: str
    dtype: str
    call: str
    state: NodeState
    module: str = ""
    module_type: str = ""
    where: str = ""
    role: str = ""
    inputs: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return f"{self.name}{self.shape} = {self.call}" if self.op != "output" else f"return {self.call}"


@dataclasses.dataclass(frozen=True)
class ModuleView:
    """A module of the model, or a run of siblings that are the same.

    Attributes:
        path: "model.layers.0"; of the first, where several are folded.
        name: the last part of it.
        type: its class; "" for a mere container.
        nodes: nodes of the graph made in it and below.
        roles: how many of them have a role, by role.
        kinds: how many of them have each kind of state.
        same: paths of all equal siblings, this one first; () where there is only this.
        children: the modules in it, in graph order.
    """

    path: str
    name: str
    type: str
    nodes: int
    roles: dict[str, int]
    kinds: dict[str, int]
    same: tuple[str, ...]
    children: tuple[ModuleView, ...]


@dataclasses.dataclass(frozen=True)
class RankRows:
    """What one rank owns.

    Attributes:
        rank: its number.
        spans: (half, first row, rows) of each piece, in local order; half 0 is the early one.
        rows: rows that are no padding.
        share: of the attention's (query, key) pairs, 0 to 1.
    """

    rank: int
    spans: tuple[tuple[int, int, int], ...]
    rows: int
    share: float


@dataclasses.dataclass(frozen=True)
class LayoutView:
    """The zigzag layout of the call that was explained.

    Attributes:
        tokens: new tokens of all sequences.
        lengths: of each sequence.
        cp_size: number of ranks P.
        local_rows: rows a rank has, padding included.
        ranks: what each of them owns.
    """

    tokens: int
    lengths: tuple[int, ...]
    cp_size: int
    local_rows: int
    ranks: tuple[RankRows, ...]


@dataclasses.dataclass(frozen=True)
class CostView:
    """What the graph costs by the cost model, in FLOPs, bytes and seconds. Predicted; no device was measured for it.

    Attributes:
        hardware: whose figures were taken.
        cp_size: number of ranks P.
        tokens: of the call that was explained.
        flops_per_token, attention_flops_per_pair, gather_bytes_per_token, weight_bytes: as cppass.gate counts them.
        one_device, on_ranks: seconds of the explained call.
        break_even: tokens from which on P ranks are faster, None for never.
        curve: (tokens, seconds on one device, seconds on P ranks).
        source: of the figures.
    """

    hardware: str
    cp_size: int
    tokens: int
    flops_per_token: float
    attention_flops_per_pair: float
    gather_bytes_per_token: float
    weight_bytes: float
    one_device: float
    on_ranks: float
    break_even: int | None
    curve: tuple[tuple[int, float, float], ...]
    source: str


@dataclasses.dataclass(frozen=True)
class GraphView:
    """One graph of the model.

    Attributes:
        report: what happened to it, and why.
        nodes: before the pass, in graph order.
        after: the rewritten graph; () where there is none.
        modules: the module tree; its root is the model.
        layout, cost: None where the graph has no attention to share.
        gather_bytes: bytes a rank receives in each of `report.gathers` in the explained call; None: unknown.
    """

    report: Report
    nodes: tuple[NodeView, ...]
    after: tuple[NodeView, ...]
    modules: ModuleView
    layout: LayoutView | None
    cost: CostView | None
    gather_bytes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(Report):
    """What the pass does to a model: the report of its main graph, and what there is to know beside it.

    The main graph is the one that decides: a refused one, else the one with most attention sites. `print` shows it.

    Attributes:
        title: what was explained.
        graphs: all graphs of the model, in the order in which they were compiled.
        main: which of them the report is of.
        breaks: why Dynamo broke the model into several graphs, in its words.
    """

    title: str = ""
    graphs: tuple[GraphView, ...] = ()
    main: int = 0
    breaks: tuple[str, ...] = ()

    @property
    def graph_view(self) -> GraphView:
        """The main graph."""
        return self.graphs[self.main]

    def __str__(self) -> str:
        from cppass.inspection.text import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.title}: {self.status}, graphs: {len(self.graphs)}, sites: {len(self.sites)}>"

    def graph_text(self) -> str:
        """The main graph before and after, one node a line with the state of its rows; equal layers once."""
        from cppass.inspection.text import graphs_as_text

        return graphs_as_text(self.graph_view)

    def to_dict(self) -> dict[str, Any]:
        """One JSON object, as docs/explain.md and cppass/inspection/schema.json describe it."""
        from cppass.inspection.document import document

        return document(self)

    def to_html(self) -> str:
        """One self-contained page. Needs jinja2 (`pip install "cppass[explain]"`)."""
        from cppass.inspection.page import render

        return render(self)

    def save_html(self, path: str | Path) -> None:
        """Write the page to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8")
