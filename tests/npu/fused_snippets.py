"""One attention with its KV write, as torch_npu's ops: projections, write, fused-infer-attention, output projection.

Shape suffixes: B batch, T rows of all sequences, S rows of one, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch_npu  # noqa: F401
from torch import Tensor

import cppass
from cppass.demo.npu.forward_metadata import plan_step

npu = torch.ops.npu
D, BLOCK = 16, 128
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
Write = Callable[..., tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A function of tensors and its inputs; `caches` are the positions of the inputs that it writes."""

    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    caches: tuple[int, ...] = ()


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def fused(version: str, q: Tensor, k: Tensor, v: Tensor, heads: int, groups: int, **given: Any) -> Any:
    """Either version by version 2's names."""
    options = {"num_query_heads": heads, "num_key_value_heads": groups, "softmax_scale": D**-0.5, **given}
    if version == "v2":
        return npu.npu_fused_infer_attention_score_v2(q, k, v, **options)
    names = {
        "num_query_heads": "num_heads",
        "softmax_scale": "scale",
        "actual_seq_qlen": "actual_seq_lengths",
        "actual_seq_kvlen": "actual_seq_lengths_kv",
        "return_softmax_lse": "softmax_lse_flag",
    }
    return npu.npu_fused_infer_attention_score(q, k, v, **{names.get(n, n): x for n, x in options.items()})


# -- cache writes: (key cache, value cache, slots, k, v) -> the caches that attention reads ---------------------------


