"""TORCH_LOGS and TORCH_TRACE: what the pass says of a graph while it works.

TORCH_LOGS="cppass"            a report for every graph
TORCH_LOGS="+cppass"           also its sites, the plan, and the graph before, rewritten and lowered
TORCH_LOGS="+cppass.match"     the sites alone; "+cppass.plan" the plan, "+cppass.rewrite" the graphs
TORCH_TRACE=/tmp/trace         the same as artifacts, which tlparse shows beside those of Dynamo and AOT

Loggers carry the names of modules: torch reads TORCH_LOGS while it is imported, and then knows modules that exist, but
no artifact name that would be registered later. Text is made only where somebody listens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from cppass.torch_private import trace_artifact

REPORTS = logging.getLogger("cppass.report")
SITES = logging.getLogger("cppass.match")
PLANS = logging.getLogger("cppass.plan")
GRAPHS = logging.getLogger("cppass.rewrite")


def log_sites(graph: fx.Graph, sites: Sequence[Any], refusals: Sequence[Any]) -> None:
    """The graph as the pass reads it, and what was found in it (SiteReports and Refusals)."""
    if not sites and not refusals:
        return
    log_graph("before", graph)
    _log(SITES, "sites", lambda: "\n".join(map(str, [*sites, *refusals])))
    trace_artifact("cppass_sites", "json", lambda: [dataclasses.asdict(x) for x in (*sites, *refusals)])


def log_plan(plan: Any) -> None:
    _log(PLANS, "plan", lambda: str(plan))
    trace_artifact("cppass_plan", "string", lambda: str(plan))


def log_graph(stage: str, graph: fx.Graph) -> None:
    """A graph "before" the pass, "rewritten" to canonical ops, or "lowered" to what this rank runs."""
    _log(GRAPHS, f"graph {stage}", lambda: _code(graph))
    trace_artifact(f"cppass_graph_{stage}", "string", lambda: _code(graph))


def log_report(report: Any) -> None:
    if REPORTS.isEnabledFor(logging.INFO):
        REPORTS.info("%s", report)
    trace_artifact("cppass_report", "json", lambda: dataclasses.asdict(report))


def _log(logger: logging.Logger, what: str, text: Callable[[], str]) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s\n%s", what, text())


def _code(graph: fx.Graph) -> str:
    """Python, with shapes and the user's lines."""
    return graph.python_code("self", verbose=True, include_stride=True, include_device=True).src.strip()
