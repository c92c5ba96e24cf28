"""Report: what happened to one graph, and why. The registry keeps the report of every graph compiled so far."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque

from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import module_of, op_of, source_of
from cppass.logs import log_report
from cppass.match.kv import write_of
from cppass.plan import CPPlan, Full
from cppass.rules import shape_of
from cppass.sharded_plan import ShardedPlan
from cppass.site import AttentionSite
from cppass.tokens import Size, divide, product

REWRITTEN, LEFT_ALONE, REFUSED = "rewritten", "left alone", "refused"


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention site: the matched form, how it is rewritten, its KV write, mask, source line and module path."""

    name: str
    form: str
    rewrite: str
    kv_write: str
    mask: str
    where: str
    module: str = ""

    def __str__(self) -> str:
        place = f"\n  from {self.where}" if self.where else ""
        return f"{self.name}: {self.form}, {self.kv_write}, {self.mask}; {self.rewrite}{place}"


@dataclasses.dataclass(frozen=True)
class GatherReport:
    """One collective of the rewritten graph: what travels, why, and the bytes each rank receives (None: symbolic)."""

    nodes: tuple[str, ...]
    why: str
    received_bytes: int | None
    formula: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What happened to one graph.

    Attributes:
        status: "rewritten", "left alone" or "refused".
        reason: why it was left alone or refused; "" where it was rewritten.
        graph: Dynamo's compile id, such as "0/1"; "" outside torch.compile.
        cp_size: number of ranks.
        tokens: the token count, an int or the name of a symbol ("s27"); None where no site was found.
        sites: the attention sites found; all of them are rewritten, or none is.
        gathers: the collectives of one forward, in graph order.
        refusals: why the graph was refused.
        notes: what else there is to know (costly masks, fallbacks, the recompile limit).
    """

    status: str
    reason: str = ""
    graph: str = ""
    cp_size: int = 1
    tokens: int | str | None = None
    sites: tuple[SiteReport, ...] = ()
    gathers: tuple[GatherReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def collectives(self) -> int:
        """Collectives of one forward: one per site and one for the output, where nothing else had to travel."""
        return len(self.gathers) if self.status == REWRITTEN else 0

    @property
    def received_bytes(self) -> int | None:
        """Bytes each rank receives in one forward; None where sizes are symbolic."""
        if self.status != REWRITTEN:
            return 0
        sizes = [g.received_bytes for g in self.gathers]
        return None if None in sizes else sum(s for s in sizes if s is not None)

    @property
    def what(self) -> str:
        """Status, length and reason in one line, the same on every rank of a group that does the same."""
        tokens = "" if self.tokens is None else f", {self.tokens}" + (" tokens" if self.sites else "")
        return f"{self.status}{tokens}" + (f" ({self.reason})" if self.reason else "")

    @property
    def takes_part(self) -> bool:
        """Whether the ranks of the group have to agree on this graph: a prefill, and be it left alone."""
        return self.status == REWRITTEN or (bool(self.sites or self.refusals) and self.cp_size > 1 and self.tokens != 1)

    def __str__(self) -> str:
        head = f"graph {self.graph}: " if self.graph else ""
        lines = [f"{head}{self.status}" + (f": {self.reason}" if self.reason else "")]
        if self.sites:
            tokens = "" if self.tokens is None else f"{self.tokens} tokens, "
            lines.append(f"  {_plural(len(self.sites), 'attention site')}, {tokens}{_plural(self.cp_size, 'rank')}")
            for kind, count in _counted(self.sites).items():
                lines.append(f"    {count} x {kind}")
        if self.status == REWRITTEN:
            lines.append(f"  {_plural(self.collectives, 'collective')} in one forward")
            for gather in self.gathers:
                lines.append(f"    {', '.join(gather.nodes)}: {gather.why}, {gather.formula} bytes received")
        lines += [f"  {line}" for refusal in self.refusals for line in str(refusal).splitlines()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _counted(sites: tuple[SiteReport, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for site in sites:
        text = f"{site.form}, {site.kv_write}, {site.mask}; {site.rewrite}"
        counts[text] = counts.get(text, 0) + 1
    return counts


def describe_site(site: AttentionSite) -> SiteReport:
    write = site.key_fresh.form or _write_beside(site)
    if site.causal is not None:
        mask = "causal" + (f", window {site.causal.window}" if site.causal.window else "")
        mask += " on a filled cache" if site.causal.terms or site.causal.constant else ""
    else:
        mask = "no mask" if site.mask is None and site.scores is None else "its own mask, local rows of it"
    if site.fused is not None and site.fused.sparse_mode > 1:
        mask = f"sparse mode {site.fused.sparse_mode}"
    return SiteReport(
        site.name,
        site.form,
        site.rewrite.value,
        f"KV write {write}" if write else "no cache",
        mask,
        source_of(site.node),
        module_of(site.node),
    )


def _write_beside(site: AttentionSite) -> str:
    """The form of a write that comes after the attention, of the same rows; "" without one."""
    found = [write_of(reader) for user in site.key_fresh.source.users for reader in (user, *user.users)]
    return next((w.form for w in found if w is not None and w.rows is site.key_fresh.source and w.form != "cat"), "")


def describe_gathers(plan: CPPlan) -> tuple[GatherReport, ...]:
    """Every collective of the rewritten graph and the bytes a rank receives in it: rows * bytes of a row * (P - 1)."""
    rows = plan.step.layout.local_rows
    found = []
    for group in plan.groups:
        found.append(_gather(plan, tuple(n for n, _ in group), "K and V of a site", rows))
    for gathered in plan.gathered:
        found.append(_gather(plan, (gathered.node,), gathered.why, rows))
    for node, how in plan.full.items():
        if how is Full.ROWS:
            count = plan.selections[node].count
            row = divide(_bytes(node), count)
            found.append(_describe(plan, (node,), f"{count} selected rows", count, row))
        elif how is Full.LOOKUP:
            rows_named = shape_of(plan.lookups[node].index)[0]
            found.append(
                _describe(plan, (node,), f"{rows_named} rows by index", rows_named, divide(_bytes(node), rows_named))
            )
    return tuple(found)


def describe_sharded(plan: ShardedPlan) -> tuple[GatherReport, ...]:
    """The same of a graph whose inputs arrive sharded."""
    found = []
    for group in plan.groups:
        row: Size = 0
        for node in group:
            row = row + (divide(_bytes(node), shape_of(node)[0]) or 0)
        found.append(_received(plan.cp_size, group, "K and V of a site", plan.rows, row))
    for node, rows in plan.lookups.items():
        count = shape_of(rows.index)[0]
        row = divide(_bytes(node), count) or 0
        found.append(_received(plan.cp_size, (node,), f"{count} rows by index", count, row))
    return tuple(found)


def _gather(plan: CPPlan, nodes: tuple[fx.Node, ...], why: str, rows: Size) -> GatherReport:
    row: Size = 0
    for node in nodes:
        row = row + (divide(_bytes(node), plan.step.layout.tokens) or 0)
    return _describe(plan, nodes, why, rows, row)


def _describe(plan: CPPlan, nodes: tuple[fx.Node, ...], why: str, rows: Size, row: Size | None) -> GatherReport:
    return _received(plan.step.layout.cp_size, nodes, why, rows, row or 0)


def _received(cp_size: int, nodes: tuple[fx.Node, ...], why: str, rows: Size, row: Size) -> GatherReport:
    received = rows * row * (cp_size - 1)
    known = received if isinstance(received, int) else None
    return GatherReport(tuple(n.name for n in nodes), why, known, str(received))


def _bytes(node: fx.Node) -> Size:
    return product(shape_of(node)) * node.meta["val"].dtype.itemsize


def mask_notes(sites: tuple[AttentionSite, ...], cp_size: int) -> tuple[str, ...]:
    """What masks that are not plainly causal cost."""
    notes: dict[fx.Node, str] = {}
    for site in sites:
        if site.mask is not None and site.causal is None and site.fused is None:
            shape = shape_of(site.mask)
            rows = f"{shape[-2]}/{cp_size}" if shape[-2] != 1 else "1"
            notes[site.mask] = (
                f"the mask {op_of(site.mask)} {site.mask.name} {list(shape)} is not plainly causal: each rank builds "
                f"{rows} rows of {shape[-1]} and attends over every key"
            )
    return tuple(notes.values())


# -- the reports of this process --------------------------------------------------------------------------------------

_KEPT = 1000
_reports: deque[Report] = deque(maxlen=_KEPT)
_lock = threading.Lock()


def record(report: Report) -> None:
    with _lock:
        _reports.append(report)
    log_report(report)


def reports() -> tuple[Report, ...]:
    """The report of every graph compiled so far in this process, oldest first (the last 1000)."""
    with _lock:
        return tuple(_reports)


def last_report() -> Report | None:
    """The report of the last graph that was rewritten; None where none was."""
    return next((r for r in reversed(reports()) if r.status == REWRITTEN), None)


def clear_reports() -> None:
    with _lock:
        _reports.clear()
