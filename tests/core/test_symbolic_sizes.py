"""One rewritten graph for every number of tokens: traced with symbolic sizes once, run with others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.snippets import SNIPPETS, Snippet
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

import cppass

aten = torch.ops.aten
FUNCTIONAL = [name for name, s in SNIPPETS.items() if not s.written and name != "experts"]


@functools.cache
def traced(name: str) -> fx.GraphModule:
    snippet = SNIPPETS[name]
    return make_fx(snippet.run, tracing_mode="symbolic")(*snippet.inputs(16))


def as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check(snippet: Snippet, gm: fx.GraphModule, tokens: int, cp_size: int, lower: bool) -> None:
    inputs = snippet.inputs(tokens)
    plain = as_list(snippet.run(*inputs))
    for seen, _ in cppass.simulate(gm, inputs, cp_size, lower=lower):
        torch.testing.assert_close(as_list(seen), plain, rtol=snippet.tolerance, atol=snippet.tolerance)


@pytest.mark.parametrize(("tokens", "cp_size", "lower"), [(13, 2, False), (37, 3, True)])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_other_numbers_of_tokens(name: str, tokens: int, cp_size: int, lower: bool) -> None:
    check(SNIPPETS[name], traced(name), tokens, cp_size, lower)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, D] -> [S, F], the sizes taken from values on the way."""
    out = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return out.reshape(out.shape[1], out.numel() // out.shape[1]) * 2


def rewritten(function: Callable[..., Any]) -> tuple[fx.Graph, cppass.Report]:
    inputs = SNIPPETS["causal"].inputs(16)
    gm = make_fx(function, tracing_mode="symbolic")(*inputs)
    report = cppass.run_pass(gm, inputs, cp_size=2, lower=False)
    return gm.graph, report


def test_the_token_count_is_a_node() -> None:
    graph, report = rewritten(SNIPPETS["causal"].run)
    gathers = [n for n in graph.nodes if n.target is torch.ops.cppass.gather.default]
    assert [n.args[3][0].target for n in gathers] == [aten.sym_size.int] * 2
    assert isinstance(report.tokens, str)
    assert report.received_bytes is None
    assert report.tokens in report.gathers[0].formula


def test_sizes_alone_do_not_travel() -> None:
    """numel() of a value takes its shape, no rows of it: one gather for K and V, one for the output."""
    graph, report = rewritten(merged)
    assert sum(n.target is torch.ops.cppass.gather.default for n in graph.nodes) == 2 == report.collectives


def test_a_size_that_turned_out_to_be_known() -> None:
    """An op that fits one size only makes it a number, in nodes that still call it a symbol."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return (out + torch.arange(16.0)[:, None]).flip(1)

    inputs = SNIPPETS["causal"].inputs(16)
    gm = make_fx(run, tracing_mode="symbolic")(*inputs)
    check(Snippet(run, lambda tokens: inputs), gm, 16, 2, True)


def test_arithmetic_on_sizes_that_turned_out_to_be_known() -> None:
    """numel() of a local value is a number by the time the graph is rewritten, and an operand of a division."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        flat = out.transpose(1, 2).reshape(out.shape[2] * 2, -1)
        return flat * (int(out.shape[1]) + int(out.shape[2]) + int(out.shape[3]))

    inputs = SNIPPETS["causal"].inputs(16)
    gm = make_fx(run, tracing_mode="symbolic")(*inputs)
    check(Snippet(run, lambda tokens: inputs), gm, 16, 2, True)


def test_a_size_beside_the_tokens_may_be_a_power() -> None:
    """As many heads as elements of a head are one symbol: [S, H * D] is [S, s * s]."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(-1) * 2

    inputs = tuple(torch.randn(1, 8, 16, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    gm = make_fx(run, tracing_mode="symbolic")(*inputs)
    check(Snippet(run, lambda tokens: inputs), gm, 16, 2, True)
