"""attention_calls=1: both halves in one call over 2 x sequences, the block table twice.

The op counts the pages of all its sequences against the cache, so the cache needs room for those of both halves.
"""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from npu.fused_snippets import MASK, WRITES, Snippet, as_tuple, dense, paged, rand, traced

import cppass
from cppass.errors import Unsupported
from lowering.npu import attention

SNIPPETS: dict[str, Snippet] = {
    "one sequence": paged([16]),
    "version 1": paged([16, 8], version="v1"),
    "prefix, fragmented": paged([24, 13, 1], [64, 130, 5], spare=2),
    "primes": paged([17, 13, 11, 7, 5]),
    "window": paged([40, 21], [30, 0], sparse_mode=4, pre_tokens=9, next_tokens=0),
    "sink": paged([16, 13], learnable_sink=rand(4)),
    "log-sum-exp": paged([16, 13], [7, 0], lse=True),
    "scatter_pa": paged([16, 8], write=WRITES["scatter_pa"]),
}


def differs(snippet: Snippet, cp_size: int) -> float:
    """Largest error of any rank against one device."""
    expected = as_tuple(snippet.run(*(x.clone() for x in snippet.inputs)))
    config = cppass.CPConfig(cp_size=cp_size, attention_calls=1)
    ranks = cppass.simulate(snippet.run, snippet.inputs, cp_size, config)
    pairs = [(a, b) for seen, _ in ranks for a, b in zip(as_tuple(seen), expected, strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("name", SNIPPETS)
def test_ranks_equal_one_device(name: str, cp_size: int) -> None:
    assert differs(SNIPPETS[name], cp_size) < 1e-5


def test_a_table_in_wrong_order_is_seen() -> None:
    """Control: next blocks that look up the pages of other sequences."""

    def one_call(emit: Any, rows: Any, halves: Any) -> Any:
        call, given = right(emit, rows, halves)
        return call, given | {"block_table": emit(torch.ops.aten.flip.default, given["block_table"], [0])}

    right = attention.one_call
    with unittest.mock.patch.object(attention, "one_call", one_call):
        assert differs(SNIPPETS["prefix, fragmented"], 2) > 1e-2


@pytest.mark.parametrize(("calls", "expected"), [(1, 1), (2, 2)])
def test_calls_in_the_graph(calls: int, expected: int) -> None:
    gm = traced(SNIPPETS["prefix, fragmented"])
    cppass.run_pass(gm, SNIPPETS["prefix, fragmented"].inputs, cp_size=2, attention_calls=calls)
    assert sum("fused_infer_attention" in str(n.target) for n in gm.graph.nodes) == expected


def test_dense_keys_are_refused() -> None:
    snippet = dense("BSH", 2, 16, sparse_mode=3, atten_mask=MASK)
    with pytest.raises(Unsupported, match=r"CP508.*paged cache in TND"):
        cppass.run_pass(traced(snippet), snippet.inputs, cp_size=2, attention_calls=1)


def test_the_host_target_refuses() -> None:
    q, k = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8)

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    with pytest.raises(Unsupported, match="CP508"):
        cppass.run_pass(traced(Snippet(attend, (q, k))), (q, k), cp_size=2, attention_calls=1)
