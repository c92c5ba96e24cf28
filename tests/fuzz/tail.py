"""Steps behind the layers, on a value of any shape: whatever an output may be made by.

Args of a step: the value, one of its dims, and a number that chooses among what there is to choose from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

Step = Callable[[Tensor, int, int], Tensor]
MOST = 3000  # elements


def _narrowed(x: Tensor, d: int, a: int) -> Tensor:
    start = a % x.shape[d]
    return x.narrow(d, start, a % (x.shape[d] - start) + 1)


def _halves(x: Tensor, d: int) -> tuple[Tensor, ...]:
    return torch.split(x, (x.shape[d] + 1) // 2, d)


def _factor(n: int, a: int) -> int:
    factors = [i for i in range(1, n + 1) if n % i == 0]
    return factors[a % len(factors)]


def _positions(x: Tensor, d: int) -> Tensor:
    return torch.arange(x.shape[d]).to(x.dtype).unflatten(0, (-1, *(1,) * (x.dim() - 1 - d)))


SMOOTH: dict[str, Step] = {
    "silu": lambda x, d, a: silu(x),
    "scale": lambda x, d, a: x * (a % 3 - 0.5),
    "softmax": lambda x, d, a: x.softmax(d),
    "center": lambda x, d, a: x - x.mean(d, keepdim=True),
    "greatest": lambda x, d, a: x.amax(d, keepdim=True) - x,
    "norm": lambda x, d, a: layer_norm(x, [x.shape[-1]]),
    "cumsum": lambda x, d, a: x.cumsum(d) * 0.3,
    "flip": lambda x, d, a: x.flip(d),
    "sort": lambda x, d, a: x.sort(d)[0],
    "top": lambda x, d, a: x.topk(min(2, x.shape[d]), d)[0],
    "slice": _narrowed,
    "last": lambda x, d, a: x.narrow(d, x.shape[d] - 1, 1),
    "selected": lambda x, d, a: x.select(d, a % x.shape[d]),
    "every other": lambda x, d, a: x.index_select(d, torch.arange(0, x.shape[d], 2)),
    "halves": lambda x, d, a: torch.cat(tuple(reversed(_halves(x, d))), d),
    "first half, flat": lambda x, d, a: _halves(x, d)[0].reshape(-1, 1),
    "twice": lambda x, d, a: torch.cat([x, x + 1], d),
    "stack": lambda x, d, a: torch.stack([x, x * x], d),
    "unbound": lambda x, d, a: x.unbind(d)[a % x.shape[d]],
    "sum": lambda x, d, a: x.sum(d),
    "transpose": lambda x, d, a: x.transpose(d, a % x.dim()),
    "flatten": lambda x, d, a: x.flatten(max(0, d - 1), d),
    "unflatten": lambda x, d, a: x.unflatten(d, (_factor(x.shape[d], a), -1)),
    "rows": lambda x, d, a: x.reshape(_factor(x.numel(), a), -1),
    "expand": lambda x, d, a: x.unsqueeze(d).expand(*x.shape[:d], 2, *x.shape[d:]),
    "project": lambda x, d, a: x @ torch.arange(6.0 * x.shape[-1], dtype=x.dtype).sin().view(-1, 6),
    "scores": lambda x, d, a: x @ x.transpose(-1, -2) * 0.1,
    "position": lambda x, d, a: x * _positions(x, d).cos(),
    "roll": lambda x, d, a: x.roll(a % 3, d),
}

SHARP: dict[str, Step] = {
    "pick": lambda x, d, a: x.gather(d, (x > 0).long() % x.shape[d]),
}

TAIL: dict[str, Step] = SMOOTH | SHARP
AMPLIFYING = {"softmax"}
"""Steps that make much of little: of values of 30 in bfloat16, whose rounding is 0.1, softmax has no digit right."""


def tail_step(name: str, x: Tensor, dim: int, a: int) -> Tensor:
    """The step, on a value of one to four dims; the value itself where it would grow too large."""
    x = x if 1 < x.dim() < 5 else x.reshape(1, -1)
    y = TAIL[name](x, dim % x.dim(), a)
    return y if 0 < y.numel() <= MOST else x
