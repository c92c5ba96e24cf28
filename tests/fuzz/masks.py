"""Masks as models build them in a graph: [S, T] or [B, 1, S, T], bool (True: seen) or added to the scores.

Row i of a step stands at position prefix + i; every row sees itself, but for masks that say otherwise.

Shape suffixes: B batch, H heads, S query rows, T keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from fuzz.inputs import Inputs
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a mask is made for. b, s, t: sizes. n: rows before this step, as the graph has it; prefix: as an int."""

    b: int
    s: int
    t: int
    n: Tensor | int
    prefix: int

    @property
    def rows(self) -> Tensor:
        return (torch.arange(self.s) + self.n)[:, None]

    @property
    def keys(self) -> Tensor:
        return torch.arange(self.t)[None, :]


Mask = Callable[[Extent, Inputs], Tensor]


def causal(e: Extent, given: Inputs) -> Tensor:
    return e.keys <= e.rows


def _triangle(e: Extent, given: Inputs) -> Tensor:
    return torch.ones(e.s, e.t, dtype=torch.bool).tril(e.prefix)


def _upper_triangle(e: Extent, given: Inputs) -> Tensor:
    return ~torch.ones(e.s, e.t).triu(e.prefix + 1).bool()


def _grids(e: Extent, given: Inputs) -> Tensor:
    """As transformers does: conditions over index grids, and-ed and expanded."""
    rows, keys = e.rows[None, None], e.keys[None, None]
    seen = rows.new_ones((), dtype=torch.bool) & (keys <= rows)
    return seen.expand(e.b, -1, e.s, e.t)


def _counted(e: Extent, given: Inputs) -> Tensor:
    """Positions by cumsum."""
    return e.keys <= (torch.ones(e.s, dtype=torch.long).cumsum(0) - 1 + e.n)[:, None]


def _window(w: int) -> Mask:
    return lambda e, given: (e.keys <= e.rows) & (e.keys > e.rows - w)


def _padding(e: Extent, given: Inputs) -> Tensor:
    """Some keys of each sequence are hidden, its first never."""
    shown = given.flags(e.b, e.t) | (torch.arange(e.t) == 0)
    return causal(e, given) & shown[:, None, None, :]


def _left_padding(e: Extent, given: Inputs) -> Tensor:
    """Rows at the start of a sequence see themselves alone."""
    first = given.integers(3, e.b)
    shown = torch.arange(e.t) >= first[:, None]
    return (causal(e, given) & shown[:, None, None, :]) | (e.keys == e.rows)


def _shared_by_rows(e: Extent, given: Inputs) -> Tensor:
    """[B, 1, 1, T]: no row of its own."""
    return (given.flags(e.b, e.t) | (torch.arange(e.t) == 0))[:, None, None, :]


def _prefix_lm(e: Extent, given: Inputs) -> Tensor:
    return causal(e, given) | (e.keys < 2)


def _documents(e: Extent, given: Inputs) -> Tensor:
    document = given.flags(e.b, e.t).long().cumsum(-1)
    own = document[:, e.t - e.s :] if e.prefix + e.s == e.t else document[:, e.prefix : e.prefix + e.s]
    return causal(e, given) & (own[:, None, :, None] == document[:, None, None, :])


def _chunks(e: Extent, given: Inputs) -> Tensor:
    return causal(e, given) & (e.keys // 3 == e.rows // 3)


def _positions_given(e: Extent, given: Inputs) -> Tensor:
    """Positions that are an input, and no plain ones."""
    at = torch.arange(e.s) + e.n - given.integers(2, e.s)
    return (e.keys <= at.clamp(min=0)[:, None]) | (e.keys == 0)


def _given(e: Extent, given: Inputs) -> Tensor:
    return given.flags(e.s, e.t) | (e.keys == e.rows)


def _whole_given(e: Extent, given: Inputs) -> Tensor:
    """[B, 1, S, T], as it is."""
    return given.flags(e.b, 1, e.s, e.t) | (e.keys == e.rows)


def _everything(e: Extent, given: Inputs) -> Tensor:
    return torch.ones(e.s, e.t, dtype=torch.bool)


def _transposed(e: Extent, given: Inputs) -> Tensor:
    return (torch.arange(e.t)[:, None] <= (torch.arange(e.s) + e.n)[None, :]).transpose(0, 1)


PLAIN: dict[str, Mask] = {
    "k <= q": causal,
    "q >= k": lambda e, given: e.rows >= e.keys,
    "k < q + 1": lambda e, given: e.keys < e.rows + 1,
    "q - k >= 0": lambda e, given: e.rows - e.keys >= 0,
    "not k > q": lambda e, given: ~(e.keys > e.rows),
    "grids": _grids,
    "counted": _counted,
    "transposed": _transposed,
    "window of 1": _window(1),
    "window of 3": _window(3),
    "window of 9": _window(9),
    "window by distance": lambda e, given: (e.keys <= e.rows) & (e.rows - e.keys < 4),
}
"""Causal, with or without a window: read as such, or rows of them are built."""

OTHER: dict[str, Mask] = {
    "triangle": _triangle,
    "upper triangle": _upper_triangle,
    "padding": _padding,
    "left padding": _left_padding,
    "shared by rows": _shared_by_rows,
    "prefix lm": _prefix_lm,
    "documents": _documents,
    "chunks": _chunks,
    "positions given": _positions_given,
    "given": _given,
    "whole, given": _whole_given,
    "everything": _everything,
    "window from both sides": lambda e, given: (e.keys - e.rows).abs() <= 2,
}

MASKS: dict[str, Mask] = PLAIN | OTHER


# -- how hidden keys are told to attention -----------------------------------------------------------------------------


def _at_infinity(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(seen, torch.zeros((), dtype=dtype), float("-inf"))


def _at_least(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(seen, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def _filled(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))


def _product(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return (1.0 - seen.to(dtype)) * -1e9


ADDED: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "where -inf": _at_infinity,
    "where least": _at_least,
    "filled": _filled,
    "product": _product,
}


def bias_by_distance(e: Extent, heads: int, dtype: torch.dtype) -> Tensor:
    """ALiBi: [H, S, T], more the farther a key is away."""
    slopes = 2.0 ** -(torch.arange(heads).to(dtype) + 1)
    return slopes[:, None, None] * (e.keys - e.rows).to(dtype)
