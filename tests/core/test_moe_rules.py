"""States between a local sort and its inverse: what each op of an expert layer carries, and what must not meet it.

Shape suffixes: S tokens, K experts per token, E experts, F hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.snippets import rand
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from cppass.op_rules import rule_of
from cppass.rules import tensor_operands
from cppass.tokens import Counts, Points, State, Tokens

S, K, E, F = 10, 2, 4, 16
aten = torch.ops.aten


def experts(x: Tensor, picked: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(picked.reshape(-1))
    rows = x[order // K]
    ends = torch.cumsum(torch.histc(values.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)
    y = torch._grouped_mm(rows, up, offs=ends) * 2
    back = aten.index_put(torch.empty_like(order), [order], torch.arange(S * K))
    return y[back].view(S, K, -1).sum(1), rows.sum(0)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return rand(S, F).bfloat16(), torch.arange(S * K).reshape(S, K) * 7 % E, rand(E, F, 8).bfloat16()


def traced(function: Callable[..., Any], *given: Any) -> fx.Graph:
    return make_fx(function, tracing_mode="fake")(*given).graph


def carried(graph: fx.Graph, enters: dict[str, Tokens]) -> dict[fx.Node, State]:
    """Follow the rules from where tokens enter: the first operand that has a state decides."""
    states: dict[fx.Node, State] = {n: enters[n.name] for n in graph.nodes if n.name in enters}
    for node in graph.nodes:
        rule = rule_of(node) if node.op == "call_function" else None
        for slot, operand in enumerate(tensor_operands(node) if rule else ()):
            transfer = rule.forward(node, slot, states[operand], S) if rule and operand in states else None
            if transfer is not None:
                states.setdefault(node, transfer.out)
    return states


def test_what_every_op_of_an_expert_layer_carries() -> None:
    graph = traced(experts, *inputs())
    states = carried(graph, {"x_1": Tokens(0), "picked_1": Tokens(0)})
    lines = [f"{node.name}: {states.get(node, 'Full')}" for node in graph.nodes if node.op == "call_function"]
    assert_expected_inline(
        "\n".join(lines),
        """\
