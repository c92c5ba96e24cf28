"""Two calls instead of one: what each of a rank's zigzag halves asks of the fused-infer-attention op.

A half is a block of every sequence. A query row sees the keys it saw before if its half ends the key/value range where
its block ends: causal masks of the op count from the last query and the last key (bottom-right).

    one device   q_lengths [8]    kv_lengths [40]     32 tokens are in the cache, 8 are new
    rank 0 of 2  prev: rows 0..1  q [2] kv [34]       next: rows 6..7  q [2] kv [40]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from cppass.layout import Half, Zigzag


@dataclasses.dataclass(frozen=True)
class HalfCall:
    """One of the two calls. Numbers are ints, SymInts or graph numbers.

    Attributes:
        rows: query rows in the token axis.
        q_lengths, kv_lengths: as the op takes them; None where they are the whole axis.
        kv_spans: dense TND: (first row, rows) of the keys and values each sequence needs; None where they stay whole.
        sparse_mode: of the call.
    """

    rows: Any
    q_lengths: list[Any] | None
    kv_lengths: list[Any] | None
    kv_spans: list[tuple[Any, Any]] | None
    sparse_mode: int


CAUSAL = {2: 3, 3: 3, 4: 4}  # sparse mode -> that of a half: its block's rows no longer start at the first key


def half_call(
    layout: Zigzag,
    rank: int,
    half: Half,
    *,
    input_layout: str,
    paged: bool,
    q_lengths: Sequence[Any] | None,
    kv_lengths: Sequence[Any] | None,
    kv_rows: Any,
    sparse_mode: int,
) -> HalfCall:
    """The call of one half.

    Args:
        q_lengths, kv_lengths: those of the call on one device, as the op takes them.
        kv_rows: rows of dense keys; what a missing kv_lengths means.
    """
    causal, mode = sparse_mode in CAUSAL, CAUSAL.get(sparse_mode, sparse_mode)
    if input_layout == "TND":
        assert kv_lengths is not None
        return _varlen(layout, rank, half, paged, kv_lengths, causal, mode)
    return _batched(layout, rank, half, q_lengths, kv_lengths, kv_rows, causal, mode)


def _varlen(
    layout: Zigzag, rank: int, half: Half, paged: bool, kv_lengths: Sequence[Any], causal: bool, mode: int
) -> HalfCall:
    """TND: query lengths cumulative; key/value lengths per sequence where paged, else cumulative."""
    rows, ends = layout.half_rows(rank, half), layout.half_ends(rank, half)
    starts = [0, *kv_lengths[:-1]]
    whole = list(kv_lengths) if paged else [end - start for start, end in zip(starts, kv_lengths, strict=True)]
    seen = [kv - length + end for kv, length, end in zip(whole, layout.lengths, ends, strict=True)]
    seen = seen if causal else whole
    spans = None if paged or not causal else list(zip(starts, seen, strict=True))
    return HalfCall(_last(rows), _ends(rows), seen if paged else _ends(seen), spans, mode)


def _batched(
    layout: Zigzag,
    rank: int,
    half: Half,
    q_lengths: Sequence[Any] | None,
    kv_lengths: Sequence[Any] | None,
    kv_rows: Any,
    causal: bool,
    mode: int,
) -> HalfCall:
    """BSH, BSND, BNSD: every sequence is padded to the same number of rows; lengths per sequence, or one for all."""
    (tokens,), (rows,), (end,) = layout.lengths, layout.half_rows(rank, half), layout.half_ends(rank, half)
    start = end - rows
    count = max(len(q_lengths or ()), len(kv_lengths or ()), 1)
    queries = _each(q_lengths, tokens, count)
    keys = _each(kv_lengths, kv_rows, count)
    if causal:
        keys = [kv - (q - end if q is tokens else max(q - end, 0)) for q, kv in zip(queries, keys, strict=True)]
    own = [min(max(q - start, 0), rows) for q in queries] if q_lengths is not None else None
    return HalfCall(rows, own, keys if causal or kv_lengths is not None else None, None, mode)


def _each(lengths: Sequence[Any] | None, whole: Any, count: int) -> list[Any]:
    given = [whole] if lengths is None else list(lengths)
    return given * count if len(given) == 1 else given


def _ends(lengths: list[Any]) -> list[Any]:
    return list(itertools.accumulate(lengths))


def _last(lengths: list[Any]) -> Any:
    return _ends(lengths)[-1]
