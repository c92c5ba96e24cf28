"""Values of calls: what is remembered equals what running the op shows, sizes, strides and shared memory."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cppass.shapes import Shapes
from cppass.tokens import size_of, sizes_of
from cppass.torch_private import fake_like, same_memory

aten = torch.ops.aten
MODE = FakeTensorMode(shape_env=ShapeEnv())


def fake(name: str, *sizes: int, dynamic: bool) -> torch.Tensor:
    from torch._dynamo.source import ConstantSource

    dims = [DimDynamic.DYNAMIC if dynamic and d == 0 else DimDynamic.STATIC for d in range(len(sizes))]
    context = StatelessSymbolicContext(dynamic_sizes=dims)
    return MODE.from_tensor(torch.empty(sizes), source=ConstantSource(name), symbolic_context=context)


CALLS: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "pointwise": lambda g, x: g.call_function(aten.add.Tensor, (x, 1.0)),
    "matmul": lambda g, x: g.call_function(aten.mm.default, (x, g.call_function(aten.t.default, (x,)))),
    "view": lambda g, x: g.call_function(aten.unsqueeze.default, (x, 1)),
    "transposed": lambda g, x: g.call_function(aten.transpose.int, (x, 0, 1)),
    "cut": lambda g, x: g.call_function(aten.slice.Tensor, (x, 1, 2, 6)),
    "several views": lambda g, x: g.call_function(aten.split.Tensor, (x, 4, 1)),
    "several results": lambda g, x: g.call_function(aten.topk.default, (x, 2)),
    "other dtype": lambda g, x: g.call_function(aten.view.dtype, (x, torch.int32)),
    "itself": lambda g, x: g.call_function(aten.add_.Tensor, (x, 1.0)),
}


def graph_of(x: torch.Tensor) -> tuple[fx.Graph, fx.Node]:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    return graph, node


def tensors(value: object) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]  # type: ignore[list-item]


def described(value: object, given: torch.Tensor) -> list[object]:
    return [
        (
            sizes_of(x.shape),
            [size_of(s) for s in x.stride()],
            size_of(x.storage_offset()),
            x.dtype,
            x.device,
            same_memory(x, given),
        )
        for x in tensors(value)
    ]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_second_time_is_as_the_first(name: str, dynamic: bool) -> None:
    graph, x = graph_of(fake("x", 16, 8, dynamic=dynamic))
    shapes = Shapes(graph)
    call = CALLS[name](graph, x)
    for operand in call.all_input_nodes:
        if operand is not x:
            operand.meta["val"] = shapes(operand.target, operand.args, {})  # type: ignore[arg-type]
    first = shapes(call.target, call.args, {})  # type: ignore[arg-type]
    second = shapes(call.target, call.args, {})  # type: ignore[arg-type]
    with MODE:
        args = fx.map_arg(call.args, lambda n: n.meta["val"])
        meant = call.target(*args)  # type: ignore[operator]
    assert described(second, x.meta["val"]) == described(first, x.meta["val"]) == described(meant, x.meta["val"])


def test_layers_are_not_run_again() -> None:
    graph, x = graph_of(fake("x", 16, 8, dynamic=False))
    shapes = Shapes(graph)
    ran: list[int] = []

    def op(x: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return x.sin()

    one, two = shapes(op, (x,), {}), shapes(op, (x,), {})
    assert len(ran) == 1
    assert not same_memory(one, two)


def test_memory_that_is_mixed_up_is_seen() -> None:
    """Control: a view in memory of its own is not what running the op shows."""
    graph, x = graph_of(fake("x", 16, 8, dynamic=False))
    shapes = Shapes(graph)
    with unittest.mock.patch("cppass.torch_private.fake_like", lambda like, of: fake_like(like, None)):
        values = [shapes(aten.unsqueeze.default, (x, 1), {}) for _ in range(2)]
    assert [same_memory(v, x.meta["val"]) for v in values] == [True, False]


def test_other_sizes_are_run() -> None:
    graph, x = graph_of(fake("x", 16, 8, dynamic=False))
    y = graph.placeholder("y")
    y.meta["val"] = fake("y", 4, 8, dynamic=False)
    shapes = Shapes(graph)
    assert [shapes(aten.sin.default, (n,), {}).shape[0] for n in (x, y)] == [16, 4]


def test_numbers_are_told_apart() -> None:
    """1, 1.0 and True are equal as keys; add of them is not."""
    graph, x = graph_of(MODE.from_tensor(torch.zeros(2, dtype=torch.int64)))
    shapes = Shapes(graph)
    assert [shapes(aten.mul.Tensor, (x, n), {}).dtype for n in (1, 1.0)] == [torch.int64, torch.float32]


@pytest.mark.parametrize(("op", "args"), [(aten.constant_pad_nd.default, ([2, 0],)), (aten.roll.default, ([1], [1]))])
def test_local_rows_stay_symbolic(op: Callable[..., torch.Tensor], args: tuple[object, ...]) -> None:
    """The C++ code of constant_pad_nd makes a number of every size that is more than a symbol."""
    graph, x = graph_of(fake("rows", 12, 8, dynamic=True))
    n = x.meta["val"].shape[0]
    x.meta["val"] = MODE.from_tensor(torch.empty(1, 8)).expand((n + 1) // 4 + (n + 3) // 4, 8)
    assert sizes_of(Shapes(graph)(op, (x, *args), {}).shape)[0] == size_of(x.meta["val"].shape[0])
