"""A two-layer decoder in plain torch: embedding, RMS norm, projections, RoPE, cached attention, gated MLP, vocabulary.

Shape suffixes: B batch, S tokens, T rows of the cache, H heads, D head size, F = H * D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear, scaled_dot_product_attention, silu

B, H, D, F, VOCABULARY, LAYERS, ROWS = 1, 2, 8, 16, 32, 2, 24


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Parameter(torch.ones(2, F))
        self.qkv = nn.Parameter(torch.randn(3 * F, F) / F**0.5)
        self.out = nn.Parameter(torch.randn(F, F) / F**0.5)
        self.up = nn.Parameter(torch.randn(4 * F, F) / F**0.5)
        self.down = nn.Parameter(torch.randn(F, 2 * F) / F**0.5)

    def forward(self, x: Tensor, at: Tensor, n: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = linear(rms_norm(x, self.norms[0]), self.qkv).view(b, s, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        kc.index_copy_(2, at, k)
        vc.index_copy_(2, at, v)
        seen = torch.arange(kc.shape[2]) <= (torch.arange(s) + n)[:, None]
        out = scaled_dot_product_attention(q, kc, vc, attn_mask=seen)
        x = x + linear(out.transpose(1, 2).reshape(b, s, F), self.out)
        gate, up = linear(rms_norm(x, self.norms[1]), self.up).chunk(2, -1)
        return x + linear(silu(gate) * up, self.down)


class Toy(nn.Module):
    """forward(ids [B, S], n rows in the caches, caches [LAYERS, 2] of [B, H, T, D]) -> logits of the last token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Parameter(torch.randn(VOCABULARY, F))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor, n: Tensor, *caches: Tensor) -> Tensor:
        x = nn.functional.embedding(ids, self.words)
        at = torch.arange(ids.shape[1]) + n
        angles = at[:, None].float() * (100.0 ** (-torch.arange(D // 2) / (D // 2)))
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        for i, layer in enumerate(self.layers):
            x = layer(x, at, n, cos, sin, *caches[2 * i : 2 * i + 2])
        return linear(x[:, -1:], self.words)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def inputs(tokens: int) -> tuple[Tensor, ...]:
    ids = torch.arange(tokens)[None] * 7 % VOCABULARY
    return (ids, torch.tensor(3), *(torch.zeros(B, H, ROWS, D) for _ in range(2 * LAYERS)))


def traced(tokens: int, functional: bool = True) -> fx.GraphModule:
    """The decoder's graph, parameters as attributes; cache writes as copy_ at its end, or in place as they are."""
    toy = Toy()
    run = torch.func.functionalize(toy, remove="mutations") if functional else toy
    with torch.no_grad():
        return make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs(tokens))
