"""A graph before and after, side by side: which nodes stand in the same row."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Sequence

from cppass.inspection.views import NodeView

Row = tuple[int | None, int | None]


def rows_of(before: Sequence[NodeView], after: Sequence[NodeView]) -> list[Row]:
    """Positions (before, after) of every row, both in graph order; None where a node has no counterpart.

    The k-th call of an op in a module is taken for the k-th call of that op in the same module. What that leaves
    crossing is not paired: of all pairs, the longest run that keeps the order of both graphs.
    """
    places = {key: j for j, key in enumerate(_keys(after))}
    pairs = [(i, places[key]) for i, key in enumerate(_keys(before)) if key in places]
    rows: list[Row] = []
    b = a = 0
    for i, j in [*_increasing(pairs), (len(before), len(after))]:
        rows += [(n, None) for n in range(b, i)] + [(None, n) for n in range(a, j)]
        if i < len(before):
            rows.append((i, j))
        b, a = i + 1, j + 1
    return rows


VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape")
"""A view of local rows may have other strides, and becomes a reshape then."""


def _keys(nodes: Sequence[NodeView]) -> list[tuple[str, str, int]]:
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    keys = []
    for node in nodes:
        kind = node.name if node.op in ("input", "attribute") else node.op.rpartition(".")[0] or node.op
        kind = "aten.view" if kind in VIEWS else "attention" if node.role == "attention" else kind
        where = (node.module, kind)
        keys.append((*where, seen[where]))
        seen[where] += 1
    return keys


def _increasing(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence whose second numbers increase, too (patience sorting)."""
    ends: list[int] = []  # ends[n]: the least last j of a subsequence of n + 1 pairs
    last: list[int] = []  # and the pair that it is of
    previous: list[int] = []
    for index, (_, j) in enumerate(pairs):
        n = bisect.bisect_left(ends, j)
        previous.append(last[n - 1] if n else -1)
        ends[n : n + 1], last[n : n + 1] = [j], [index]
    chosen, index = [], last[-1] if last else -1
    while index >= 0:
        chosen.append(pairs[index])
        index = previous[index]
    return chosen[::-1]
