"""Steps that keep rows apart: hidden states [B, S, F] in, [B, S, F] out, every token by itself.

The int is a choice among what the step has to choose from. F is even.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuzz.inputs import Inputs
from torch import Tensor
from torch.nn.functional import conv1d, gelu, glu, layer_norm, linear, one_hot, pad, silu

Step = Callable[[Tensor, Inputs, int], Tensor]


def rms_norm(x: Tensor, given: Inputs) -> Tensor:
    """As models write it: in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return given.normal(x.shape[-1]) * normed.to(x.dtype)


def _numbered(x: Tensor) -> Tensor:
    """[S, 1]: something that each position has of its own."""
    return torch.arange(x.shape[1]).to(x.dtype).cos()[:, None]


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1))


def _kept_top(x: Tensor, given: Inputs, a: int) -> Tensor:
    top, at = x.topk(2, -1)
    return torch.zeros_like(x).scatter(-1, at, top)


SMOOTH: dict[str, Step] = {
    "silu": lambda x, given, a: silu(x),
    "gelu": lambda x, given, a: gelu(x),
    "clamp": lambda x, given, a: x.clamp(-1, 1),
    "leaky": lambda x, given, a: torch.where(x > 0, x, 0.1 * x),
    "affine": lambda x, given, a: x * given.normal(x.shape[-1]) + given.normal(x.shape[-1]),
    "rms norm": lambda x, given, a: rms_norm(x, given),
    "rms norm op": lambda x, given, a: torch.nn.functional.rms_norm(x, [x.shape[-1]], given.normal(x.shape[-1]), 1e-5),
    "layer norm": lambda x, given, a: layer_norm(
        x, [x.shape[-1]], given.normal(x.shape[-1]), given.normal(x.shape[-1])
    ),
    "residual": lambda x, given, a: x + silu(x) @ given.weight(x.shape[-1], x.shape[-1]),
    "linear": lambda x, given, a: linear(x, given.weight(x.shape[-1], x.shape[-1]), given.normal(x.shape[-1])),
    "einsum": lambda x, given, a: torch.einsum("bsf,fg->bsg", x, given.weight(x.shape[-1], x.shape[-1])),
    "rows": lambda x, given, a: (x.reshape(-1, x.shape[-1]) @ given.weight(x.shape[-1], x.shape[-1])).view(x.shape),
    "softmax": lambda x, given, a: x.softmax(-1),
    "log softmax": lambda x, given, a: x.log_softmax(-1),
    "cumsum": lambda x, given, a: x.cumsum(-1) * 0.3,
    "sort": lambda x, given, a: x.sort(-1)[0],
    "below the greatest": lambda x, given, a: x - x.amax(-1, keepdim=True),
    "by deviation": lambda x, given, a: x / (x.var(-1, keepdim=True) + 1).sqrt(),
    "halves swapped": lambda x, given, a: torch.cat(tuple(reversed(x.chunk(2, -1))), -1),
    "heads unbound": lambda x, given, a: torch.stack(_heads(x).unbind(-2)[::-1], -2).flatten(-2),
    "heads first": lambda x, given, a: (_heads(x).transpose(1, 2) * 2).transpose(1, 2).reshape(x.shape),
    "tokens first": lambda x, given, a: x.transpose(0, 1).contiguous().tanh().transpose(0, 1),
    "features first": lambda x, given, a: x.permute(2, 0, 1).sin().permute(1, 2, 0),
    "flat": lambda x, given, a: x.reshape(-1).tanh().view(x.shape),
    "repeated": lambda x, given, a: x.unsqueeze(-2).expand(-1, -1, 2, -1).mean(-2),
    "interleaved": lambda x, given, a: x.repeat_interleave(2, -1)[..., ::2],
    "gate of a column": lambda x, given, a: x * x[..., a % 8 : a % 8 + 1].sigmoid(),
    "times a column": lambda x, given, a: x * x[..., a % 8].unsqueeze(-1).tanh(),
    "columns in order": lambda x, given, a: x[..., given.order(x.shape[-1])],
    "columns selected": lambda x, given, a: x.index_select(-1, given.order(x.shape[-1])),
    "columns gathered": lambda x, given, a: x.gather(-1, given.order(x.shape[-1]).expand(x.shape)),
    "columns rolled": lambda x, given, a: x.roll(1, -1),
    "columns flipped": lambda x, given, a: x.flip(-1),
    "columns padded": lambda x, given, a: pad(x, (2, 0))[..., : x.shape[-1]],
    "gated unit": lambda x, given, a: glu(torch.cat([x, x.flip(-1)], -1)),
    "position": lambda x, given, a: x * _numbered(x),
    "given flags": lambda x, given, a: torch.where(given.flags(x.shape[0], x.shape[1], 1), x, 0.0),
    "given rows": lambda x, given, a: x + given.normal(x.shape[1], x.shape[-1]),
    "batch flipped": lambda x, given, a: x.flip(0),
    "less its batch": lambda x, given, a: x - 0.5 * x.mean(0, keepdim=True),
    "convolved by one": lambda x, given, a: conv1d(
        x.transpose(1, 2), given.weight(x.shape[-1], x.shape[-1])[..., None]
    ).transpose(1, 2),
}

SHARP: dict[str, Step] = {
    "top kept": _kept_top,
    "put back": lambda x, given, a: x.tanh().gather(-1, x.argsort(-1).argsort(-1)),
    "greatest": lambda x, given, a: x * one_hot(x.argmax(-1), x.shape[-1]),
    "looked up": lambda x, given, a: x + given.weight(x.shape[-1], x.shape[-1])[x.argmax(-1)],
    "cut off": lambda x, given, a: x * (x > 0.1),
}
"""Steps that jump: rounding decides, so they run in float64 alone."""

TOKENWISE: dict[str, Step] = SMOOTH | SHARP
