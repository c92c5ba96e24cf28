"""Dense caches, lengths in tensors, and tensor parallelism beside it: P ranks against one device."""

from __future__ import annotations

import importlib

import pytest
import torch
from npu.fused_snippets import MASK, Snippet, check, dense_cache, fused, lengths_in_tensors, rand, traced

import cppass


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize("input_layout", ["BSH", "BNSD"])
@pytest.mark.parametrize("write", ["scatter_update", "index_copy", "slice"])
def test_dense_caches(write: str, input_layout: str, lower: bool) -> None:
    check(dense_cache(write, input_layout), 2, lower)


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize(("lengths", "prefixes"), [([16], None), ([16, 8], [3, 0]), ([17, 13, 1], [0, 5, 9])])
def test_lengths_in_tensors(lengths: list[int], prefixes: list[int] | None, cp_size: int, lower: bool) -> None:
    importlib.import_module("lowering.cann_host.kernels.attention").register_air()
    check(lengths_in_tensors(lengths, prefixes), cp_size, lower)


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
def test_lengths_in_tensors_where_every_row_sees_every_key(lower: bool) -> None:
    """Sparse mode 0: a half's keys do not end where the half does."""
    importlib.import_module("lowering.cann_host.kernels.attention").register_air()
    check(lengths_in_tensors([17, 13, 1], [0, 5, 9], causal=False), 2, lower)


def tensor_parallel() -> Snippet:
    def run(x, w, wq, wk, wv, mask):  # type: ignore[no-untyped-def]
        summed = torch.ops._c10d_functional.all_reduce(x @ w, "sum", "tp")
        hidden = torch.ops._c10d_functional.wait_tensor(summed)
        q, k, v = (hidden @ p for p in (wq, wk, wv))
        return fused("v1", q, k, v, 4, 2, input_layout="BSH", atten_mask=mask, sparse_mode=3)[0]

    weights = [rand(32, n * 16, seed=n) / 6 for n in (2, 4, 2, 2)]
    return Snippet(run, (rand(1, 16, 32), *weights, MASK))


def test_an_all_reduce_over_other_ranks_stays() -> None:
    """Tensor parallelism: the sum over another group runs on this rank's rows."""
    snippet = tensor_parallel()
    gm = traced(snippet)
    assert cppass.run_pass(gm, snippet.inputs, cp_size=2).notes == ()
    sums = [n for n in gm.graph.nodes if n.target is torch.ops._c10d_functional.all_reduce.default]
    assert [list(n.meta["val"].shape) for n in sums] == [[1, 8, 32]]


def test_an_all_reduce_over_the_same_ranks_is_refused() -> None:
    """They hold different rows, which the sum would mix."""
    snippet = tensor_parallel()
    with pytest.raises(cppass.RefusedError, match=r"(?s)\[CP112\].*group 'tp' that is to share the sequence"):
        cppass.run_pass(traced(snippet), snippet.inputs, cp_size=2, group="tp")
