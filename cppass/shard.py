"""Two-value token propagation, first half: which nodes can have a Local value, and from which operands.

Backward from the sites, `_seeds` finds where tokens enter (token ids, embeddings, positions; q, k, v in a snippet;
hidden states after a graph break). Forward from there, `propagate` lists for every node the ways it can run on local
rows. Nothing is decided here: cppass/plan.py does that, from what is demanded.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from cppass.match import matcher_of
from cppass.match.kv import write_of
from cppass.op_rules import is_heavy, rule_of
from cppass.rules import Transfer, is_tensor, shape_of, tensor_operands
from cppass.site import AttentionSite, Rewrite
from cppass.tokens import Counts, Size, State, Tokens, size_of

WAIT = torch.ops._c10d_functional.wait_tensor.default
STATES_PER_NODE = 4  # ways kept per node; one is usual, two for score matrices


@dataclasses.dataclass(frozen=True)
class Propagation:
    """Which Local values are possible.

    Attributes:
        tokens: the token count S, an int or a sympy expression.
        ways: per node, the ways to compute it on local rows, the preferred first. Nodes without one run on Full values.
        seeds: states in which a node that has no way is worth sharding: where tokens enter.
        trunk: nodes whose value depends on a matrix product or a site: recomputing them on every rank is never cheap.
    """

    tokens: Size
    ways: dict[fx.Node, tuple[Transfer, ...]]
    seeds: dict[fx.Node, tuple[Tokens, ...]]
    trunk: frozenset[fx.Node]

    def way(self, node: fx.Node, state: State) -> Transfer | None:
        """The way that computes a node in a given state."""
        return next((t for t in self.ways.get(node, ()) if t.out == state), None)

    def plain_state(self, node: fx.Node) -> Tokens | None:
        """The preferred state from which a node's Full value can be gathered."""
        return next((t.out for t in self.ways.get(node, ()) if isinstance(t.out, Tokens) and t.out.plain), None)


def propagate(graph: fx.Graph, sites: tuple[AttentionSite, ...]) -> Propagation:
    tokens = shape_of(sites[0].query)[sites[0].query_dim]
    site_of = {site.node: site for site in sites if site.rewrite is not Rewrite.ROWWISE}
    seeds = _seeds(graph, sites, site_of, tokens)
    ways: dict[fx.Node, tuple[Transfer, ...]] = {}
    trunk: set[fx.Node] = set()
    for node in graph.nodes:
        if not is_tensor(node):
            continue
        operands = tensor_operands(node) if node.op == "call_function" else []
        if node in site_of:
            ways[node] = (_site_way(site_of[node], operands),)
        elif node.target is operator.getitem and (site := site_of.get(operands[0])) is not None:
            ways[node] = (_element_way(site, node.args[1]),)
        elif operands:
            ways[node] = _ways(node, operands, ways, seeds, tokens)
        carries = bool(ways.get(node)) or any(_states(x, ways, seeds) for x in operands)
        if node in site_of or (carries and is_heavy(node)) or any(x in trunk for x in operands):
            trunk.add(node)
    unreached = {node: states for node, states in seeds.items() if not ways.get(node)}
    return Propagation(tokens, {n: w for n, w in ways.items() if w}, unreached, frozenset(trunk))


def unify_sizes(graph: fx.Graph, sites: tuple[AttentionSite, ...]) -> None:
    """Symbolic sizes that carry tokens and are equal in this call become one symbol, guarded.

    A graph may hold the token count under several names: ids [s1], positions [s2] and slots [s3] come from different
    inputs, and ops such as rope do not compare them. One of them may be a number already, where an op takes the count
    as one (active_num of a routing). A later call in which they differ gets a graph of its own.
    """
    tokens = sites[0].query.meta["val"].shape[sites[0].query_dim]
    if isinstance(tokens, int) and not any(isinstance(n.meta.get("val"), torch.SymInt) for n in graph.nodes):
        return
    site_of = {site.node: site for site in sites if site.rewrite is not Rewrite.ROWWISE}
    seeds = _seeds(graph, sites, site_of, size_of(tokens))
    sizes = [node.meta["val"].shape[state.dim] for node, states in seeds.items() for state in states if state.bare]
    for site in sites:
        writes = [write_of(user) for node in site.writes for user in (node, *node.users)]
        sizes += [w.slots.meta["val"].shape[0] for w in writes if w is not None and w.slots is not None]
    for size in sizes:
        bool(size == tokens)


def _site_way(site: AttentionSite, operands: list[fx.Node]) -> Transfer:
    state = Tokens(site.query_dim)
    return Transfer(state, tuple(state if x is site.query else None for x in operands))


