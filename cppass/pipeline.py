"""The pass: find -> shard -> plan -> rewrite -> verify, on one FX graph. Everything else calls this."""

from __future__ import annotations

import dataclasses

from torch import fx

from cppass.config import CPConfig
from cppass.errors import Refusal
from cppass.match import find_sites
from cppass.plan import make_plan
from cppass.prepare import prepare
from cppass.report import LEFT_ALONE, REFUSED, REWRITTEN, Report, describe_gathers, describe_site, mask_notes
from cppass.rewrite import rewrite
from cppass.rules import shape_of
from cppass.shard import propagate, unify_sizes
from cppass.site import AttentionSite
from cppass.step import Step, step_of, too_short
from cppass.verify import verify


def rewrite_graph(gm: fx.GraphModule, config: CPConfig, cp_size: int) -> Report:
    """Rewrite a functional aten graph in place to canonical ops, or leave it as it is and say why.

    Only a report with status "rewritten" means that `gm` has changed.
    """
    graph = prepare(gm)
    found = find_sites(graph)
    base = Report(LEFT_ALONE, cp_size=cp_size, sites=tuple(describe_site(s) for s in found.sites))
    if found.sites:
        base = dataclasses.replace(base, tokens=_tokens_text(found.sites[0]))
    if cp_size == 1:
        return dataclasses.replace(base, reason="one rank: there is nothing to share")
    if not found.sites and not found.refusals:
        return dataclasses.replace(base, reason="no attention in this graph")
    if found.sites:
        reason = too_short(found.sites, cp_size, config.min_tokens)
        if reason:
            return dataclasses.replace(base, reason=reason)
    if found.sites:
        unify_sizes(graph, found.sites)
    step = step_of(found.sites, cp_size) if found.sites else None
    refusals = (*found.refusals, *([step] if isinstance(step, Refusal) else []))
    if refusals or not isinstance(step, Step):
        return dataclasses.replace(base, status=REFUSED, reason=refusals[0].why, refusals=refusals)

    reach = propagate(graph, found.sites)
    plan = make_plan(graph, found.sites, reach, step, config.strict)
    if plan.refusals:
        return dataclasses.replace(base, status=REFUSED, reason=plan.refusals[0].why, refusals=plan.refusals)
    notes = mask_notes(plan.sites, cp_size)
    notes += tuple(f"gathered {g.node.name}: {g.why}" for g in plan.gathered if not g.expected)
    report = dataclasses.replace(base, status=REWRITTEN, gathers=describe_gathers(plan), notes=notes)
    rewritten = rewrite(graph, plan)
    verify(rewritten, plan)
    gm.graph = rewritten
    gm.recompile()
    return report


def _tokens_text(site: AttentionSite) -> int | str:
    size = shape_of(site.query)[site.query_dim]
    return size if isinstance(size, int) else str(size)
