"""An Explanation in lines: what print() shows, and what a terminal shows in colour (cppass/inspection/terminal.py)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from cppass.inspection import summary
from cppass.inspection.advice import FALLBACK, FALLBACK_EFFECT, falls_back, meaning
from cppass.inspection.modules import repeated
from cppass.inspection.units import flops, folded, octets, place, plural, seconds
from cppass.inspection.views import CostView, Explanation, GraphView, LayoutView, ModuleView, NodeView
from cppass.report import LEFT_ALONE, REFUSED, REWRITTEN

STYLE_OF_STATUS = {REWRITTEN: "good", LEFT_ALONE: "plain", REFUSED: "bad"}
RANKS_SHOWN = 8
WIDEST_BAR = 32
DEEPEST = 3
KEY_WIDTH = 9


@dataclasses.dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        text: what it says.
        style: "plain", "title", "head", "good", "bad", "way out", "code" or "dim".
        indent: in steps of two.
        key: what stands in front of the text, in a column of its own.
    """

    text: str
    style: str = "plain"
    indent: int = 1
    key: str = ""

    @property
    def label(self) -> str:
        """The key as wide as its column."""
        return f"{self.key:<{KEY_WIDTH}}" if self.key else ""


def as_text(explanation: Explanation) -> str:
    """The whole of it, without colours and not wrapped."""
    return "\n".join("  " * line.indent + line.label + line.text for line in lines(explanation))


def lines(explanation: Explanation) -> Iterator[Line]:
    view = explanation.graph_view
    graph = f"graph {view.report.graph}: " if view.report.graph else ""
    title = f"{graph}{explanation.status}: {explanation.title}, {summary.size(explanation)}"
    yield Line(title, "title", 0)
    yield Line(summary.verdict(explanation), STYLE_OF_STATUS[explanation.status])
    yield from _refusals(view)
    yield from _sites(view)
    yield from _gathers(view)
    yield from _notes(view)
    is_decided = "unknown" not in summary.states(view)
    if is_decided:
        yield from _states(view)
    if view.layout is not None:
        yield from _layout(view.layout)
    if view.cost is not None:
        yield from _cost(view.cost)
    if is_decided:
        yield from _modules(view)
    yield from _others(explanation)


def _refusals(view: GraphView) -> Iterator[Line]:
    if view.report.refusals:
        yield Line("refused", "head", 0)
    for found in summary.refusals(view):
        first = found.first
        times = f"{found.count} x " if found.count > 1 else ""
        yield Line(f"{times}[{first.code}] {first.why}", "bad")
        if meaning(first):
            yield Line(meaning(first), indent=2, key="why")
        more = f" and {found.count - 1} more" if found.count > 1 else ""
        module = f" of {first.module}" if first.module else ""
        yield Line(f"node {first.node} ({first.op}){module}{more}", indent=2, key="at")
        if first.where:
            yield Line(place(first.where), "code", 2, "from")
        if first.hint:
            yield Line(first.hint, "way out", 2, "way out")
    if any(falls_back(r) for r in view.report.refusals):
        yield Line(f"{FALLBACK} {FALLBACK_EFFECT}", "dim", 2, "or")


def _sites(view: GraphView) -> Iterator[Line]:
    if view.report.sites:
        done = "" if view.report.status == REWRITTEN else ", not rewritten"
        yield Line(f"attention: {plural(len(view.report.sites), 'site')}{done}", "head", 0)
    for found in summary.sites(view):
        site = found.first
        yield Line(f"{found.count} x {site.form}, {site.kv_write}, {site.mask}; {site.rewrite}")
        where = folded(found.modules) if len(found.modules) < 2 else f"{found.modules[0]} to {found.modules[-1]}"
        if where:
            yield Line(where, "dim", 2, "in")
        if site.where:
            yield Line(place(site.where), "code", 2, "from")


def _gathers(view: GraphView) -> Iterator[Line]:
    if view.report.status != REWRITTEN:
        return
    total = octets(summary.received(view))
    count = plural(view.report.collectives, "collective")
    yield Line(f"{count} in one forward: {total} received per rank", "head", 0)
    for found in summary.gathers(view):
        each = " each" if found.count > 1 else ""
        formula = "" if found.octets is not None and found.formula.isdigit() else f" = {found.formula} bytes"
        names = ", ".join(found.nodes)
        yield Line(f"{found.count} x {found.why}: {octets(found.octets)}{each}{formula} (first: {names})")


def _notes(view: GraphView) -> Iterator[Line]:
    for note in view.report.notes:
        yield Line(f"note: {note}")


def _states(view: GraphView) -> Iterator[Line]:
    counts = summary.states(view)
    known = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    after = f"; {len(view.after):,} afterwards" if view.after else ""
    yield Line(f"values: {plural(len(view.nodes), 'node')}{after}", "head", 0)
    yield Line(known + (", as far as it was planned" if view.report.status == REFUSED else ""))
    for node in _odd(view) if view.after else ():
        yield Line(f"{node.name} ({node.op}): {node.state.text}", "dim", 2)


def _odd(view: GraphView) -> list[NodeView]:
    """Nodes that a reader looks for: what travels besides K and V."""
    pairs = {name for g in view.report.gathers if g.why == "K and V of a site" for name in g.nodes}
    return [n for n in view.nodes if n.role == "gather" and n.name not in pairs][:RANKS_SHOWN]


