"""Where rows are, as index tensors in the graph: made once, shared by all layers. No device-to-host copy.

With known lengths they are constants; with symbolic ones they are cut from arange by the lengths' arithmetic.
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
        """Natural rows of this rank's rows [m]; padding repeats the last token."""
        padding = layout.local_rows - layout.real_rows(self.rank) if not layout.even else 0
        tail = [("repeat", layout.tokens - 1, padding)]
        return self._index("local", layout, lambda: [("count", *s) for s in layout.spans(self.rank)] + tail)

    def restored(self, layout: Zigzag) -> fx.Node:
        """Where natural rows are among gathered rows [S]."""
        m = layout.local_rows
        return self._index(
            "restored", layout, lambda: [("count", m * rank + first, rows) for rank, first, rows in layout.homes()]
        )

    def home_ranks(self, layout: Zigzag) -> fx.Node:
        """The rank that holds each natural row [S]."""
        return self._index("ranks", layout, lambda: [("repeat", rank, rows) for rank, _, rows in layout.homes()])

    def home_rows(self, layout: Zigzag) -> fx.Node:
        """The local row, on its rank, of each natural row [S]."""
        return self._index("rows", layout, lambda: [("count", first, rows) for _, first, rows in layout.homes()])

    def gathered(self, layout: Zigzag) -> fx.Node:
        """Natural rows of gathered rows [S], of an even layout."""
        every = [span for rank in range(layout.cp_size) for span in layout.spans(rank)]
        return self._index("gathered", layout, lambda: [("count", *span) for span in every])

    def spans(self, spans: list[Span]) -> fx.Node:
        """The rows of some spans, one after the other."""
        return self._index("spans", tuple(node_of(n) for s in spans for n in s), lambda: [("count", *s) for s in spans])

    def span(self, first: int | fx.Node, count: int | fx.Node) -> fx.Node:
        return self.spans([(self.emit.numbers(first), self.emit.numbers(count))])

    def _index(self, name: str, of: Any, pieces: Callable[[], list[tuple[str, Any, Any]]]) -> fx.Node:
        key = (name, *(node_of(n) for n in of.lengths)) if isinstance(of, Zigzag) else (name, *of)
        if key not in self.made:
            self.made[key] = self._joined([p for p in pieces() if not (isinstance(p[2], int) and p[2] == 0)])
        return self.made[key]

    def _joined(self, pieces: list[tuple[str, Any, Any]]) -> fx.Node:
        if all(isinstance(n, int) for _, first, rows in pieces for n in (first, rows)):
            values = [v for kind, first, rows in pieces for v in _values(kind, first, rows)]
            return self.emit.constant(values, self.device)
        parts = [self._part(kind, first, rows) for kind, first, rows in pieces]
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, parts)

    def _part(self, kind: str, first: Any, rows: Any) -> fx.Node:
        how = {"dtype": torch.int64, "device": self.device}
        if kind == "repeat":
            counted = self.emit(aten.arange.start, 0, node_of(rows), **how)
            zeros = self.emit(aten.mul.Tensor, counted, 0)
            return self.emit(aten.add.Tensor, zeros, node_of(first))
        return self.emit(aten.arange.start, node_of(first), node_of(first + rows), **how)


def _values(kind: str, first: int, rows: int) -> list[int]:
    return [first] * rows if kind == "repeat" else list(range(first, first + rows))
