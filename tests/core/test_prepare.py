"""prepare: modules inlined, shape-only operands dropped, equal nodes merged; the graph computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.snippets import causal, rand
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.graph_text import graph_text
from cppass.prepare import prepare

aten = torch.ops.aten


def prepared(function: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    return prepare(make_fx(function, tracing_mode="fake")(*inputs))


def run(graph: fx.Graph, *inputs: Tensor) -> Any:
    return fx.GraphModule({}, graph)(*inputs)


def count(graph: fx.Graph, op: Any) -> int:
    return sum(n.target is op for n in graph.nodes)


def test_shape_only_operands_are_dropped() -> None:
    def shapes(x: Tensor) -> Tensor:
        return x.new_zeros(3) + x.new_ones(3) * 2 + x.new_full((3,), 4.0)

    graph = prepared(shapes, rand(5).double())
    assert_expected_inline(
        graph_text(graph),
        """\
zeros[3] = aten.zeros([3], dtype=torch.float64)
ones[3] = aten.ones([3], dtype=torch.float64)
mul[3] = aten.mul.Tensor(ones, 2)
add[3] = aten.add.Tensor(zeros, mul)
full[3] = aten.full([3], 4.0, dtype=torch.float64)
add_1[3] = aten.add.Tensor(add, full)
return add_1
""",
    )
    assert torch.equal(run(graph, rand(5).double()), torch.full((3,), 6.0, dtype=torch.float64))


def test_equal_nodes_are_merged() -> None:
    """Two layers that make the same mask."""

    def masks(n: Tensor) -> Tensor:
        return sum(torch.where(torch.arange(4) <= n, 0.0, float("-inf")).exp() * i for i in (1, 2))

    graph = prepared(masks, torch.tensor(2))
    assert_expected_inline(
        graph_text(graph),
        """\
arange[4] = aten.arange(4)
le[4] = aten.le.Tensor(arange, n_1)
scalar_tensor[] = aten.scalar_tensor(-inf, dtype=torch.float32)
scalar_tensor_1[] = aten.scalar_tensor(0.0, dtype=torch.float32)
where[4] = aten.where.self(le, scalar_tensor_1, scalar_tensor)
exp[4] = aten.exp(where)
mul[4] = aten.mul.Tensor(exp, 1)
add[4] = aten.add.Tensor(mul, 0)
mul_1[4] = aten.mul.Tensor(exp, 2)
add_1[4] = aten.add.Tensor(add, mul_1)
return add_1
""",
    )
    assert torch.equal(run(graph, torch.tensor(2)), masks(torch.tensor(2)))


APART: dict[str, tuple[Callable[[Tensor], Any], Any, int]] = {
    "random": (lambda x: torch.rand_like(x) - torch.rand_like(x), aten.rand_like.default, 2),
    "True is not 1": (lambda x: (x.clamp(min=1) * True) + x.clamp(min=True) * 1, aten.mul.Tensor, 2),
    "other operands": (lambda x: x.exp() + (x + 1).exp(), aten.exp.default, 2),
    "other dims": (lambda x: x.sum(0) + x.sum(1), aten.sum.dim_IntList, 2),
    "outputs": (lambda x: (x.exp(), x.exp()), aten.exp.default, 2),
    "other dtypes": (lambda x: x.to(torch.float16).double() + x.to(torch.bfloat16).double(), aten._to_copy.default, 4),
}


@pytest.mark.parametrize(("function", "op", "expected"), APART.values(), ids=APART.keys())
def test_what_stays_apart(function: Callable[[Tensor], Any], op: Any, expected: int) -> None:
    assert count(prepared(function, rand(4, 4)), op) == expected


def test_outputs_do_not_come_to_share_memory() -> None:
    """Two copies behind two views: writing into one output must not change the other."""

    def copies(q: Tensor) -> tuple[Tensor, Tensor]:
        return q.clone().view(-1), q.clone().view(-1)

    one, other = run(prepared(copies, rand(4)), rand(4))
    one += 1
    assert torch.equal(other, rand(4))


def test_zeros_of_both_signs_stay_apart() -> None:
    def signs(x: Tensor) -> Tensor:
        return torch.copysign(x, torch.full((4,), 0.0)) - torch.copysign(x, torch.full((4,), -0.0))

    assert torch.equal(run(prepared(signs, torch.ones(4)), torch.ones(4)), signs(torch.ones(4)))


def test_the_module_keeps_its_graph() -> None:
    gm = make_fx(lambda x: x.exp() + x.exp() + x.new_ones(4), tracing_mode="fake")(rand(4))
    before = graph_text(gm.graph)
    prepare(gm)
    assert graph_text(gm.graph) == before


# -- writes in the middle of a graph ---------------------------------------------------------------------------------


def copy_in_the_middle(described: bool) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """kc is read, overwritten by copy_, and read again: aten, but not functional."""
    graph = fx.Graph()
    q, k, v, kc = (graph.placeholder(name) for name in ("q", "k", "v", "kc"))
    before = graph.call_function(aten.mul.Tensor, (kc, 2))
    graph.call_function(aten.copy_.default, (kc, k))
    after = graph.call_function(aten.mul.Tensor, (kc, 2))
    query = graph.call_function(aten.add.Tensor, (q, before))
    value = graph.call_function(aten.add.Tensor, (v, after))
    graph.output(graph.call_function(aten.scaled_dot_product_attention.default, (query, k, value, None, 0.0, True)))
    gm = fx.GraphModule({}, graph)
    inputs = tuple(rand(1, 2, 8, 4) * i for i in (1, 2, 3, 4))
    if described:
        with torch._subclasses.FakeTensorMode() as mode:
            _Describe(gm).run(*(mode.from_tensor(x) for x in inputs))
    return gm, inputs


class _Describe(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


@pytest.mark.parametrize("described", [True, False], ids=["with metadata", "without"])
def test_a_copy_in_the_middle_is_not_taken_for_the_epilogue(described: bool) -> None:
    gm, inputs = copy_in_the_middle(described)
    own = [x.clone() for x in inputs]
    plain = gm(*own)
    for seen, after in cppass.simulate(gm, inputs, 2):
        torch.testing.assert_close(seen, plain, rtol=1e-5, atol=1e-5)
        assert torch.equal(after[3], own[3])


def test_nested_attributes_follow() -> None:
    """Buffers of an inlined module are found under the outer one."""
    inner = make_fx(lambda q, k, v: causal(q * torch.arange(8.0), k, v), tracing_mode="real")(*[rand(1, 2, 8, 8)] * 3)
    graph = fx.Graph()
    placeholders = [graph.placeholder(name) for name in "qkv"]
    graph.output(graph.call_module("inner", tuple(placeholders)))
    gm = fx.GraphModule({"inner": inner}, graph)
    inputs = (rand(1, 2, 8, 8), rand(1, 2, 8, 8) + 1, rand(1, 2, 8, 8) - 1)
    for seen, _ in cppass.simulate(gm, inputs, 2):
        torch.testing.assert_close(seen, gm(*inputs), rtol=1e-5, atol=1e-5)