def _element_way(site: AttentionSite, element: object) -> Transfer:
    """Output and log-sum-exp of a site may carry their tokens in different dimensions."""
    lse = site.fused is not None and element == 1
    out = Tokens(site.fused.lse_dim if site.fused is not None and lse else site.query_dim)
    return Transfer(out, (Tokens(site.query_dim),))


def _states(
    node: fx.Node, ways: dict[fx.Node, tuple[Transfer, ...]], seeds: dict[fx.Node, tuple[Tokens, ...]]
) -> tuple[State, ...]:
    """The states a node can have, by a way or, where it has none, by sharding it."""
    possible = ways.get(node)
    return tuple(t.out for t in possible) if possible else seeds.get(node, ())


def _ways(
    node: fx.Node,
    operands: list[fx.Node],
    ways: dict[fx.Node, tuple[Transfer, ...]],
    seeds: dict[fx.Node, tuple[Tokens, ...]],
    tokens: Size,
) -> tuple[Transfer, ...]:
    rule = rule_of(node)
    found: list[Transfer] = []
    if rule is None:
        return ()
    for slot, operand in enumerate(operands):
        for state in _states(operand, ways, seeds):
            transfer = rule.forward(node, slot, state, tokens)
            if transfer is None or any(transfer.out == t.out for t in found):
                continue
            if all(_can_be(x, s, ways, seeds) for x, s in zip(operands, transfer.operands, strict=True)):
                found.append(transfer)
    return tuple(found[:STATES_PER_NODE])


def _can_be(
    node: fx.Node,
    state: State | None,
    ways: dict[fx.Node, tuple[Transfer, ...]],
    seeds: dict[fx.Node, tuple[Tokens, ...]],
) -> bool:
    """Full and plain states are always to be had, by gathering or sharding; the others only where they arise."""
    if state is None or (isinstance(state, Tokens) and state.plain):
        return True
    if isinstance(state, Counts):
        return state in _states(node, ways, seeds)
    return state in _states(node, ways, seeds) or numbers_rows(node, state)


def numbers_rows(node: fx.Node, state: State) -> bool:
    """arange(n) that numbers the rows of a local axis: Local, it is arange(local rows)."""
    return (
        str(node.target) == "aten.arange.default"
        and isinstance(state, Tokens)
        and state.points is not None
        and (state.points.outer, state.points.inner) == (state.outer, state.inner)
        and state.points.order == state.order
    )


def _backward(node: fx.Node, state: Tokens, tokens: Size) -> Transfer | None:
    rule = rule_of(node) if node.op == "call_function" else None
    if rule is None:
        return None
    source = node.args[0] if node.target in (operator.getitem, WAIT) else None
    if isinstance(source, fx.Node) and _is_opaque(source, state, tokens):
        return None
    return rule.backward(node, state, tokens)


def _is_opaque(source: fx.Node, state: Tokens, tokens: Size) -> bool:
    """A tuple, or a collective under way, whose op cannot carry this state: nothing may read it before its wait."""
    rule = rule_of(source)
    return matcher_of(source) is None and (rule is None or rule.backward(source, state, tokens) is None)


def _seeds(
    graph: fx.Graph, sites: tuple[AttentionSite, ...], site_of: dict[fx.Node, AttentionSite], tokens: Size
) -> dict[fx.Node, tuple[Tokens, ...]]:
    """Walk back from what the sites want, to the nodes where the walk ends: tokens enter there."""
    wanted: dict[fx.Node, list[Tokens]] = {}

    def want(node: fx.Node, state: Tokens) -> None:
        states = wanted.setdefault(node, [])
        if state not in states:
            states.append(state)

    for site in sites:
        want(site.query, Tokens(site.query_dim))
        if site.rewrite is not Rewrite.ROWWISE:
            for fresh in (site.key_fresh, site.value_fresh):
                if shape_of(fresh.source)[fresh.dim] == tokens:
                    want(fresh.source, Tokens(fresh.dim))
            if site.mask is not None and (state := site.mask_state) is not None:
                want(site.mask, state)

    seeds: dict[fx.Node, tuple[Tokens, ...]] = {}
    for node in reversed(graph.nodes):
        for state in wanted.get(node, ()):
            transfer = None if node in site_of else _backward(node, state, tokens)
            if node in site_of:
                want(site_of[node].query, state)
            elif transfer is None and isinstance(node.meta["val"], (tuple, list)):
                pass  # tokens cannot enter at a tuple, but at its elements
            elif transfer is None:
                seeds[node] = (*seeds.get(node, ()), state)
            else:
                for operand, operand_state in zip(tensor_operands(node), transfer.operands, strict=True):
                    if isinstance(operand_state, Tokens):
                        want(operand, operand_state)
    return seeds
