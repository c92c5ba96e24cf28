"""Collectives start early and are waited for late: the order of the lowered graph, and the same bits."""

from __future__ import annotations

import pytest
import torch
from core import toy_transformer as toy
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass.rules import name_of
from cppass.schedule import overlap

STARTED, ARRIVED = "_c10d_functional::all_gather_into_tensor", "_c10d_functional::wait_tensor"


def attend(x_BSF, wq, wk, wv):  # type: ignore[no-untyped-def]
    """A layer as models write it: queries first."""
    q, k, v = ((x_BSF @ w).unflatten(2, (-1, 8)).transpose(1, 2) for w in (wq, wk, wv))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return x_BSF + out.transpose(1, 2).flatten(2) @ wq.t()


def model(x_BSF, *weights):  # type: ignore[no-untyped-def]
    for _ in range(LAYERS):
        x_BSF = attend(x_BSF, *weights)
    return x_BSF


LAYERS = 2
INPUTS = tuple(
    torch.randn(*s, generator=torch.Generator().manual_seed(0)) for s in ((1, 16, 16), (16, 32), (16, 16), (16, 16))
)


def lowered(**options: bool) -> fx.Graph:
    gm = make_fx(model, tracing_mode="fake")(*INPUTS)
    cppass.run_pass(gm, INPUTS, cp_size=2, **options)
    return gm.graph


def under_way(graph: fx.Graph) -> list[list[str]]:
    """Per collective, the ops between its start and its wait."""
    names = [name_of(n) for n in graph.nodes]
    starts = [i for i, name in enumerate(names) if name == STARTED]
    return [names[i + 1 : names.index(ARRIVED, i)] for i in starts]


def test_queries_are_made_while_keys_and_values_travel() -> None:
    *layers, _ = under_way(lowered())
    assert len(layers) == LAYERS
    assert all(ops.count("aten::mm") == 1 for ops in layers)


def test_without_overlap_nothing_is() -> None:
    """Control: the option leaves the order as it is written."""
    assert under_way(lowered(overlap=False)) == [[]] * (LAYERS + 1)


def test_the_same_ops_and_collectives_in_the_same_order() -> None:
    one, two = lowered(), lowered(overlap=False)
    assert sorted(name_of(n) for n in one.nodes) == sorted(name_of(n) for n in two.nodes)
    collectives = [[n.name for n in g.nodes if name_of(n).startswith("_c10d_")] for g in (one, two)]
    assert collectives[0] == collectives[1]


def test_the_same_bits() -> None:
    one, two = (
        cppass.simulate(toy.traced(16), toy.inputs(16), 2, cppass.CPConfig(cp_size=2, overlap=o)) for o in (True, False)
    )
    for (seen, after), (other, other_after) in zip(one, two, strict=True):
        assert torch.equal(seen, other)
        assert all(torch.equal(a, b) for a, b in zip(after, other_after, strict=True))


def gather(x: torch.Tensor) -> torch.Tensor:
    return torch.ops._c10d_functional.all_gather_into_tensor(x, 2, "group")


def wait(x: torch.Tensor) -> torch.Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def reordered(function: object, *inputs: torch.Tensor) -> list[str]:
    gm = make_fx(function, tracing_mode="fake")(*inputs)  # type: ignore[arg-type]
    overlap(gm.graph)
    gm.graph.lint()
    names = [name_of(n).split("::")[1].split(".")[0] for n in gm.graph.nodes if n.op == "call_function"]
    return [n for n in names if n != "detach"]


X = torch.ones(4, 4)


def test_what_the_next_collective_needs_goes_under_this_one() -> None:
    def run(x):  # type: ignore[no-untyped-def]
        first = wait(gather(x.sin()))
        second = wait(gather(x.cos()))
        return first.sum() + second.sum()

    order = [
        "sin",
        "all_gather_into_tensor",
        "cos",
        "all_gather_into_tensor",
        "wait_tensor",
        "sum",
        "wait_tensor",
        "sum",
        "add",
    ]
    assert reordered(run, X) == order


def test_nothing_moves_over_a_write() -> None:
    """exp reads what add_ wrote; sin read what it has not."""

    def run(x, y):  # type: ignore[no-untyped-def]
        a = x.sin()
        arrived = wait(gather(y))
        x.add_(1)
        return arrived.sum() + x.exp().sum() + a.sum()

    seen = reordered(run, X, X)
    assert seen.index("sin") < seen.index("add_") < seen.index("exp")
    assert seen.index("all_gather_into_tensor") < seen.index("add_")


def test_random_numbers_are_drawn_in_order() -> None:
    """The second one is for the collective, and stays the second."""

    def run(x):  # type: ignore[no-untyped-def]
        first, second = torch.rand_like(x), torch.randn_like(x)
        return wait(gather(second)).sum() + first.sum()

    assert reordered(run, X)[:2] == ["rand_like", "randn_like"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_graph_without_collectives_stays(count: int) -> None:
    assert reordered(lambda x: x.sin().cos() * count, X) == ["sin", "cos", "mul"]