def nd_update_on_a_view(kc: Tensor, vc: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    for cache, rows in ((kc, k), (vc, v)):
        npu.npu_scatter_nd_update_(cache.view(-1, *rows.shape[1:]), slots.view(-1, 1), rows)
    return kc, vc


def scatter_pa(kc: Tensor, vc: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    npu.npu_scatter_pa_kv_cache(k, v, kc, vc, slots, cache_mode="Norm")
    return kc, vc


def index_put(kc: Tensor, vc: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    kc.view(-1, *k.shape[1:])[slots.long()] = k
    vc.view(-1, *v.shape[1:])[slots.long()] = v
    return kc, vc


WRITES: dict[str, Write] = {"nd_update": nd_update_on_a_view, "scatter_pa": scatter_pa, "index_put": index_put}


# -- snippets ----------------------------------------------------------------------------------------------------------


def paged(
    lengths: list[int],
    prefixes: list[int] | None = None,
    *,
    version: str = "v2",
    write: Write = nd_update_on_a_view,
    heads: int = 4,
    groups: int = 2,
    dtype: torch.dtype = torch.float32,
    fresh: bool = False,
    lse: bool = False,
    spare: int = 0,
    **given: Any,
) -> Snippet:
    """TND: the cache is written first and read by block table; `fresh` attends to the packed K/V, the write after.

    The cache has two pages a sequence, and `spare` ones.
    """
    tokens, blocks = sum(lengths), 2 * len(lengths) + spare
    step = plan_step(lengths, prefixes, block_size=BLOCK, blocks=blocks, capacity=2 * BLOCK, shuffle=1).metadata
    options = {"sparse_mode": 3, **given}

    def run(x, wq, wk, wv, kc, vc, slots, table, mask, *extra):  # type: ignore[no-untyped-def]
        q, k, v = ((x @ w).view(-1, n, D) for w, n in ((wq, heads), (wk, groups), (wv, groups)))
        if extra:
            options["learnable_sink"] = extra[0]
        common = {
            "input_layout": "TND",
            "atten_mask": mask,
            "actual_seq_qlen": step.cu_q,
            "return_softmax_lse": lse,
            **options,
        }
        if fresh:
            result = fused(version, q, k, v, heads, groups, actual_seq_kvlen=step.cu_kv, **common)
            write(kc, vc, slots, k, v)
        else:
            pages = [c.view(blocks, BLOCK, -1) for c in write(kc, vc, slots, k, v)]
            common |= {"block_table": table, "block_size": BLOCK}
            result = fused(version, q, *pages, heads, groups, actual_seq_kvlen=step.kv_lens, **common)
        return (*result,) if lse else result[0].flatten(1) @ wq.t()

    width = 32
    weights = [rand(width, n * D, seed=n, dtype=dtype) / width**0.5 for n in (heads, groups, groups + 100)]
    weights[2] = rand(width, groups * D, seed=7, dtype=dtype) / width**0.5
    caches = [rand(blocks, BLOCK, groups, D, seed=s, dtype=dtype) for s in (1, 2)]
    extra = [options.pop("learnable_sink")] if "learnable_sink" in options else []
    inputs = (rand(tokens, width, dtype=dtype), *weights, *caches, step.slot_mapping, step.block_table, MASK, *extra)
    return Snippet(run, inputs, (4, 5))


def dense(
    input_layout: str, batch: int, rows: int, *, version: str = "v2", heads: int = 4, groups: int = 2, **given: Any
) -> Snippet:
    """BSH, BSND, BNSD over the fresh keys and values."""

    def run(x, wq, wk, wv, *mask):  # type: ignore[no-untyped-def]
        q, k, v = (_laid_out(x @ w, input_layout, n) for w, n in ((wq, heads), (wk, groups), (wv, groups)))
        own = {"atten_mask": mask[0]} if mask else {}
        return fused(version, q, k, v, heads, groups, input_layout=input_layout, **own, **options)[0]

    options = dict(given)
    mask = [options.pop("atten_mask")] if "atten_mask" in options else []
    weights = [rand(32, n * D, seed=s) / 32**0.5 for s, n in ((1, heads), (2, groups), (3, groups))]
    return Snippet(run, (rand(batch, rows, 32), *weights, *mask))


def dense_cache(write: str, input_layout: str) -> Snippet:
    """A cache [B, S_max, G * D] (BSH) or [B, G, S_max, D] (BNSD) with 8 rows in it, written and then read by length."""
    batch, rows, longest, prefix = 2, 16, 64, 8
    dim = 1 if input_layout == "BSH" else 2

    def run(x, wq, wk, wv, kc, vc, first, positions, mask):  # type: ignore[no-untyped-def]
        q, k, v = (_laid_out(x @ w, input_layout, n) for w, n in ((wq, 4), (wk, 2), (wv, 2)))
        for cache, new in ((kc, k), (vc, v)):
            if write == "scatter_update":
                npu.scatter_update_(cache, first, new, -2)
            elif write == "index_copy":
                cache.index_copy_(dim, positions, new)
            else:
                cache.narrow(dim, prefix, rows).copy_(new)
        lengths = {"actual_seq_kvlen": [prefix + rows] * batch}
        options = {"input_layout": input_layout, "atten_mask": mask, "sparse_mode": 3}
        return fused("v1", q, kc, vc, 4, 2, **lengths, **options)[0]

    shape = (batch, longest, 2 * D) if input_layout == "BSH" else (batch, 2, longest, D)
    weights = [rand(32, n * D, seed=s) / 6 for s, n in ((1, 4), (2, 2), (3, 2))]
    where = (torch.tensor([prefix] * batch), torch.arange(prefix, prefix + rows), MASK)
    return Snippet(run, (rand(batch, rows, 32), *weights, rand(*shape, seed=4), rand(*shape, seed=5), *where), (4, 5))


def lengths_in_tensors(lengths: list[int], prefixes: list[int] | None = None, *, causal: bool = True) -> Snippet:
    """torchair's form of the op: paged TND, both lengths in tensors."""
    blocks = 2 * len(lengths)
    step = plan_step(lengths, prefixes, block_size=BLOCK, blocks=blocks, capacity=2 * BLOCK, shuffle=1).metadata

    def run(x, wq, wk, wv, kc, vc, slots, table, mask, q_lengths, kv_lengths):  # type: ignore[no-untyped-def]
        q, k, v = ((x @ w).view(-1, n, D) for w, n in ((wq, 4), (wk, 2), (wv, 2)))
        pages = [c.view(blocks, BLOCK, -1) for c in nd_update_on_a_view(kc, vc, slots, k, v)]
        out = torch.ops.air.npu_fused_infer_attention_score(
            q, *pages, num_heads=4, num_key_value_heads=2, scale=D**-0.5, input_layout="TND",
            sparse_mode=3 if causal else 0, atten_mask=mask if causal else None, actual_seq_lengths=q_lengths,
            actual_seq_lengths_kv=kv_lengths, block_table=table, block_size=BLOCK,
        )  # fmt: skip
        return out[0].flatten(1)

    weights = [rand(32, n * D, seed=s) / 6 for s, n in ((1, 4), (2, 2), (3, 2))]
    caches = [rand(blocks, BLOCK, 2, D, seed=s) for s in (1, 2)]
    own = (torch.tensor(step.cu_q), torch.tensor(step.kv_lens))
    inputs = (rand(sum(lengths), 32), *weights, *caches, step.slot_mapping, step.block_table, MASK, *own)
    return Snippet(run, inputs, (4, 5))


def _laid_out(x: Tensor, input_layout: str, heads: int) -> Tensor:
    if input_layout == "BSH":
        return x
    split = x.view(*x.shape[:2], heads, D)
    return split if input_layout == "BSND" else split.transpose(1, 2).contiguous()


def check(snippet: Snippet, cp_size: int, lower: bool, tolerance: float = 1e-5) -> None:
    """Every rank equals one device; caches are the same bits on every rank."""
    own = [x.clone() for x in snippet.inputs]
    expected = snippet.run(*own)
    ranks = cppass.simulate(snippet.run, snippet.inputs, cp_size, lower=lower)
    assert cppass.run_pass(traced(snippet), snippet.inputs, cp_size=cp_size, lower=False).status == "rewritten"
    for seen, after in ranks:
        torch.testing.assert_close(as_tuple(seen), as_tuple(expected), rtol=tolerance, atol=tolerance)
        for i in snippet.caches:
            torch.testing.assert_close(after[i], own[i], rtol=tolerance, atol=tolerance)
            assert torch.equal(after[i], ranks[0][1][i])


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def traced(snippet: Snippet) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(snippet.run, tracing_mode="fake")(*snippet.inputs)
