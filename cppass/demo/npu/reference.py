"""The same models in plain torch: the weights of a ``Decoder``, whole sequences, no cache, no op of torch_npu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softmax

from cppass.demo.npu.dense import Decoder, Layer
from cppass.demo.npu.layers import EPSILON, MLP, ROPE_BASE

__all__ = ["last_logits"]


@torch.no_grad()
def last_logits(model: Decoder, sequences: list[Tensor]) -> Tensor:
    """Logits [B, vocab] of the last token of each sequence of token ids [S], prefix and new tokens together."""
    return torch.cat([_logits(model, ids) for ids in sequences])


def _logits(model: Decoder, ids: Tensor) -> Tensor:
    x = model.embedding.weight[ids]
    for layer in model.layers:
        assert isinstance(layer, Layer)
        x = x + _attention(layer.attention, _norm(x, layer.input_norm.weight))
        y = _norm(x, layer.post_norm.weight)
        x = x + (_mlp(layer.mlp, y) if isinstance(layer.mlp, MLP) else _experts(layer.mlp, y))
    return _norm(x[-1:], model.norm.weight) @ model.lm_head.weight.t()


def _attention(attention: Any, x: Tensor) -> Tensor:
    S, D = x.shape[0], attention.head_dim
    q, k, v = (part.view(S, -1, D) for part in (x @ attention.qkv_proj.weight.t()).split(attention.sizes, -1))
    q, k = _rope(_norm(q, attention.q_norm.weight)), _rope(_norm(k, attention.k_norm.weight))
    k, v = (part.repeat_interleave(attention.heads // attention.kv_heads, 1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / D**0.5
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    out = torch.einsum("hqk,khd->qhd", softmax(scores.masked_fill(hidden, -torch.inf), -1), v)
    return out.reshape(S, -1) @ attention.o_proj.weight.t()  # type: ignore[no-any-return]


def _rope(x_SHD: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + D/2}) as a complex number, turned by position * frequency."""
    S, _, D = x_SHD.shape
    frequencies = ROPE_BASE ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(S)[:, None, None] * frequencies
    pairs = torch.complex(x_SHD[..., : D // 2].double(), x_SHD[..., D // 2 :].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1).to(x_SHD.dtype)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    gate, up = (x @ mlp.gate_up_proj.weight.t()).chunk(2, -1)
    return silu(gate) * up @ mlp.down_proj.weight.t()


def _experts(block: Any, x: Tensor) -> Tensor:
    """Every expert for every token, weighted by zero where it was not chosen."""
    scores = softmax(x @ block.gate.weight.t(), -1)
    best, chosen = scores.topk(block.top_k, -1)
    weights = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
    out = torch.zeros_like(x)
    for expert in range(block.experts):
        gate, up = (x @ block.gate_up[expert]).chunk(2, -1)
        out = out + weights[:, expert, None] * (silu(gate) * up @ block.down[expert])
    return out