def _layout(layout: LayoutView) -> Iterator[Line]:
    count = 2 * layout.cp_size
    of = plural(layout.tokens, "token")
    many, each = (f" of {len(layout.lengths)} sequences", " each") if len(layout.lengths) > 1 else ("", "")
    yield Line(f"layout: {of}{many} in {count} blocks{each}, {plural(layout.local_rows, 'row')} a rank", "head", 0)
    shown = [rank for rank in layout.ranks if rank.rank < RANKS_SHOWN]
    for rank in shown:
        spans = [f"{first}..{first + rows - 1}" for _, first, rows in rank.spans]
        text = ", ".join(spans[:4]) + (f" and {len(spans) - 4} more pieces" if len(spans) > 4 else "")
        padding = f" + {layout.local_rows - rank.rows} padding" if layout.local_rows > rank.rows else ""
        yield Line(f"rank {rank.rank:<3} {bar(rank.rank, count)}{text}{padding}  {rank.share:.1%} of the attention")
    if len(layout.ranks) > len(shown):
        yield Line(f"and {len(layout.ranks) - len(shown)} more ranks", "dim")


def bar(rank: int, count: int) -> str:
    """Which blocks a rank owns: its own from the start and the same from the end."""
    if count > WIDEST_BAR:
        return ""
    return "".join("#" if block in (rank, count - 1 - rank) else "." for block in range(count)) + "  "


def _cost(cost: CostView) -> Iterator[Line]:
    yield Line(f"cost on {cost.hardware}: predicted, not measured", "head", 0)
    ratio = cost.one_device / cost.on_ranks
    yield Line(
        f"{plural(cost.tokens, 'token')}: one device {seconds(cost.one_device)}, {cost.cp_size} ranks "
        f"{seconds(cost.on_ranks)} ({ratio:.3g}x)",
        "good" if ratio > 1 else "bad",
    )
    never = f"{cost.cp_size} ranks are never faster than one device there"
    yield Line(never if cost.break_even is None else f"it pays from {plural(cost.break_even, 'token')} on")
    yield Line(
        f"a token: {flops(cost.flops_per_token)} in matmuls, {octets(cost.gather_bytes_per_token)} of K and V to send; "
        f"weights {octets(cost.weight_bytes)}",
        "dim",
    )


def _modules(view: GraphView) -> Iterator[Line]:
    if view.modules.children:
        yield Line("modules: nodes, and where their rows are", "head", 0)
        for child in view.modules.children:
            yield from _module(child, 1)


def _module(module: ModuleView, depth: int) -> Iterator[Line]:
    name = folded(module.same) if module.same else module.path
    times = f" {len(module.same)} x same, each" if module.same else ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in module.kinds.items() if kind != "number")
    kind = f" ({module.type})" if module.type else ""
    yield Line(f"{name}{kind}:{times} {plural(module.nodes, 'node')}: {kinds}", indent=depth)
    inside = any(repeated(module)) or not module.type
    if depth < DEEPEST and inside and not module.same:
        for child in module.children:
            yield from _module(child, depth + 1)


def _others(explanation: Explanation) -> Iterator[Line]:
    others = [v for i, v in enumerate(explanation.graphs) if i != explanation.main]
    if others:
        yield Line(f"other graphs of the model: {len(others)}", "head", 0)
    for view in others:
        r = view.report
        reason = f": {r.reason}" if r.reason else ""
        name = f"graph {r.graph}" if r.graph else "a graph"
        nodes = f"{plural(len(r.sites), 'site')}, {plural(len(view.nodes), 'node')}"
        yield Line(f"{name}: {r.status}, {nodes}{reason}")
        for note in r.notes:
            yield Line(note, "dim", 2)
    for reason in explanation.breaks:
        yield Line(f"graph break: {reason.strip().splitlines()[0]}", "dim")


def graphs_as_text(view: GraphView) -> str:
    """The graph before and after. Of equal layers the first is shown."""
    parts = ["before", *_graph(view.nodes, view.modules)]
    if view.after:
        parts += ["", "after", *_graph(view.after, view.modules)]
    return "\n".join(parts) + "\n"


def _graph(nodes: tuple[NodeView, ...], tree: ModuleView) -> Iterator[str]:
    hidden = {path: module for module in repeated(tree) for path in module.same[1:]}
    for module, run in itertools.groupby(nodes, key=lambda node: _layer(node.module, hidden)):
        if module is None:
            yield from (f"  {_annotated(node)}" for node in run)
        else:
            yield f"  # {plural(len(list(run)), 'node')} of {folded(module.same[1:])}, the same as {module.same[0]}"


def _layer(path: str, hidden: dict[str, ModuleView]) -> ModuleView | None:
    """The folded module that a path lies in."""
    parts = path.split(".")
    return next((hidden[p] for i in range(len(parts)) if (p := ".".join(parts[: i + 1])) in hidden), None)


def _annotated(node: NodeView) -> str:
    if node.state.kind == "number" or node.op == "output":
        return node.line
    role = f"{node.role}; " if node.role else ""
    return f"{node.line}  # {role}{node.state.text}"
