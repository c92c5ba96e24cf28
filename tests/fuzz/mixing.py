"""Steps that mix tokens and are no attention: their rows have to be gathered, or the graph is refused.

Hidden states [B, S, F] in, [B, S, F] out.
"""

from __future__ import annotations

import torch
from fuzz.inputs import Inputs
from fuzz.tokenwise import Step
from torch import Tensor
from torch.nn.functional import conv1d, pad


def _convolved(x: Tensor, given: Inputs, a: int) -> Tensor:
    """Each feature over three tokens, causally: [B, F, S]."""
    f = x.shape[-1]
    return conv1d(pad(x.transpose(1, 2), (2, 0)), given.normal(f, 1, 3), groups=f).transpose(1, 2)


def _over_tokens(x: Tensor, given: Inputs, a: int) -> Tensor:
    """A matrix product over tokens, as in MLP mixers."""
    s = x.shape[1]
    return given.normal(s, s) @ x * 0.2


def _decayed(x: Tensor, given: Inputs, a: int) -> Tensor:
    at = torch.arange(x.shape[1])
    ages = (at[:, None] - at[None]).to(x.dtype)
    return torch.where(ages >= 0, (-ages.abs()).exp(), 0.0) @ x


def _picked_by_experts(x: Tensor, given: Inputs, a: int) -> Tensor:
    """Expert choice: an expert takes its two best tokens, and adds what it makes of them."""
    scores = x @ given.weight(x.shape[-1], 2)
    top, at = scores[0].softmax(0).topk(min(2, x.shape[1]), 0)
    made = x[0, at[:, a % 2]].tanh() * top[:, a % 2, None]
    return x + torch.zeros_like(x[0]).index_add(0, at[:, a % 2], made)


def _mean_of_marked(x: Tensor, given: Inputs, a: int) -> Tensor:
    marked = given.flags(x.shape[0], x.shape[1], 1)
    return x - (x * marked).sum(1, keepdim=True) / (marked.sum(1, keepdim=True) + 1)


SMOOTH: dict[str, Step] = {
    "flip": lambda x, given, a: x.flip(1),
    "roll": lambda x, given, a: x.roll(a % 3 + 1, 1),
    "cumsum": lambda x, given, a: x.cumsum(1) * 0.2,
    "less the mean": lambda x, given, a: x - x.mean(1, keepdim=True),
    "below the greatest": lambda x, given, a: x - x.amax(1, keepdim=True),
    "softmax": lambda x, given, a: x.softmax(1),
    "sort": lambda x, given, a: x.sort(1)[0],
    "convolved": _convolved,
    "product over tokens": _over_tokens,
    "decay over tokens": _decayed,
    "shift": lambda x, given, a: torch.cat([x[:, :1], x[:, :-1]], 1),
    "difference": lambda x, given, a: x - pad(x, (0, 0, 1, 0))[:, :-1],
    "less the first": lambda x, given, a: x - x[:, :1],
    "plus the last": lambda x, given, a: x + x[:, -1:],
    "plus a selected token": lambda x, given, a: x + x[:, a % min(2, x.shape[1])][:, None],
    "parts swapped": lambda x, given, a: torch.cat(tuple(reversed(x.split(x.shape[1] // 2 + 1, 1))), 1),
    "every other": lambda x, given, a: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "twice, then half": lambda x, given, a: torch.cat([x, x.sin()], 1)[:, x.shape[1] :],
    "in order": lambda x, given, a: x[:, given.order(x.shape[1])],
    "selected": lambda x, given, a: x.index_select(1, given.order(x.shape[1])),
    "gathered": lambda x, given, a: x.gather(1, given.order(x.shape[1])[None, :, None].expand(x.shape)),
    "scattered": lambda x, given, a: torch.zeros_like(x).scatter(
        1, given.order(x.shape[1])[None, :, None].expand(x.shape), x
    ),
    "added by index": lambda x, given, a: torch.zeros_like(x).index_add(
        1, given.integers(min(2, x.shape[1]), x.shape[1]), x
    ),
    "put": lambda x, given, a: torch.zeros_like(x).index_put((torch.tensor([0]), given.order(x.shape[1])), x[0]),
    "tokens as features": lambda x, given, a: x.transpose(1, 2).reshape(x.shape),
    "batch and tokens": lambda x, given, a: x.reshape(1, -1, x.shape[2]).flip(1).view(x.shape),
    "mean of marked": _mean_of_marked,
    "norm of tokens": lambda x, given, a: x / (x.norm(dim=1, keepdim=True) + 1),
    "gram": lambda x, given, a: x @ (x.transpose(1, 2) @ x) * 0.02,
    "scores": lambda x, given, a: (x @ x.transpose(1, 2)).tril() @ x * 0.02,
}

SHARP: dict[str, Step] = {
    "greatest token": lambda x, given, a: x + x.gather(1, x.argmax(1, keepdim=True)),
    "picked by experts": _picked_by_experts,
}

MIXING: dict[str, Step] = SMOOTH | SHARP
