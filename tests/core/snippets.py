"""Functions of q, k, v and friends that the tests rewrite, with inputs for any number of tokens.

Shape suffixes: B batch, H query heads, G key/value heads, S tokens, T rows of the cache, D head size, F = H * D,
E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention, silu

B, H, G, D, F = 1, 4, 2, 8, 32
PREFIX = 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A function of aten-able torch code.

    Attributes:
        run: the function.
        inputs: its inputs for S tokens.
        written: positions of the inputs it writes in place.
        tolerance: of outputs; written inputs are exact.
    """

    run: Callable[..., Any]
    inputs: Callable[[int], tuple[Any, ...]]
    written: tuple[int, ...] = ()
    tolerance: float = 1e-5


def traced(snippet: Snippet, tokens: int) -> fx.GraphModule:
    return make_fx(snippet.run, tracing_mode="fake")(*snippet.inputs(tokens))


def qkv(tokens: int, heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return rand(B, H, tokens, D), rand(B, heads, tokens, D, seed=1), rand(B, heads, tokens, D, seed=2)


def caches(tokens: int, heads: int = H) -> tuple[Tensor, Tensor]:
    rows = PREFIX + tokens + 2
    return rand(B, heads, rows, D, seed=3), rand(B, heads, rows, D, seed=4)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def visible(queries: int, keys: int, before: Tensor | int) -> Tensor:
    return torch.arange(keys) <= (torch.arange(queries) + before)[:, None]


def cached(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A static cache with n rows in it; the written caches are outputs."""
    at = torch.arange(k.shape[2]) + n
    kc, vc = kc.index_copy(2, at, k), vc.index_copy(2, at, v)
    return scaled_dot_product_attention(q, kc, vc, attn_mask=visible(k.shape[2], kc.shape[2], n)), kc, vc


def cached_in_place(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Tensor:
    at = torch.arange(k.shape[2]) + n
    kc.index_copy_(2, at, k)
    vc.index_copy_(2, at, v)
    return scaled_dot_product_attention(q, kc, vc, attn_mask=visible(k.shape[2], kc.shape[2], n))


def grown(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A cache that grows by cat; G heads, repeated by the kernel; a window of 4 keys."""
    kc, vc = torch.cat([kc, k], 2), torch.cat([vc, v], 2)
    s, t = q.shape[2], kc.shape[2]
    mask = visible(s, t, t - s) & ~visible(s, t, t - s - 4)
    return scaled_dot_product_attention(q, kc, vc, attn_mask=mask, enable_gqa=True), kc, vc


def padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """A mask that depends on data: its local rows are built and used as they are."""
    return scaled_dot_product_attention(q, k, v, attn_mask=visible(q.shape[2], k.shape[2], 0) & pad)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Soft-capped scores and the weights as an output: runs row by row."""
    scores = torch.tanh(q @ k.transpose(2, 3)) * 5
    weights = torch.softmax(torch.where(visible(q.shape[2], k.shape[2], 0), scores, float("-inf")), -1)
    return weights @ v, weights


def layer(x: Tensor, w: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Tensor:
    """Projections in front of and behind a cached attention; the last token is the output."""
    b, s, _ = x.shape
    q, k, v = ((x @ w[:, i * F : (i + 1) * F]).view(b, s, H, D).transpose(1, 2) for i in range(3))
    out = cached_in_place(q, k, v, kc, vc, n).transpose(1, 2).reshape(b, s, F)
    return (x + out @ w[:, 3 * F :])[:, -1]


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=ends).float()


def experts(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """transformers.integrations.moe.grouped_mm_experts_forward: rows sorted by expert, multiplied, put back."""
    top, picked = torch.softmax(x @ router, -1).topk(2, -1)
    values, order = torch.sort(picked.reshape(-1))
    rows = x[order // 2]
    ends = torch.cumsum(torch.histc(values.float(), bins=4, min=0, max=3), 0, dtype=torch.int32)
    rows = grouped_mm(silu(grouped_mm(rows, up, ends)), down, ends) * top.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return rows[back].view(-1, 2, x.shape[1]).sum(1), ends


def mixture(q: Tensor, k: Tensor, v: Tensor, router: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, then experts; how many rows each expert has got is an output, so it must count all tokens."""
    x = causal(q, k, v).transpose(1, 2).reshape(-1, F)
    y, ends = experts(x, router, up, down)
    return x + y, ends


def _pad(tokens: int) -> Tensor:
    seen = torch.ones(tokens, dtype=torch.bool)
    seen[1::3] = False
    return seen


N = torch.tensor(PREFIX)
SNIPPETS = {
    "causal": Snippet(causal, qkv),
    "cache": Snippet(cached, lambda s: (*qkv(s), *caches(s), N)),
    "cache, in place": Snippet(cached_in_place, lambda s: (*qkv(s), *caches(s), N), (3, 4)),
    "growing cache, window, grouped heads": Snippet(
        grown, lambda s: (*qkv(s, G), rand(B, G, PREFIX, D, seed=3), rand(B, G, PREFIX, D, seed=4))
    ),
    "padding mask": Snippet(padded, lambda s: (*qkv(s), _pad(s))),
    "written out": Snippet(written_out, qkv),
    "a layer": Snippet(layer, lambda s: (rand(B, s, F), rand(F, 4 * F) / F, *caches(s), N), (2, 3)),
    "experts": Snippet(
        mixture, lambda s: (*qkv(s), rand(F, 4), rand(4, F, 16) / F, rand(4, 16, F) / 16), tolerance=2e-2
    ),
}
