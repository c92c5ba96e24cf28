"""Sequence parallelism inside tensor parallelism: norms of T / 2 rows, reduce-scatter and all-gather over "tp".

A value that comes from a collective may be used behind its wait alone:

    before:  x = wait_tensor(all_gather_into_tensor(x_part, 2, "tp")); q, k, v = x @ w ...
    after:   x = cppass.shard(wait_tensor(all_gather_into_tensor(x_part, 2, "tp"))); q, k, v = x @ w ...
    not:     x = wait_tensor(cppass.shard(all_gather_into_tensor(x_part, 2, "tp")))     reads what may not be there yet
"""

from __future__ import annotations

import pytest
import torch
from composition.checks import same_as_one_device
from composition.parallel_ranks import Seen
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass

pytestmark = pytest.mark.timeout(700)  # the first test of the directory waits for all ranks

Results = dict[tuple[str, str], list[Seen]]

c10d = torch.ops._c10d_functional
aten = torch.ops.aten


def attention_on_gathered_rows(x_part: Tensor, w: Tensor, cache: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """x_part [8, 16]: half of 16 tokens; two heads of 8; keys are values."""
    x = c10d.wait_tensor(c10d.all_gather_into_tensor(x_part, 2, "tp"))
    q, k = ((x @ w * sign).view(16, 1, 2, 8).permute(1, 2, 0, 3) for sign in (1, -1))
    cache = aten.index_copy(cache, 2, positions, k)
    return torch.nn.functional.scaled_dot_product_attention(q, cache, cache, is_causal=True), cache


def used_before_its_wait(graph: fx.Graph) -> list[str]:
    started = [c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default, c10d.all_reduce.default]
    return [
        f"{node.name} by {user.name}"
        for node in graph.nodes
        for user in node.users
        if node.target in started and user.target is not c10d.wait_tensor.default
    ]


def test_a_collective_is_waited_for_before_its_rows_are_cut() -> None:
    inputs = torch.randn(8, 16), torch.randn(16, 16), torch.zeros(1, 2, 16, 8), torch.arange(16)
    gm = make_fx(attention_on_gathered_rows, tracing_mode="fake")(*inputs)
    report = cppass.run_pass(gm, inputs, cp_size=2, lower=False)
    assert report.status == "rewritten"
    assert used_before_its_wait(gm.graph) == []


def test_equal_to_one_device(seen: Results) -> None:
    """Right, but not cheap: collectives without a rule run on whole rows, gathered for them."""
    same_as_one_device(seen["sequence parallel", "replicated"])


def test_refused_with_sharded_inputs(seen: Results) -> None:
    for rank in seen["sequence parallel", "sharded"]:
        assert rank.failure.startswith("RefusedError: [CP310] _c10d_functional.reduce_scatter_tensor.default has no")
