"""Every form of fused-infer-attention that is a site: P ranks against one device, lowered and by the ops' meanings."""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from npu.fused_snippets import MASK, WRITES, Snippet, check, dense, npu, paged, rand, traced

import cppass
from cppass import halves

CAUSAL = {"sparse_mode": 3, "atten_mask": MASK}
SNIPPETS: dict[str, Snippet] = {
    "paged": paged([16]),
    "paged, version 1": paged([16, 8], version="v1"),
    "paged, prefix, fragmented": paged([24, 13, 1], [64, 130, 5]),
    "paged, primes": paged([17, 13, 11, 7, 5]),
    "paged, even": paged([16, 32], [3, 0]),
    "paged, one key head": paged([19], heads=8, groups=1),
    "paged, as many key heads": paged([16, 9], heads=4, groups=4),
    "paged, window": paged([40, 21], [30, 0], sparse_mode=4, pre_tokens=9, next_tokens=0),
    "paged, sink": paged([16, 13], learnable_sink=rand(4)),
    "paged, log-sum-exp": paged([16, 13], [7, 0], lse=True),
    "paged, scatter_pa": paged([16, 8], write=WRITES["scatter_pa"]),
    "paged, scatter_pa, uneven": paged([15, 8], write=WRITES["scatter_pa"]),
    "paged, index_put": paged([16, 8], write=WRITES["index_put"]),
    "fresh, write after": paged([16, 8], fresh=True),
    "fresh, uneven, write after": paged([15, 9, 1, 33], fresh=True, write=WRITES["scatter_pa"]),
    "fresh, one sequence": paged([37], fresh=True),
    "BSH causal": dense("BSH", 2, 16, **CAUSAL),
    "BSH everything": dense("BSH", 2, 21),
    "BSH, version 1": dense("BSH", 1, 21, version="v1", **CAUSAL),
    "BSND causal": dense("BSND", 2, 13, **CAUSAL),
    "BNSD causal": dense("BNSD", 2, 13, **CAUSAL),
    "BNSD top-left": dense("BNSD", 1, 16, sparse_mode=2, atten_mask=MASK),
    "BNSD window": dense("BNSD", 2, 24, sparse_mode=4, pre_tokens=5, next_tokens=0, atten_mask=MASK),
    "BSND lengths": dense("BSND", 2, 16, actual_seq_qlen=[16, 16], actual_seq_kvlen=[16, 16], **CAUSAL),
    "BNSD own mask": dense("BNSD", 2, 32, atten_mask=torch.ones(32, 32, dtype=torch.bool).triu(3)),
}


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("name", SNIPPETS)
def test_ranks_equal_one_device(name: str, cp_size: int, lower: bool) -> None:
    check(SNIPPETS[name], cp_size, lower)


def test_bfloat16() -> None:
    check(paged([32, 16], dtype=torch.bfloat16), 2, True, tolerance=2e-2)


# -- what is in the rewritten graph ------------------------------------------------------------------------------------


def lowered(snippet: Snippet, cp_size: int = 2) -> list[str]:
    gm = traced(snippet)
    cppass.run_pass(gm, snippet.inputs, cp_size=cp_size)
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", ["paged", "paged, even", "paged, scatter_pa", "fresh, write after", "BSH causal"])
def test_one_collective_and_two_calls_a_site(name: str) -> None:
    ops = lowered(SNIPPETS[name])
    assert sum("all_gather_into_tensor" in op for op in ops) == 2  # the site's, and the output's
    assert sum("fused_infer_attention_score" in op for op in ops) == 2


def test_rows_of_even_lengths_are_not_put_in_order() -> None:
    """hidden states in, slots in gathered order, output rows out: no other rows are looked up."""
    assert lowered(SNIPPETS["paged, even"]).count("aten.index_select.default") == 3
    assert lowered(SNIPPETS["paged, primes"]).count("aten.index_select.default") == 4  # K, V in natural order


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_named_feature_is_not_implemented() -> None:
    def run(x, w, pse):  # type: ignore[no-untyped-def]
        q = x @ w
        return npu.npu_fused_infer_attention_score(q, q, q, pse_shift=pse, num_heads=4, input_layout="BSH")[0]

    inputs = (rand(1, 16, 32), rand(32, 64), torch.zeros(1, 4, 16, 16))
    with pytest.raises(NotImplementedError, match=r"(?s)\[CP110\].*pse.*way out"):
        cppass.run_pass(traced(Snippet(run, inputs)), inputs, cp_size=2)


@pytest.mark.parametrize(
    ("snippet", "why"),
    [
        (dense("BNSD", 1, 16, sparse_mode=4, pre_tokens=5, next_tokens=2, atten_mask=MASK), "rows see later tokens"),
        (dense("BSND", 2, 7, sparse_mode=4, pre_tokens=5, next_tokens=0, atten_mask=MASK), "halves of one row"),
        (dense("BSND", 2, 7, atten_mask=torch.ones(7, 7, dtype=torch.bool).triu(2)), "halves of one row"),
        (paged([16], write=lambda kc, vc, s, k, v: _nz(kc, vc, s, k, v)), "NZ layout"),
    ],
    ids=["band into the future", "window over one row", "mask over one row", "NZ"],
)
def test_what_would_be_wrong_is_refused(snippet: Snippet, why: str) -> None:
    with pytest.raises(cppass.RefusedError, match=why):
        cppass.run_pass(traced(snippet), snippet.inputs, cp_size=2)


def _nz(kc: Any, vc: Any, slots: Any, k: Any, v: Any) -> Any:
    npu.npu_scatter_pa_kv_cache(k, v, kc, vc, slots)  # cache_mode "PA_NZ" is the default
    return kc, vc


# -- controls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paged, even", "fresh, one sequence", "BSND causal"])
def test_a_broken_layout_is_noticed(name: str) -> None:
    with (
        unittest.mock.patch("cppass.layout.owned_blocks", lambda rank, cp_size: (2 * rank, 2 * rank + 1)),
        pytest.raises(AssertionError, match="not close"),
    ):
        check(SNIPPETS[name], 2, True)


def test_keys_that_are_not_cut_are_noticed() -> None:
    with unittest.mock.patch.dict(halves.CAUSAL, clear=True), pytest.raises((AssertionError, RuntimeError)):
        check(SNIPPETS["paged, even"], 2, True)


def test_slots_that_are_not_permuted_are_noticed() -> None:
    def as_they_are(emit, rows, node, ranks):  # type: ignore[no-untyped-def]
        return emit(torch.ops.aten.clone.default, node.args[0])

    from lowering.npu.target import LOWERINGS

    with unittest.mock.patch.dict(LOWERINGS, {"gathered_order": as_they_are}), pytest.raises(AssertionError):
        check(SNIPPETS["paged, even"], 2, True)
