"""Work that every rank does whole: where an op keeps tokens from entering a graph before it.

    h = fold(x @ w)          fold has no rule: x @ w and fold run whole on every rank
    attention(h @ wq, ...)   from here on each rank has its own rows

Nothing is wrong there and nothing has to travel, so no gather tells of it: it is reported here, and refused by
strict=True. Behind the first attention the same op is gathered for (cppass/plan.py).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import op_of, refuse
from cppass.op_rules import is_heavy, rule_of
from cppass.rules import is_tensor
from cppass.shard import Propagation


@dataclasses.dataclass(frozen=True)
class Replicated:
    """An op that tokens do not pass, and what it keeps whole.

    Attributes:
        node: its output is sharded (or an element of it); what it is made of is whole on every rank.
        products: matrix products before it that run whole.
    """

    node: fx.Node
    products: int

    @property
    def unknown(self) -> bool:
        return rule_of(self.node) is None

    def __str__(self) -> str:
        why = "has no rule" if self.unknown else "mixes tokens"
        products = f"{self.products} matrix product{'' if self.products == 1 else 's'}"
        before = f", with {products} before it" if self.products else ""
        return f"{op_of(self.node)} {why} (node {self.node.name}): it runs whole on every rank{before}"


def replicated(reach: Propagation) -> tuple[Replicated, ...]:
    """Where tokens enter behind work: ops without a rule, and any op behind a matrix product."""
    found = []
    for node in reach.seeds:
        if node.op != "call_function" or not _is_float(node):
            continue  # inputs; row numbers, masks, slots
        source = node.all_input_nodes[0] if node.target is operator.getitem else node
        before = list(_before(node, reach))
        each = Replicated(source, sum(is_heavy(x) for x in before if x is not node))
        of_floats = any(x.op == "placeholder" and _is_float(x) for x in before)
        if each.products or is_heavy(node) or (each.unknown and of_floats):
            found.append(each)
    return tuple({each.node: each for each in found}.values())


def replicated_refusals(found: tuple[Replicated, ...]) -> tuple[Refusal, ...]:
    """The same under strict=True."""
    return tuple(
        refuse(
            "CP202",
            each.node,
            f"{each}; strict=True refuses work that ranks do not share",
            ("register a rule for it (docs/extending.md); " if each.unknown else "")
            + "strict=False runs it so and reports it",
        )
        for each in found
    )


def _before(node: fx.Node, reach: Propagation) -> Iterator[fx.Node]:
    """What a node is made of, itself included, as far as no rank has rows of its own."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        yield current
        new = [x for x in current.all_input_nodes if x not in seen and is_tensor(x) and not reach.ways.get(x)]
        seen.update(new)
        waiting += new


def _is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())
