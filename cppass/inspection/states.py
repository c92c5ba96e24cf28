"""Where the rows of every node are: from a plan for the graph before, typed from its ops for the graph after."""

from __future__ import annotations

import dataclasses

from torch import fx

from cppass import sharded_verify, verify
from cppass.inspection.views import NodeState
from cppass.plan import CPPlan, Full, Local
from cppass.rules import is_tensor
from cppass.sharded_plan import ShardedPlan
from cppass.tokens import Counts, State, Tokens

KINDS = {
    "local": "each rank has its own rows",
    "full": "the same on every rank",
    "gathered": "local rows that are gathered: every rank ends with all of them",
    "sharded": "the same on every rank, and each rank cuts its rows out of it",
    "fetched": "a few rows, fetched from the ranks that own them",
    "number": "a size or another number",
    "unused": "not needed any more",
    "unknown": "not decided: the graph was refused before",
}
"""Kinds of state, and what they mean. docs/explain.md and the page show these texts."""

FULL = NodeState("full", "full")
NUMBER = NodeState("number", "number")
UNUSED = NodeState("unused", "not needed")
UNKNOWN = NodeState("unknown", "not decided")


def before(graph: fx.Graph, plan: CPPlan | ShardedPlan | None, refused: bool) -> dict[fx.Node, NodeState]:
    """The state that each node of a prepared graph will have; a graph that is left alone is full everywhere."""
    if isinstance(plan, CPPlan):
        return {node: _planned(node, plan) for node in graph.nodes}
    if isinstance(plan, ShardedPlan):
        return {node: _arriving(node, plan) for node in graph.nodes}
    if refused:
        return {node: UNKNOWN if is_tensor(node) else NUMBER for node in graph.nodes}
    return {node: FULL if is_tensor(node) or node.op == "output" else NUMBER for node in graph.nodes}


def after(graph: fx.Graph, plan: CPPlan | ShardedPlan) -> dict[fx.Node, NodeState]:
    """The state of each node of a rewritten graph, as the verifier types it."""
    states = verify.states_of(graph, plan) if isinstance(plan, CPPlan) else sharded_verify.states_of(graph, plan)
    return {node: _typed(node, states.get(node)) for node in graph.nodes}


def _planned(node: fx.Node, plan: CPPlan) -> NodeState:
    if node.op == "output":
        return FULL
    if not is_tensor(node):
        return NUMBER
    full, local = plan.full.get(node), plan.local.get(node, {})
    if full in (Full.ROWS, Full.LOOKUP):
        return NodeState("fetched", "a few rows, fetched")
    if full is Full.GATHER:
        gathered = plan.gather_states[node].dim
        return NodeState("gathered", f"local in dim {gathered}, gathered", gathered)
    if full is not None and any(how is Local.SHARD for how in local.values()):
        dim = next(_dim(state) for state, how in local.items() if how is Local.SHARD)
        return NodeState("sharded", f"full, cut in dim {dim}", dim)
    if full is not None and not local:
        return FULL
    if local:
        found = _local(next(iter(local)))
        return found if full is None else dataclasses.replace(found, text=f"{found.text}, and full")
    return UNUSED


def _arriving(node: fx.Node, plan: ShardedPlan) -> NodeState:
    """A value of a graph whose inputs arrive as local rows; what comes after a refusal is not decided."""
    state = plan.states.get(node)
    if state is None:
        undecided = UNKNOWN if plan.refusals and node.op != "placeholder" else FULL
        return undecided if is_tensor(node) or node.op == "output" else NUMBER
    if any(node in group for group in plan.groups):
        return NodeState("gathered", f"local in dim {_dim(state)}, gathered", _dim(state))
    return _local(state)


def _typed(node: fx.Node, state: State | None) -> NodeState:
    if state is not None:
        if isinstance(state, Tokens) and state.order == verify.GATHERED:
            return NodeState("full", "full, rank after rank", state.dim)
        return _local(state)
    return FULL if is_tensor(node) or node.op == "output" else NUMBER


def _local(state: State) -> NodeState:
    if isinstance(state, Counts):
        return NodeState("local", "local counts of sorted rows")
    extra = ", sorted" if state.order else ""
    extra += ", row numbers" if state.points is not None else ""
    return NodeState("local", f"local in dim {state.dim}{extra}", state.dim)


def _dim(state: State) -> int | None:
    return state.dim if isinstance(state, Tokens) else None
