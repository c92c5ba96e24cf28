"""The pass: find -> shard -> plan -> rewrite -> verify, on one FX graph. Everything else calls this."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from cppass.collector import collector_paused
from cppass.config import CPConfig
from cppass.cost.hardware import HARDWARE, Hardware
from cppass.errors import Refusal
from cppass.explain_node import op_of, refuse
from cppass.gate import break_even
from cppass.logs import log_graph, log_plan, log_sites
from cppass.match import find_sites, outside_notes
from cppass.plan import CPPlan, make_plan
from cppass.prepare import prepare
from cppass.replicated import replicated, replicated_refusals
from cppass.report import (
    LEFT_ALONE,
    REFUSED,
    REWRITTEN,
    Report,
    describe_gathers,
    describe_sharded,
    describe_site,
    mask_notes,
)
from cppass.rewrite import rewrite
from cppass.rules import name_of, shape_of
from cppass.shard import Propagation, propagate, unify_sizes
from cppass.sharded_inputs import entering_inputs
from cppass.sharded_plan import ShardedPlan, make_sharded_plan
from cppass.sharded_rewrite import rewrite_sharded
from cppass.sharded_verify import verify_sharded
from cppass.site import AttentionSite
from cppass.step import Step, step_of, too_short
from cppass.target import target_of
from cppass.tokens import Tokens
from cppass.torch_private import ranks_of_group
from cppass.verify import verify


@dataclasses.dataclass(frozen=True)
class Stages:
    """What the stages gave for one graph, as far as they went.

    Attributes:
        report: what happened, and why.
        before: the graph as the pass reads it: modules inlined, duplicates merged.
        sites: the attention that was found in it.
        plan: how each value of it is made; None where planning was not reached.
        after: the rewritten graph; None where there is none.
    """

    report: Report
    before: fx.Graph
    sites: tuple[AttentionSite, ...] = ()
    plan: CPPlan | ShardedPlan | None = None
    after: fx.Graph | None = None


def rewrite_graph(
    gm: fx.GraphModule,
    config: CPConfig,
    cp_size: int,
    group_name: str = "",
    input_names: Mapping[str, str] | None = None,
) -> Report:
    """Rewrite a functional aten graph in place to canonical ops, or leave it as it is and say why.

    Args:
        group_name: of the ranks that share the sequence; collectives of the graph over these are refused.
        input_names: what the model calls the inputs that are tensors, by placeholder; their targets if left out.

    Only a report with status "rewritten" means that `gm` has changed.
    """
    stages = run_stages(gm, config, cp_size, group_name, input_names)
    if stages.after is not None:
        gm.graph = stages.after
    return stages.report


@collector_paused()
def run_stages(
    gm: fx.GraphModule,
    config: CPConfig,
    cp_size: int,
    group_name: str = "",
    input_names: Mapping[str, str] | None = None,
    every_refusal: bool = False,
) -> Stages:
    """The same without changing `gm`, and what each stage gave.

    Args:
        every_refusal: go on to planning after a refusal, to find the others.
    """
    if config.inputs == "sharded":
        return _run_sharded(gm, config, cp_size, group_name, input_names)
    graph = prepare(gm)
    found = find_sites(graph)
    base = Report(LEFT_ALONE, cp_size=cp_size, sites=tuple(describe_site(s) for s in found.sites))
    log_sites(graph, base.sites, found.refusals)
    if found.sites:
        base = dataclasses.replace(base, tokens=_tokens_text(found.sites[0]))
    if cp_size == 1:
        return Stages(dataclasses.replace(base, reason="one rank: there is nothing to share"), graph, found.sites)
    if not found.sites and not found.refusals:
        notes = outside_notes(graph)
        return Stages(dataclasses.replace(base, reason="no attention in this graph", notes=notes), graph)
    if found.sites:
        reason = too_short(found.sites, cp_size, 0 if config.min_tokens == "auto" else int(config.min_tokens))
        if reason:
            return Stages(dataclasses.replace(base, reason=reason), graph, found.sites)
        unify_sizes(graph, found.sites)
    step = step_of(found.sites, cp_size) if found.sites else None
    refusals = (*found.refusals, *([step] if isinstance(step, Refusal) else []), *_collectives(graph, group_name))
    if not isinstance(step, Step) or (refusals and not every_refusal):
        return Stages(_refused(base, refusals), graph, found.sites)

    reach = propagate(graph, found.sites)
    if config.min_tokens == "auto" and not refusals:
        reason = _does_not_pay(gm, graph, found.sites, reach, cp_size, config)
        if reason:
            return Stages(dataclasses.replace(base, reason=reason), graph, found.sites)
    plan = make_plan(graph, found.sites, reach, step, config.strict)
    log_plan(plan)
    whole = replicated(reach)
    refused = (*plan.refusals, *(replicated_refusals(whole) if config.strict else ()))
    refusals += tuple(r for r in refused if not _said_before(r, refusals))
    if refusals:
        return Stages(_refused(base, refusals), graph, found.sites, plan)
    notes = mask_notes(plan.sites, cp_size)
    notes += tuple(f"gathered {g.node.name}: {g.why}" for g in plan.gathered if not g.expected)
    notes += tuple(map(str, whole))
    report = dataclasses.replace(base, status=REWRITTEN, gathers=describe_gathers(plan), notes=notes)
    rewritten = rewrite(graph, plan)
    if _tokens_text(found.sites[0]) != base.tokens:  # an op on local rows took the count as a number: start from that
        return run_stages(gm, config, cp_size, group_name, input_names, every_refusal)
    log_graph("rewritten", rewritten)
    verify(rewritten, plan)
    return Stages(report, graph, found.sites, plan, rewritten)


def _refused(base: Report, refusals: tuple[Refusal, ...]) -> Report:
    return dataclasses.replace(base, status=REFUSED, reason=refusals[0].why, refusals=refusals)


def _said_before(refusal: Refusal, earlier: tuple[Refusal, ...]) -> bool:
    """A node that was refused before, or a product (CP201) in the module of refused attention: that attention again."""
    again = {r.module for r in earlier} if refusal.code == "CP201" else set()
    return refusal.module in again or any(r.node == refusal.node for r in earlier)


def _does_not_pay(
    gm: fx.GraphModule,
    graph: fx.Graph,
    sites: tuple[AttentionSite, ...],
    reach: Propagation,
    cp_size: int,
    config: CPConfig,
) -> str:
    """Why the cost model says that one device is faster, "" where it is not. The comparison is a guard."""
    hardware = hardware_of(gm, config)
    least = break_even(graph, sites, reach, cp_size, hardware)
    if least is None:
        return f"{cp_size} ranks are predicted to be slower than one device at any length on {hardware.name}"
    short = too_short(sites, cp_size, least)
    return short and f"{short}, the break-even predicted for {hardware.name}"


def hardware_of(gm: fx.GraphModule, config: CPConfig) -> Hardware:
    """The device that the cost model is asked about: the config's, or what suits the graph's target."""
    hardware = config.hardware
    if isinstance(hardware, Hardware):
        return hardware
    return HARDWARE[hardware or ("ascend-910b" if target_of(gm, config)[0] == "npu" else "host-core")]


def _run_sharded(
    gm: fx.GraphModule, config: CPConfig, cp_size: int, group_name: str, input_names: Mapping[str, str] | None
) -> Stages:
    """The same for a graph whose token-wise inputs arrive as local rows."""
    graph = prepare(gm)
    found = find_sites(graph)
    base = Report(LEFT_ALONE, cp_size=cp_size, sites=tuple(describe_site(s) for s in found.sites))
    log_sites(graph, base.sites, found.refusals)
    entering = entering_inputs(graph, config.sharded_inputs, input_names)
    refusals = (*found.refusals, *_collectives(graph, group_name), *_unnamed(found.sites, entering, config))
    if refusals:
        return Stages(_refused(base, refusals), graph, found.sites)
    if cp_size == 1 or not entering:
        reason = "one rank: there is nothing to share" if cp_size == 1 else "no sharded input in this graph"
        return Stages(dataclasses.replace(base, reason=reason), graph, found.sites)
    plan = make_sharded_plan(graph, found.sites, entering, cp_size, config.remainder or "balanced")
    log_plan(plan)
    if plan.refusals:
        return Stages(_refused(base, plan.refusals), graph, found.sites, plan)
    if not plan.sites:
        reason = "no attention in this graph, and every op of it is row by row"
        return Stages(dataclasses.replace(base, reason=reason), graph)
    rewritten = rewrite_sharded(graph, plan)
    log_graph("rewritten", rewritten)
    verify_sharded(rewritten, plan)
    tokens = f"{plan.rows} local rows"
    report = dataclasses.replace(base, status=REWRITTEN, tokens=tokens, gathers=describe_sharded(plan))
    return Stages(report, graph, found.sites, plan, rewritten)


def _unnamed(
    sites: tuple[AttentionSite, ...], entering: Mapping[fx.Node, Tokens], config: CPConfig
) -> tuple[Refusal, ...]:
    """Attention in a graph that none of the named inputs enters: it would attend over local rows only."""
    if not sites or entering:
        return ()
    names = ", ".join(name for name, _ in config.sharded_inputs)
    why = f"this graph has attention, but none of the sharded inputs ({names}) among its inputs"
    return (refuse("CP312", sites[0].node, why, "name the inputs as the model's forward does, in sharded_inputs"),)


def _shares(collective: fx.Node, group_name: str) -> bool:
    """Whether a collective has more than one rank in common with a group; by name where the groups do not exist."""
    names = [x for x in (*collective.args, *collective.kwargs.values()) if isinstance(x, str)]
    if not names or name_of(collective).startswith("_c10d_functional::wait_tensor"):
        return False
    ours, theirs = ranks_of_group(group_name), ranks_of_group(names[-1])
    return names[-1] == group_name if ours is None or theirs is None else len(ours & theirs) > 1


def _tokens_text(site: AttentionSite) -> int | str:
    size = shape_of(site.query)[site.query_dim]
    return size if isinstance(size, int) else str(size)


def _collectives(graph: fx.Graph, group_name: str) -> tuple[Refusal, ...]:
    """Collectives of the model over ranks that share the sequence: they would combine different rows."""
    own = [n for n in graph.nodes if name_of(n).startswith("_c10d_functional::") and _shares(n, group_name)]
    return tuple(
        refuse(
            "CP112",
            node,
            f"{op_of(node)} runs over ranks of the group {group_name!r} that is to share the sequence: they hold "
            "different rows",
            "pass the group of context parallelism, such as options={'group': mesh['cp']}",
        )
        for node in own
    )
