"""Rotary embeddings as models write them: where the angles come from, how a head is turned.

Shape suffixes: B batch, H heads, S tokens, D head size, R = D / 2 angles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuzz.inputs import Inputs
from torch import Tensor
from torch.nn.functional import embedding

Table = Callable[[Tensor, int, Inputs, torch.dtype], Tensor]  # positions [S], R -> angles [S, R]
TABLE_ROWS = 80


def _frequencies(r: int, dtype: torch.dtype) -> Tensor:
    return 10.0 ** (-torch.arange(r).to(dtype) / r)


def _outer(at: Tensor, r: int, given: Inputs, dtype: torch.dtype) -> Tensor:
    return at[:, None].to(dtype) * _frequencies(r, dtype)


def _matmul(at: Tensor, r: int, given: Inputs, dtype: torch.dtype) -> Tensor:
    """As transformers does: [1, R, 1] @ [1, 1, S]."""
    angles = _frequencies(r, dtype)[None, :, None] @ at[None, None, :].to(dtype)
    return angles.transpose(1, 2)[0]


def _looked_up(at: Tensor, r: int, given: Inputs, dtype: torch.dtype) -> Tensor:
    return given.normal(TABLE_ROWS, r)[at]


def _embedded(at: Tensor, r: int, given: Inputs, dtype: torch.dtype) -> Tensor:
    return embedding(at, given.normal(TABLE_ROWS, r))


def _selected(at: Tensor, r: int, given: Inputs, dtype: torch.dtype) -> Tensor:
    return given.normal(TABLE_ROWS, r).index_select(0, at)


def _first_rows(at: Tensor, r: int, given: Inputs, dtype: torch.dtype) -> Tensor:
    return given.normal(TABLE_ROWS, r)[: at.shape[0]]


def _handed_in(at: Tensor, r: int, given: Inputs, dtype: torch.dtype) -> Tensor:
    return given.normal(at.shape[0], r)


ANGLES: dict[str, Table] = {
    "outer product": _outer,
    "matmul": _matmul,
    "table[positions]": _looked_up,
    "embedding": _embedded,
    "index_select": _selected,
    "first rows of a table": _first_rows,
    "an input": _handed_in,
}


def _half(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-b, a], -1) * sin


def _sliced(x: Tensor, angles: Tensor) -> Tensor:
    r = x.shape[-1] // 2
    a, b, cos, sin = x[..., :r], x[..., r:], angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _interleaved(x: Tensor, angles: Tensor) -> Tensor:
    a, b, cos, sin = x[..., ::2], x[..., 1::2], angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def _complex(x: Tensor, angles: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    angles = angles.to(wide.dtype)
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _partial(x: Tensor, angles: Tensor) -> Tensor:
    """The first half of a head is turned, by the first half of the angles."""
    half = x.shape[-1] // 2
    return torch.cat((_sliced(x[..., :half], angles[..., : half // 2]), x[..., half:]), -1) if half > 1 else x


def _none(x: Tensor, angles: Tensor) -> Tensor:
    return x


TURNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "half": _half,
    "sliced": _sliced,
    "interleaved": _interleaved,
    "complex": _complex,
    "partial": _partial,
    "none": _none,
}


def rotated(turn: str, angles: str, q: Tensor, k: Tensor, at: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D] and k [B, G, S, D], turned by their positions [S]."""
    if turn == "none":
        return q, k
    wide = torch.promote_types(q.dtype, torch.float32)
    table = ANGLES[angles](at, q.shape[-1] // 2, given, wide)
    return TURNS[turn](q, table), TURNS[turn](k, table)
