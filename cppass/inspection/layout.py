"""The rows of every rank in the call that was explained, as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from cppass.inspection.views import LayoutView, RankRows
from cppass.layout import Zigzag
from cppass.pipeline import Stages
from cppass.plan import CPPlan
from cppass.sharded_ops import layout_of
from cppass.tokens import Size, size_of


def layout_view(stages: Stages, hints: Mapping[sympy.Symbol, int]) -> LayoutView | None:
    """The layout of a graph that was planned, symbols replaced by what they were; None where they are not known."""
    plan = stages.plan
    if plan is None or not plan.sites:
        return None
    if isinstance(plan, CPPlan):
        layout = plan.step.layout
        lengths = [number(length, hints) for length in layout.lengths]
        if None in lengths:
            return None
        layout = dataclasses.replace(layout, lengths=tuple(lengths))
    else:
        ends = [number(_size(end), hints) for end in plan.ends]
        rows = number(plan.rows, hints)
        if None in ends or rows is None:
            return None
        layout = layout_of(ends, plan.cp_size, plan.remainder, rows)
    return describe(layout)


def describe(layout: Zigzag) -> LayoutView:
    """A layout of known lengths."""
    prefixes = (0,) * len(layout.lengths)
    pairs = [layout.attention_pairs(rank, prefixes) for rank in range(layout.cp_size)]
    ranks = []
    for rank in range(layout.cp_size):
        spans = list(layout.spans(rank))
        halves = [0] * len(layout.lengths) + [1] * len(layout.lengths)
        pieces = tuple((half, first, rows) for half, (first, rows) in zip(halves, spans, strict=True) if rows)
        ranks.append(RankRows(rank, pieces, layout.real_rows(rank), pairs[rank] / max(1, sum(pairs))))
    return LayoutView(layout.tokens, layout.lengths, layout.cp_size, layout.local_rows, tuple(ranks))


def number(size: Size, hints: Mapping[sympy.Symbol, int]) -> int | None:
    """A size with its symbols replaced by their values; None where one of them has none."""
    if isinstance(size, int):
        return size
    value = size.xreplace({symbol: sympy.Integer(n) for symbol, n in hints.items()})
    return int(value) if value.is_number else None


def _size(end: Any) -> Size:
    value: int | torch.SymInt = end.meta["val"] if isinstance(end, fx.Node) else end
    return size_of(value)
