"""Ops as another library would define them, and models with them in.

Shape suffixes: B batch, S tokens, T keys, H heads, D head size, F = H * D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

B, H, D, F = 1, 4, 8, 32


def define(name: str, mutates: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    """A custom op whose fake function returns the like of its first argument."""

    def decorate(function):  # type: ignore[no-untyped-def]
        op = torch.library.custom_op(f"owntest::{name}", function, mutates_args=mutates)
        if not mutates:
            op.register_fake(lambda x, *args, **kwargs: torch.empty_like(x))
        return op

    return decorate


@define("norm")
def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@define("centred")
def centred(x: Tensor) -> Tensor:
    """Mixes tokens: the mean over dim 1 is taken off."""
    return x - x.mean(1, keepdim=True)


@define("flash_gate")
def flash_gate(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Token-wise, and called as if it were attention."""
    return torch.sigmoid(x) * y + z


@define("zero")
def zero(x: Tensor) -> Tensor:
    return x * 0


@define("root")
def root(x: Tensor) -> Tensor:
    return x.sqrt()


@define("scaled_", mutates=("x",))
def scaled_(x: Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("owntest::total", mutates_args=())
def total(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return x.sum(dim, keepdim)


@total.register_fake
def _(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return x.new_empty(x.sum(dim, keepdim).shape)


@torch.library.custom_op("owntest::fold", mutates_args=())
def fold(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """[B, H, S, D] -> [B, S, H * D]"""
    out = x.transpose(1, 2).flatten(2).clone()
    return out if weight is None else out * weight


@fold.register_fake
def _(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


@torch.library.custom_op("owntest::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q [B, Hq, S, D], k, v [B, Hkv, T, D] -> [B, Hq, S, D]"""
    return scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=True).clone()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return torch.empty_like(q)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(x: Tensor, wqkv: Tensor, weight: Tensor) -> Tensor:
    """A norm of one's own in front of attention and behind it."""
    q, k, v = (p.unflatten(2, (H, D)).transpose(1, 2) for p in (norm(x @ wqkv[:, :F], weight) @ wqkv).chunk(3, -1))
    out = fold(scaled_dot_product_attention(q, k, v, is_causal=True))
    return (x + norm(out, weight))[:, -1]


def layer_inputs(tokens: int = 16) -> tuple[Tensor, ...]:
    return rand(B, tokens, F), rand(F, 3 * F, seed=1) / F**0.5, rand(F, seed=2)
