"""Cache writes beside fused-infer-attention: every rank ends with the caches of one device, to the bit.

Keys and values that are inputs, not products, so that nothing but the write and the gather touches their bits.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
from npu.fused_snippets import BLOCK, MASK, WRITES, D, Snippet, as_tuple, check, fused, npu, paged, rand
from torch import Tensor

import cppass

HEADS, G, CAPACITY = 4, 2, 48
TOKEN_DIM = {"BSH": 1, "BSND": 1, "BNSD": 2}
EACH = pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Many tiny calls: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- paged caches ------------------------------------------------------------------------------------------------------


def flat(kc: Tensor, vc: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """npu_scatter_nd_update_ on a cache whose blocks and rows are one axis."""
    for cache, rows in ((kc.flatten(0, 1), k), (vc.flatten(0, 1), v)):
        npu.npu_scatter_nd_update_(cache, slots.unsqueeze(1), rows)
    return kc, vc


def index_copy(kc: Tensor, vc: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    for cache, rows in ((kc, k), (vc, v)):
        cache.view(-1, *rows.shape[1:]).index_copy_(0, slots.long(), rows)
    return kc, vc


def slice_assignment(kc: Tensor, vc: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    for cache, rows in ((kc, k), (vc, v)):
        cache.view(-1, *rows.shape[1:])[: rows.shape[0]] = rows
    return kc, vc


PAGED = {**WRITES, "flat nd_update": flat, "index_copy": index_copy}


@pytest.mark.parametrize("fresh", [False, True], ids=["write first", "write after"])
@pytest.mark.parametrize("lengths", [[16, 8], [15, 9, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize("write", PAGED.values(), ids=PAGED.keys())
def test_paged(write: Callable[..., Any], lengths: list[int], fresh: bool) -> None:
    check(paged(lengths, write=write, fresh=fresh), 2, lower=True)


@pytest.mark.parametrize("name", ["flat nd_update", "index_copy"])
def test_paged_by_meaning(name: str) -> None:
    check(paged([15, 9, 1], write=PAGED[name]), 2, lower=False)


@EACH
@pytest.mark.parametrize("tokens", [16, 13])
def test_slice_of_a_flat_cache_after_attention(tokens: int, lower: bool) -> None:
    check(paged([tokens], write=slice_assignment, fresh=True), 4, lower)


# -- dense caches ------------------------------------------------------------------------------------------------------


def dense_cache(input_layout: str, how: str, batch: int, rows: int, prefix: int) -> Snippet:
    """Rows written behind `prefix` rows of a cache; attention reads the whole cache by its lengths."""
    dim = TOKEN_DIM[input_layout]

    def write(cache: Tensor, x: Tensor, at: Tensor) -> None:
        if how == "scatter_update":
            npu.scatter_update_(cache, at, x, -2)
        elif how == "index_copy":
            cache.index_copy_(dim, torch.arange(rows) + prefix, x)
        elif how == "index_put":
            cache[(*[slice(None)] * dim, torch.arange(rows) + prefix)] = x
        else:
            cache.narrow(dim, prefix, rows).copy_(x)

    def run(x, wq, k, v, kc, vc, at, mask):  # type: ignore[no-untyped-def]
        q = x @ wq
        if input_layout != "BSH":
            q = q.view(batch, rows, HEADS, D)
        if input_layout == "BNSD":
            q = q.transpose(1, 2).contiguous()
        write(kc, k, at)
        write(vc, v, at)
        lengths = {"actual_seq_kvlen": [prefix + rows] * batch, "sparse_mode": 3, "atten_mask": mask}
        return fused("v1", q, kc, vc, HEADS, G, input_layout=input_layout, **lengths)[0]

    def shape(n: int) -> tuple[int, ...]:
        return {"BSH": (batch, n, G * D), "BSND": (batch, n, G, D), "BNSD": (batch, G, n, D)}[input_layout]

    fresh = [rand(*shape(rows), seed=s) for s in (1, 2)]
    caches = [rand(*shape(CAPACITY), seed=s) for s in (3, 4)]
    at = torch.full((batch,), prefix)
    return Snippet(run, (rand(batch, rows, 32), rand(32, HEADS * D) / 32**0.5, *fresh, *caches, at, MASK), (4, 5))


DENSE = [
    *(("BSH", how) for how in ("scatter_update", "index_copy", "index_put", "slice")),
    ("BSND", "index_put"),
    ("BSND", "slice"),
    *(("BNSD", how) for how in ("scatter_update", "index_copy", "slice")),
]


@EACH
@pytest.mark.parametrize(("input_layout", "how"), DENSE)
def test_dense(input_layout: str, how: str, lower: bool) -> None:
    check(dense_cache(input_layout, how, batch=2, rows=13, prefix=7), 2, lower)


# -- quantised rows ----------------------------------------------------------------------------------------------------


def quantised(lengths: list[int], write_first: bool) -> Snippet:
    """int8 rows and their scales are written; attention reads the fresh rows."""
    ends = torch.tensor(lengths).cumsum(0).tolist()

    def run(x, wq, k, v, kc, vc, k_scales, v_scales, slots, mask):  # type: ignore[no-untyped-def]
        def write() -> None:
            for cache, scales, rows in ((kc, k_scales, k), (vc, v_scales, v)):
                small, factors = npu.npu_dynamic_quant(rows)
                npu.npu_scatter_nd_update_(cache, slots.view(-1, 1), small)
                npu.npu_scatter_nd_update_(scales, slots.view(-1, 1), factors)

        if write_first:
            write()
        causal = {"input_layout": "TND", "sparse_mode": 3, "atten_mask": mask}
        q = (x @ wq).view(-1, HEADS, D)
        out = fused("v2", q, k, v, HEADS, G, actual_seq_qlen=ends, actual_seq_kvlen=ends, **causal)[0]
        if not write_first:
            write()
        return out

    tokens = ends[-1]
    slots = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(0))[:tokens].int()
    fresh = [rand(tokens, G, D, seed=s) for s in (1, 2)]
    caches = [torch.zeros(BLOCK, G, D, dtype=torch.int8) for _ in "kv"]
    scales = [torch.zeros(BLOCK, G) for _ in "kv"]
    weight = rand(32, HEADS * D) / 32**0.5
    return Snippet(run, (rand(tokens, 32), weight, *fresh, *caches, *scales, slots, MASK), (4, 5, 6, 7))


@EACH
@pytest.mark.parametrize("write_first", [True, False], ids=["write first", "write after"])
@pytest.mark.parametrize("lengths", [[16, 8], [15, 9, 1]], ids=["even", "uneven"])
def test_quantised(lengths: list[int], write_first: bool, lower: bool) -> None:
    check(quantised(lengths, write_first), 2, lower)


# -- bits --------------------------------------------------------------------------------------------------------------

BITS = {
    "BSH scatter_update": dense_cache("BSH", "scatter_update", 2, 13, 7),
    "BNSD index_copy": dense_cache("BNSD", "index_copy", 1, 16, 0),
    "quantised": quantised([15, 9, 1], False),
}


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("name", BITS)
def test_caches_have_the_bits_of_one_device(name: str, cp_size: int) -> None:
    """Rows move, they are not computed again: of rows that are inputs, every bit is as it was."""
    snippet = BITS[name]
    own = [x.clone() for x in snippet.inputs]
    snippet.run(*own)
    for _, after in cppass.simulate(snippet.run, snippet.inputs, cp_size):
        for i in snippet.caches:
            assert torch.equal(after[i], own[i])
            assert not torch.equal(after[i], snippet.inputs[i])  # something was written


@pytest.mark.parametrize("lengths", [[32, 16], [33, 17, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_bfloat16_attention_is_as_close_as_the_acceptance_matrix_asks(lengths: list[int], cp_size: int) -> None:
    """Attention output alone: at most 1.1e-2 anywhere, 5e-4 on average."""
    snippet = paged(lengths, [70, *[0] * (len(lengths) - 1)], dtype=torch.bfloat16, heads=8, groups=1, lse=True)
    expected = as_tuple(snippet.run(*(x.clone() for x in snippet.inputs)))[0].float()
    for seen, _ in cppass.simulate(snippet.run, snippet.inputs, cp_size):
        error = (as_tuple(seen)[0].float() - expected).abs()
        assert error.max() <= 1.1e-2
        assert error.mean() <= 5e-4


# -- controls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BITS)
def test_rows_gathered_in_the_wrong_order_are_noticed(name: str) -> None:
    def contiguous(rank: int, cp_size: int) -> tuple[int, int]:
        return 2 * rank, 2 * rank + 1

    with unittest.mock.patch("cppass.layout.owned_blocks", contiguous), pytest.raises(AssertionError, match="close"):
        check(BITS[name], 2, True)