view: Local(dim 0 = tokens * 2)
sort: Local(dim 0 = tokens * 2, sorted by sort, row numbers)
getitem: Local(dim 0 = tokens * 2, sorted by sort)
getitem_1: Local(dim 0 = tokens * 2, sorted by sort, row numbers)
floor_divide: Local(dim 0 = tokens * 2, sorted by sort, row numbers)
index: Local(dim 0 = tokens * 2, sorted by sort)
_to_copy: Local(dim 0 = tokens * 2, sorted by sort)
histc: Local(counts of sort)
cumsum: Local(counts of sort)
_grouped_mm: Local(dim 0 = tokens * 2, sorted by sort)
mul: Local(dim 0 = tokens * 2, sorted by sort)
empty_like: Local(dim 0 = tokens * 2, sorted by sort)
arange: Full
index_put: Local(dim 0 = tokens * 2, row numbers)
index_1: Local(dim 0 = tokens * 2)
view_1: Local(dim 0 = tokens)
sum_1: Local(dim 0 = tokens)
sum_2: Full""",
    )


# -- single ops on such values -----------------------------------------------------------------------------------------

ORDER = Tokens(0, inner=K, order="sort", points=Points(inner=K))  # the permutation: row numbers of [S * K]
SORTED = Tokens(0, inner=K, order="sort")  # rows in the order of the sort
COUNTS = Counts("sort")


def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """The only call of a traced op; tensors among the arguments become placeholders."""
    tensors = [a for a in args if isinstance(a, Tensor)]

    def run(*given: Tensor) -> Any:
        rest = iter(given)
        return op(*(next(rest) if isinstance(a, Tensor) else a for a in args), **kwargs)

    return next(n for n in traced(run, *tensors).nodes if n.target is op)


def indexed(rows: int) -> fx.Node:
    return next(
        n
        for n in traced(lambda x, i: x[i], rand(rows, F), torch.zeros(S * K, dtype=torch.long)).nodes
        if n.target is aten.index.Tensor
    )


numbers = torch.zeros(S * K, dtype=torch.long)
ALLOWED: dict[str, tuple[fx.Node, int, State, State]] = {
    "K pairs are one token": (
        call(aten.floor_divide.default, numbers, K),
        0,
        ORDER,
        Tokens(0, inner=K, order="sort", points=Points()),
    ),
    "look up by pairs": (indexed(S * K), 1, ORDER, SORTED),
    "look up by tokens": (indexed(S), 1, Tokens(0, inner=K, order="sort", points=Points()), SORTED),
    "count": (call(aten.histc.default, numbers.float(), E, 0, 3), 0, SORTED, COUNTS),
    "add counts up": (call(aten.cumsum.default, torch.zeros(E), 0), 0, COUNTS, COUNTS),
    "clone row numbers": (call(aten.clone.default, numbers), 0, ORDER, ORDER),
    "view row numbers": (
        call(aten.view.default, numbers, [S, K]),
        0,
        ORDER,
        Tokens(0, order="sort", points=Points(inner=K)),
    ),
    "scale sorted rows": (call(aten.mul.Tensor, rand(S * K, F), 2.0), 0, SORTED, SORTED),
    "shape of row numbers": (call(aten.empty_like.default, numbers), 0, ORDER, SORTED),
}


@pytest.mark.parametrize(("node", "slot", "state", "out"), ALLOWED.values(), ids=ALLOWED.keys())
def test_what_may_meet_a_sort(node: fx.Node, slot: int, state: State, out: State) -> None:
    rule = rule_of(node)
    assert rule is not None
    transfer = rule.forward(node, slot, state, S)
    assert transfer is not None
    assert transfer.out == out
    assert transfer.operands[slot] == state


def scattered(values: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor] = torch.empty_like) -> fx.Node:
    graph = traced(lambda order: aten.index_put(target(order), [order], values(order)), numbers)
    return next(n for n in graph.nodes if n.target is aten.index_put.default)


def in_node(op: Any, state: State, *args: Any) -> tuple[fx.Node, int, State]:
    return call(op, *args), 0, state


REFUSED: dict[str, tuple[fx.Node, int, State]] = {
    "row numbers are no amounts": in_node(aten.add.Tensor, ORDER, numbers, 1),
    "nor are they compared": in_node(aten.lt.Tensor, ORDER, numbers, torch.tensor(5)),
    "nor converted": (call(aten._to_copy.default, numbers, dtype=torch.int32), 0, ORDER),
    "nor summed": in_node(aten.sum.dim_IntList, ORDER, numbers, [0]),
    "three experts per token": in_node(aten.floor_divide.default, ORDER, numbers, 3),
    "half a token": in_node(aten.floor_divide.default, ORDER, numbers, 2 * K),
    "division by row numbers": (call(aten.floor_divide.default, numbers + 1, numbers + 1), 1, ORDER),
    "a sort of a sort": in_node(aten.sort.default, SORTED, numbers),
    "a sort of row numbers": in_node(aten.sort.default, ORDER, numbers),
    "a table of another size": (indexed(S * K + 1), 1, ORDER),
    "row numbers of tokens in a table of pairs": (
        indexed(S * K),
        1,
        Tokens(0, inner=K, order="sort", points=Points()),
    ),
    "counts are no tokens": in_node(aten.mul.Tensor, COUNTS, torch.zeros(E), 2),
    "counts do not leave": in_node(aten.sum.dim_IntList, COUNTS, torch.zeros(E), [0]),
    "histc of row numbers": in_node(aten.histc.default, ORDER, numbers.float(), E, 0, 3),
    "histc of rows in natural order": in_node(aten.histc.default, Tokens(0), torch.zeros(S), E, 0, 3),
    "sorted rows are cut": in_node(aten.slice.Tensor, SORTED, rand(S * K, F), 0, 0, 5),
    "sorted rows are summed": in_node(aten.sum.dim_IntList, SORTED, rand(S * K, F), [0]),
    "sorted rows are added up": in_node(aten.cumsum.default, SORTED, rand(S * K, F), 0),
    "a scatter of other values": (scattered(lambda order: order * 2), 1, ORDER),
    "a scatter into something": (scattered(lambda order: torch.arange(S * K), lambda order: order + 1), 1, ORDER),
}


@pytest.mark.parametrize(("node", "slot", "state"), REFUSED.values(), ids=REFUSED.keys())
def test_what_must_not_meet_a_sort(node: fx.Node, slot: int, state: State) -> None:
    """They mean something on their own rank only; whatever else needs them is computed from gathered inputs."""
    rule = rule_of(node)
    assert rule is None or rule.forward(node, slot, state, S) is None


def test_grouped_rows_need_the_counts_of_their_own_sort() -> None:
    ends = torch.tensor([3, 5, 9, S * K]).int()
    node = call(aten._grouped_mm.default, rand(S * K, F).bfloat16(), rand(E, F, 8).bfloat16(), ends)
    rule = rule_of(node)
    assert rule is not None
    transfer = rule.forward(node, 0, SORTED, S)
    assert transfer is not None
    assert transfer.operands == (SORTED, None, Counts("sort"))
    assert rule.forward(node, 0, Tokens(0, inner=K), S) is None  # rows in natural order


def test_the_inverse_counts_rows_of_the_sort() -> None:
    """back[order] = arange: natural rows again, whose values are row numbers of the sorted axis."""
    node = scattered(lambda order: torch.arange(S * K))
    rule = rule_of(node)
    assert rule is not None
    transfer = rule.forward(node, 1, ORDER, S)
    assert transfer is not None
    assert transfer.out == Tokens(0, inner=K, points=Points(inner=K, order="sort"))


@pytest.mark.parametrize("start", [1, 5])
def test_an_inverse_that_does_not_count_from_zero_is_none(start: int) -> None:
    node = scattered(lambda order: torch.arange(start, start + S * K))
    rule = rule_of(node)
    assert rule is not None
    assert rule.forward(node, 1, ORDER, S) is None


@pytest.mark.parametrize("state", [ORDER, SORTED, COUNTS], ids=str)
def test_such_states_are_never_gathered(state: State) -> None:
    assert not state.plain
