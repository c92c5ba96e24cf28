"""Where rows are, as index tensors in the graph: made once, shared by all layers. No device-to-host copy.

With known lengths they are constants. With symbolic ones they are arithmetic on arange: sizes that may be 0 or 1, which
torch would give graphs of their own, never appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from cppass.arithmetic import node_of
from cppass.emitter import Emitter
from cppass.layout import Zigzag

aten = torch.ops.aten

Span = tuple[Any, Any]  # (first row, rows)
Piece = tuple[Any, Any]  # (start, value there)


class Rows:
    """The index tensors of one graph, int64.

    Args:
        rank: this rank's number.
        device: where the graph's tensors are.
    """

    def __init__(self, emit: Emitter, rank: int, device: torch.device) -> None:
        self.emit, self.rank, self.device = emit, rank, device
        self.made: dict[tuple[Any, ...], fx.Node] = {}

    def layout(self, lengths: Iterable[Any], cp_size: int, even: bool) -> Zigzag:
        """The layout that a canonical op names, its lengths as ints and numbers of the graph."""
        return Zigzag(tuple(self.emit.numbers(n) for n in lengths), cp_size, even)

    def local(self, layout: Zigzag) -> fx.Node:
        """Natural rows of this rank's rows [m]; padding takes any row that is there."""

        def pieces() -> list[Piece]:
            found, last = _placed(layout.spans(self.rank)), layout.tokens - 1
            if layout.even or not isinstance(layout.local_rows, int):
                return found
            return found + [(row, last) for row in range(layout.real_rows(self.rank), layout.local_rows)]

        index = self._made("local", layout, layout.local_rows, pieces)
        if layout.even or isinstance(layout.local_rows, int):
            return index
        last = node_of(layout.tokens - 1)
        return self.once(("clamped", index), lambda: self.emit(aten.clamp.default, index, None, last))

    def restored(self, layout: Zigzag) -> fx.Node:
        """Where natural rows are among gathered rows [S]."""
        m = layout.local_rows

        def pieces() -> list[Piece]:
            return _placed((m * rank + first, rows) for rank, first, rows in layout.homes())

        return self._made("restored", layout, layout.tokens, pieces)

    def gathered(self, layout: Zigzag) -> fx.Node:
        """Natural rows of gathered rows [S], of an even layout."""

        def pieces() -> list[Piece]:
            return _placed(span for rank in range(layout.cp_size) for span in layout.spans(rank))

        return self._made("gathered", layout, layout.tokens, pieces)

    def spans(self, spans: list[Span]) -> fx.Node:
        """The rows of some spans, one after the other."""
        total = sum(rows for _, rows in spans)
        return self._made("spans", [n for span in spans for n in span], total, lambda: _placed(spans))

    def homes_of(self, layout: Zigzag, index: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(rank, local row on that rank) of the natural rows that `index` [n] names."""
        homes = list(layout.homes())
        held = _placed((rank, rows) for rank, _, rows in homes)
        firsts = _placed((first, rows) for _, first, rows in homes)
        if not isinstance(layout.tokens, int):
            return self._mapped(index, held, slope=0), self._mapped(index, firsts, slope=1)
        tables = [_values(held, layout.tokens, 0), _values(firsts, layout.tokens)]
        rank, row = (self.emit.constant(table, self.device) for table in tables)
        return self.emit(aten.index_select.default, rank, 0, index), self.emit(aten.index_select.default, row, 0, index)

    # -- piecewise functions of row numbers --

    def _made(self, name: str, of: Any, size: Any, pieces: Callable[[], list[Piece]]) -> fx.Node:
        """The piecewise function of 0, 1, ... size - 1, made once."""
        numbers = of.lengths if isinstance(of, Zigzag) else of

        def make() -> fx.Node:
            found = pieces()
            if isinstance(size, int) and all(isinstance(n, int) for piece in found for n in piece):
                return self.emit.constant(_values(found, size), self.device)
            counted = self.emit(aten.arange.default, node_of(size), dtype=torch.int64, device=self.device)
            return self._mapped(counted, found, slope=1)

        return self.once((name, *(node_of(n) for n in numbers)), make)

    def once(self, key: tuple[Any, ...], make: Callable[[], fx.Node]) -> fx.Node:
        """What `make` emits, the first time it is asked for."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def _mapped(self, x: fx.Node, pieces: list[Piece], slope: int) -> fx.Node:
        """f(x), where f(x) = value + slope * (x - start) from each piece's start on; starts do not decrease.

        before:  pieces (0, 5), (3, 9), slope 1        after:  x + 5 + (x >= 3) * 1        0 1 2 3 4 -> 5 6 7 9 10
        """
        offsets = [value - start * slope for start, value in pieces]
        result = x if slope else self.emit(aten.mul.Tensor, x, 0)
        if not _is_none(offsets[0]):
            result = self.emit(aten.add.Tensor, result, node_of(offsets[0]))
        for (start, _), before, here in zip(pieces[1:], offsets, offsets[1:], strict=False):
            step = here - before
            if _is_none(step):
                continue
            reached = self.emit(aten._to_copy.default, self.emit(aten.ge.Scalar, x, node_of(start)), dtype=torch.int64)
            result = self.emit(aten.add.Tensor, result, self.emit(aten.mul.Tensor, reached, node_of(step)))
        return result


def _placed(spans: Iterable[Span]) -> list[Piece]:
    """Spans, one after the other, as (where it starts among them, its first row); those known to be empty left out."""
    pieces: list[Piece] = []
    start: Any = 0
    for first, rows in spans:
        if not _is_none(rows):
            pieces.append((start, first))
            start = start + rows
    return pieces


def _is_none(number: Any) -> bool:
    return isinstance(number, int) and number == 0


def _values(pieces: list[Piece], size: int, slope: int = 1) -> list[int]:
    ends = [start for start, _ in pieces[1:]] + [size]
    spans = zip(pieces, ends, strict=True)
    return [first + slope * row for (start, first), end in spans for row in range(end - start)]
