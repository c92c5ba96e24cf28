"""Overlap: a collective starts as soon as what it sends is there, and is waited for when what it brings is needed.

before:  q = rope(norm(mm(x, wq))); k = ..; v = ..; started = all_gather(k, v); kv = wait(started); attention(q, kv)
after:   k = ..; v = ..; started = all_gather(k, v); q = rope(norm(mm(x, wq))); kv = wait(started); attention(q, kv)

The same ops on the same operands: bitwise. Collectives keep their order, so ranks keep agreeing on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from cppass.rules import is_random, starts_collective, waits, writes


def overlap(graph: fx.Graph) -> None:
    """Reorder a lowered graph, in place. Nothing moves over an op that writes to its operands or has another effect."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    order = [n for part in _parts(nodes) for n in _overlapped(part)]
    if order != nodes:
        output = graph.output_node()
        for node in order:
            output.prepend(node)


def _parts(nodes: list[fx.Node]) -> Iterable[list[fx.Node]]:
    """Stretches without an effect in them, and each op with an effect alone."""
    part: list[fx.Node] = []
    for node in nodes:
        if not _has_effect(node):
            part.append(node)
            continue
        yield part
        yield [node]
        part = []
    yield part


def _has_effect(node: fx.Node) -> bool:
    """It writes, draws random numbers, or is there for what it does."""
    return writes(node) or is_random(node) or (not node.users and node.is_impure())


def _overlapped(part: list[fx.Node]) -> list[fx.Node]:
    """For each collective in turn: what it needs, first of that what does not wait for the ones before; then itself."""
    place = {node: i for i, node in enumerate(part)}
    left, order = set(part), list[fx.Node]()
    for goal in [*([n] for n in part if starts_collective(n)), part]:
        needed = sorted(_needed(goal, left), key=place.__getitem__)
        left.difference_update(needed)
        waiting: set[fx.Node] = set()
        for node in needed:
            if waits(node) or not waiting.isdisjoint(node.all_input_nodes):
                waiting.add(node)
        order += [n for n in needed if n not in waiting]
        order += _waits_last([n for n in needed if n in waiting])
    return order


def _waits_last(nodes: list[fx.Node]) -> list[fx.Node]:
    """Every wait in front of its first reader."""
    held = dict.fromkeys(n for n in nodes if waits(n))
    order: dict[fx.Node, None] = {}
    for node in nodes:
        if node not in held:
            order |= dict.fromkeys([*(x for x in node.all_input_nodes if x in held), node])
    return list(order | held)


def _needed(goals: list[fx.Node], left: set[fx.Node]) -> set[fx.Node]:
    """The goals and what they are computed from, as far as it is not placed yet."""
    found: set[fx.Node] = set()
    todo = [n for n in goals if n in left]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [x for x in node.all_input_nodes if x in left and x not in found]
    return found
