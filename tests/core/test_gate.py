"""min_tokens="auto": what a graph's shapes say about its work, and the graphs that are left alone for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass.cost import HARDWARE, Hardware, break_even_tokens
from cppass.errors import OptionError
from cppass.gate import work_of
from cppass.match import find_sites
from cppass.prepare import prepare
from cppass.shard import propagate

B, F, D = 2, 16, 8
SHAPES = ((F, 4 * D), (F, 2 * D), (F, 2 * D), (4 * D, F))
SLOW_LINK = dataclasses.replace(HARDWARE["host-core"], name="slow link", link_bandwidth=1e3, peer_bandwidth=1e3)


def model(x_BSF, wq, wk, wv, wo):  # type: ignore[no-untyped-def]
    q, k, v = ((x_BSF @ w).unflatten(2, (-1, D)).transpose(1, 2) for w in (wq, wk, wv))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) @ wo


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    return (torch.ones(B, tokens, F), *(torch.ones(*shape) for shape in SHAPES))


def status(tokens: int, hardware: Hardware | str | None = None) -> cppass.Report:
    gm = make_fx(model, tracing_mode="fake")(*inputs(tokens))
    return cppass.run_pass(gm, inputs(tokens), cp_size=2, min_tokens="auto", hardware=hardware)


def expected_work() -> tuple[int, int, int, int]:
    """FLOPs of a token, FLOPs of a pair, bytes of a token's K and V, bytes of weights: by hand."""
    weights = sum(a * b for a, b in SHAPES)
    return 2 * B * weights, B * 4 * (D + D) * 2, B * 2 * 2 * D * 4, 4 * weights


def test_work_of_a_graph() -> None:
    graph = prepare(make_fx(model, tracing_mode="fake")(*inputs(24)))
    sites = find_sites(graph).sites
    assert dataclasses.astuple(work_of(graph, sites, propagate(graph, sites))) == expected_work()


def test_break_even_divides_left_alone_from_rewritten() -> None:
    flops, pair, row, weights = expected_work()
    least = break_even_tokens(flops, pair, row, 1, 2, HARDWARE["host-core"], weight_bytes=weights)
    assert least > 4
    assert status(least).status == "rewritten"
    short = status(least - 4)
    assert short.status == "left alone"
    assert f"fewer than min_tokens = {least}, the break-even predicted for host-core" in short.reason


@pytest.mark.parametrize(("off", "expected"), [(0, "rewritten"), (-1, "left alone")])
def test_symbolic_lengths_are_compared(off: int, expected: str) -> None:
    flops, pair, row, weights = expected_work()
    least = break_even_tokens(flops, pair, row, 1, 2, HARDWARE["host-core"], weight_bytes=weights)
    given = inputs(least + off)
    torch._dynamo.mark_dynamic(given[0], 1)
    report = cppass.explain(model, *given, cp_size=2, options={"min_tokens": "auto"})
    assert report.status == expected


def test_a_faster_link_moves_it() -> None:
    """Control: the threshold is the hardware's."""
    flops, pair, row, weights = expected_work()
    least = break_even_tokens(flops, pair, row, 1, 2, HARDWARE["host-core"], weight_bytes=weights)
    fast = dataclasses.replace(HARDWARE["host-core"], latency=0.0, launch=0.0, link_bandwidth=1e12, peer_bandwidth=1e12)
    assert status(least - 4, fast).status == "rewritten"


def test_where_nothing_pays() -> None:
    gm_inputs = inputs(24)
    only = dataclasses.replace(SLOW_LINK, attention_efficiency=1e12)  # no pair is worth a byte
    gm = make_fx(model, tracing_mode="fake")(*gm_inputs)
    report = cppass.run_pass(gm, gm_inputs, cp_size=2, min_tokens="auto", hardware=only)
    assert report.status == "left alone"
    assert "2 ranks" in report.reason or "fewer than min_tokens" in report.reason


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"min_tokens": "auto", "hardware": "abacus"}, "one of ascend-910b"),
        ({"hardware": "ascend-910b"}, "for min_tokens='auto' alone"),
        ({"min_tokens": "often"}, "an int of 0 or more"),
        ({"min_tokens": "auto", "inputs": "sharded", "sharded_inputs": {"x": 0}}, "attend over local rows only"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        cppass.CPConfig(cp_size=2, **options)  # type: ignore[arg-type]
