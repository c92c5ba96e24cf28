"""Where keys and values of a step go before attention reads them: caches in the forms that models have.

Shape suffixes: B batch, G key/value heads, S tokens, T rows of the cache, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from fuzz.inputs import Inputs
from torch import Tensor

SPARE = 2  # rows of a cache behind this step's


@dataclasses.dataclass(frozen=True)
class Rows:
    """Keys or values of a step, and where they go.

    Attributes:
        new: [B, G, S, D].
        prefix: rows that are in the cache.
        n: the same as the graph has it: the int, or an input.
    """

    new: Tensor
    prefix: int
    n: Tensor | int

    def at(self) -> Tensor:
        """Slots [S]."""
        return torch.arange(self.new.shape[2]) + self.n


Cache = Callable[[Rows, Inputs], tuple[Tensor, Tensor | None]]
"""-> what attention reads [B, G, T, D], and the cache where it is an output."""


def _buffer(rows: Rows, given: Inputs, tokens_dim: int = 2) -> Tensor:
    """A full cache: nothing may read or overwrite what lies behind."""
    b, g, s, d = rows.new.shape
    t = rows.prefix + s + SPARE
    return given.normal(*((b, g, t, d) if tokens_dim == 2 else (b, t, g, d)))


def _none(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    return rows.new, None


def _grown(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    b, g, _, d = rows.new.shape
    whole = torch.cat([given.normal(b, g, rows.prefix, d), rows.new], 2)
    return whole, whole


def _index_copy(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    cache = _buffer(rows, given).index_copy(2, rows.at(), rows.new)
    return cache, cache


def _index_copy_in_place(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    return _buffer(rows, given).index_copy_(2, rows.at(), rows.new), None


def _index_put(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    cache = _buffer(rows, given)
    cache[:, :, rows.at()] = rows.new
    return cache, None


def _slice(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    cache = _buffer(rows, given)
    cache[:, :, rows.prefix : rows.prefix + rows.new.shape[2]] = rows.new
    return cache, None


def _narrow(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    cache = _buffer(rows, given)
    cache.narrow(2, rows.prefix, rows.new.shape[2]).copy_(rows.new)
    return cache, None


def _slice_scatter(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    end = rows.prefix + rows.new.shape[2]
    cache = torch.slice_scatter(_buffer(rows, given), rows.new, 2, rows.prefix, end)
    return cache, cache


def _filled_rows(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    """Attention reads no more than what is filled."""
    cache = _buffer(rows, given).index_copy_(2, rows.at(), rows.new)
    return cache[:, :, : rows.prefix + rows.new.shape[2]], None


def _heads_behind(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    """A cache [B, T, G, D]."""
    cache = _buffer(rows, given, 1)
    cache.index_copy_(1, rows.at(), rows.new.transpose(1, 2))
    return cache.transpose(1, 2), None


def _scatter(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    """A write that names a slot for every element."""
    slots = rows.at()[None, None, :, None].expand(rows.new.shape)
    cache = _buffer(rows, given).scatter(2, slots, rows.new)
    return cache, cache


def _two_writes(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    """Its first row is written again, as it was."""
    cache = _buffer(rows, given).index_copy(2, rows.at(), rows.new)
    cache = cache.index_copy(2, rows.at()[:1], rows.new[:, :, :1])
    return cache, cache


def _returned(rows: Rows, given: Inputs) -> tuple[Tensor, Tensor | None]:
    """No cache; the step's rows are an output."""
    return rows.new, rows.new


CACHES: dict[str, Cache] = {
    "none": _none,
    "cat": _grown,
    "index_copy": _index_copy,
    "index_copy_": _index_copy_in_place,
    "index_put_": _index_put,
    "slice assigned": _slice,
    "narrow, copy_": _narrow,
    "slice_scatter": _slice_scatter,
    "filled rows": _filled_rows,
    "heads behind": _heads_behind,
    "scatter": _scatter,
    "two writes": _two_writes,
    "returned": _returned,
}
WITHOUT_PREFIX = {"none", "returned"}
WITH_SPARE_ROWS = set(CACHES) - WITHOUT_PREFIX - {"cat", "filled rows"}
