"""The pass: find -> shard -> plan -> rewrite -> verify, on one FX graph. Everything else calls this."""

from __future__ import annotations

import dataclasses

from torch import fx

from cppass.config import CPConfig
from cppass.errors import Refusal
from cppass.explain_node import refuse
from cppass.match import find_sites
from cppass.plan import make_plan
from cppass.prepare import prepare
from cppass.report import LEFT_ALONE, REFUSED, REWRITTEN, Report, describe_gathers, describe_site, mask_notes
from cppass.rewrite import rewrite
from cppass.rules import shape_of
from cppass.shard import propagate
from cppass.site import AttentionSite
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
        reason = _too_short(found.sites, config, cp_size)
        if reason:
            return dataclasses.replace(base, reason=reason)
    refusals = (*found.refusals, *_one_token_count(found.sites))
    if refusals:
        return dataclasses.replace(base, status=REFUSED, reason=refusals[0].why, refusals=refusals)

    reach = propagate(graph, found.sites)
    plan = make_plan(graph, found.sites, reach, cp_size, config.strict)
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


def _too_short(sites: tuple[AttentionSite, ...], config: CPConfig, cp_size: int) -> str:
    """Comparing a SymInt installs the guard that keeps long and short steps in graphs of their own."""
    least = max(2 * cp_size, config.min_tokens)
    for site in sites:
        tokens = site.query.meta["val"].shape[site.query_dim]
        if bool(tokens >= least):
            return ""
    why = "min_tokens" if config.min_tokens > 2 * cp_size else "2 * cp_size"
    return f"{sites[0].query.meta['val'].shape[sites[0].query_dim]} tokens, fewer than {why} = {least}"


def _one_token_count(sites: tuple[AttentionSite, ...]) -> tuple[Refusal, ...]:
    """All sites of a graph share one token count: cross-attention and encoders with their own are not supported."""
    counts = {shape_of(s.query)[s.query_dim]: s for s in sites}
    if len(counts) < 2:
        return ()
    (first, _), (second, other) = list(counts.items())[:2]
    return (
        refuse(
            "CP105",
            other.node,
            f"attention over {second} query rows in a graph that also has attention over {first}",
            "compile the two parts on their own",
        ),
    )
