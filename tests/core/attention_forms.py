"""Attention in the forms that models have it, and small inputs for them.

Shape suffixes: B batch, H query heads, G key/value heads, S tokens, T keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from cppass.match import Found, find_sites

B, H, G, S, T, D = 1, 4, 2, 8, 12, 6
Function = Callable[..., Any]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return rand(B, H, S, D), rand(B, kv_heads, S, D, seed=1), rand(B, kv_heads, S, D, seed=2)


def caches(kv_heads: int = H) -> tuple[Tensor, Tensor]:
    return rand(B, kv_heads, T, D, seed=3), rand(B, kv_heads, T, D, seed=4)


def traced(function: Function, *inputs: Any, pre_dispatch: bool = False) -> fx.GraphModule:
    """Placeholders are named after the parameters: q_1, k_1, ..."""
    return make_fx(function, tracing_mode="fake", pre_dispatch=pre_dispatch)(*inputs)


def found(function: Function, *inputs: Any, pre_dispatch: bool = False) -> Found:
    return find_sites(traced(function, *inputs, pre_dispatch=pre_dispatch).graph)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def hidden(queries: int, keys: int) -> Tensor:
    return torch.where(torch.arange(keys)[None] <= torch.arange(queries)[:, None], 0.0, float("-inf"))[None, None]


def repeat_kv(x: Tensor, n: int) -> Tensor:
    """transformers' repeat_kv: [B, G, S, D] -> [B, G * n, S, D]."""
    b, g, s, d = x.shape
    return x[:, :, None].expand(b, g, n, s, d).reshape(b, g * n, s, d)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) * 0.5 + hidden(S, S), -1) @ v


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3) / 4 + hidden(S, S).to(q.dtype), -1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.transpose(2, 3)) * 30 + hidden(S, S), -1) @ v


def with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v, weights


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.transpose(2, 3), q[..., :1]], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


REPEATS: dict[str, Function] = {
    "enable_gqa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "repeat_kv": lambda q, k, v: causal(q, repeat_kv(k, H // G), repeat_kv(v, H // G)),
    "repeat_interleave": lambda q, k, v: causal(q, k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)),
    "written out": lambda q, k, v: torch.softmax(q @ repeat_kv(k, H // G).transpose(2, 3), -1) @ repeat_kv(v, H // G),
}
