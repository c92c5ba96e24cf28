"""What is said once however often it occurs: equal sites, gathers and refusals of all layers together."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from cppass.errors import Refusal
from cppass.inspection.units import octets, plural
from cppass.inspection.views import Explanation, GraphView
from cppass.report import REFUSED, REWRITTEN, SiteReport

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sites:
    """Attention sites of one kind; `first` is the first in graph order."""

    count: int
    first: SiteReport
    modules: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Gathers:
    """Collectives for one reason. `octets`: of each one, None where symbolic."""

    count: int
    why: str
    octets: int | None
    formula: str
    nodes: tuple[str, ...]

    @property
    def total(self) -> int | None:
        return None if self.octets is None else self.count * self.octets


@dataclasses.dataclass(frozen=True)
class Refusals:
    """Refusals that say the same of several nodes."""

    count: int
    first: Refusal
    modules: tuple[str, ...]


def sites(view: GraphView) -> tuple[Sites, ...]:
    groups = _grouped(view.report.sites, lambda s: (s.form, s.rewrite, s.kv_write, s.mask, s.where))
    return tuple(Sites(len(g), g[0], tuple(s.module for s in g if s.module)) for g in groups)


def gathers(view: GraphView) -> tuple[Gathers, ...]:
    pairs = list(zip(view.report.gathers, view.gather_bytes, strict=True))
    groups = _grouped(pairs, lambda p: (_without_names(p[0].why), p[0].formula))
    return tuple(Gathers(len(g), _without_names(g[0][0].why), g[0][1], g[0][0].formula, g[0][0].nodes) for g in groups)


def refusals(view: GraphView) -> tuple[Refusals, ...]:
    groups = _grouped(view.report.refusals, lambda r: (r.code, _without_names(r.why), r.hint, r.where))
    return tuple(Refusals(len(g), g[0], tuple(r.module for r in g if r.module)) for g in groups)


def states(view: GraphView) -> dict[str, int]:
    """Nodes of the graph before by kind of state, the most frequent first."""
    return dict(collections.Counter(node.state.kind for node in view.nodes).most_common())


def received(view: GraphView) -> int | None:
    """Bytes a rank receives in the explained call; None where a size is not known."""
    known = [b for b in view.gather_bytes if b is not None]
    return sum(known) if len(known) == len(view.gather_bytes) else None


def verdict(explanation: Explanation) -> str:
    """The answer in a sentence."""
    view = explanation.graph_view
    found = plural(len(view.report.sites), "attention site")
    if explanation.status == REFUSED:
        times = plural(len(view.report.refusals), "refusal")
        return f'{times}; nothing is rewritten, and torch.compile(backend="npu_cp") raises an error that says so.'
    if explanation.status == REWRITTEN:
        share = plural(explanation.cp_size, "rank")
        each = octets(received(view))
        collectives = plural(explanation.collectives, "collective")
        return f"{share} share the tokens: {found}, {collectives} in a forward, {each} received per rank."
    return f"The graph stays as it is and runs whole on every rank: {explanation.reason}."


def size(explanation: Explanation) -> str:
    """ "8,192 tokens on 4 ranks"."""
    view = explanation.graph_view
    tokens = view.layout.tokens if view.layout else explanation.tokens
    ranks = plural(explanation.cp_size, "rank")
    if tokens is None:
        return ranks
    return f"{plural(tokens, 'token') if isinstance(tokens, int) else f'{tokens} tokens'} on {ranks}"


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _without_names(why: str) -> str:
    """Reasons differ by the node they name; layers do not."""
    return re.sub(r" \(node \w+\)", "", why)
