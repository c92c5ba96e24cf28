"""Coordinates of the page's two drawings; the template turns them into SVG."""

from __future__ import annotations

import math
from typing import Any

from cppass.inspection.units import octets, seconds
from cppass.inspection.views import CostView, LayoutView

RANKS_DRAWN = 16
LAYOUT_LEFT, LAYOUT_WIDTH, ROW, GAP = 64.0, 900.0, 22.0, 8.0
LEFT, TOP, WIDTH, HEIGHT = 72.0, 16.0, 820.0, 280.0


def layout_picture(layout: LayoutView) -> dict[str, Any]:
    """A row for each rank over an axis of the step's tokens: where its rows are."""
    scale = LAYOUT_WIDTH / max(1, layout.tokens)
    ranks = []
    for rank in layout.ranks[:RANKS_DRAWN]:
        pieces = [
            {
                "x": LAYOUT_LEFT + first * scale,
                "width": max(1.0, rows * scale),
                "half": half,
                "text": f"rows {first:,} to {first + rows - 1:,}",
                "label": f"{rows:,}" if rows * scale > 48 else "",
            }
            for half, first, rows in rank.spans
        ]
        y = ROW + GAP + rank.rank * (ROW + GAP)
        padding = layout.local_rows - rank.rows
        ranks.append({"rank": rank.rank, "y": y, "pieces": pieces, "share": f"{rank.share:.1%}", "padding": padding})
    ends, total = [], 0
    for length in layout.lengths[:-1]:
        total += length
        ends.append(LAYOUT_LEFT + total * scale)
    bottom = ROW + GAP + len(ranks) * (ROW + GAP)
    return {
        "left": LAYOUT_LEFT,
        "right": LAYOUT_LEFT + LAYOUT_WIDTH,
        "width": LAYOUT_LEFT + LAYOUT_WIDTH + 64,
        "height": bottom + 4,
        "row": ROW,
        "ranks": ranks,
        "ends": ends,
        "tokens": layout.tokens,
        "lengths": layout.lengths,
        "local_rows": layout.local_rows,
        "left_out": len(layout.ranks) - len(ranks),
    }


def cost_picture(cost: CostView) -> dict[str, Any]:
    """Seconds over tokens on log axes: one device, P ranks, where they meet, and the explained call."""
    tokens = [n for n, _, _ in cost.curve]
    times = [t for _, one, ranks in cost.curve for t in (one, ranks)] + [cost.one_device, cost.on_ranks]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    first, last = math.log2(min(*tokens, cost.tokens)), math.log2(max(*tokens, cost.tokens))

    def x(n: float) -> float:
        return round(LEFT + (math.log2(n) - first) / (last - first) * WIDTH, 1)

    def y(t: float) -> float:
        return round(TOP + (high - math.log10(t)) / max(1, high - low) * HEIGHT, 1)

    powers = range(math.ceil(first), math.floor(last) + 1)
    return {
        "view": cost,
        "ratio": cost.one_device / cost.on_ranks,
        "left": LEFT,
        "top": TOP,
        "right": LEFT + WIDTH,
        "bottom": TOP + HEIGHT,
        "width": LEFT + WIDTH + 96,
        "height": TOP + HEIGHT + 48,
        "one": " ".join(f"{x(n)},{y(t)}" for n, t, _ in cost.curve),
        "ranks": " ".join(f"{x(n)},{y(t)}" for n, _, t in cost.curve),
        "one_end": y(cost.curve[-1][1]),
        "ranks_end": y(cost.curve[-1][2]),
        "x_ticks": [(x(2**p), _tokens(2**p)) for p in powers if p % 3 == 0],
        "y_ticks": [(y(10.0**p), seconds(10.0**p)) for p in range(low, high + 1, 1 if high - low < 7 else 2)],
        "here": (x(cost.tokens), y(cost.one_device), y(cost.on_ranks)),
        "break_even": x(cost.break_even) if cost.break_even and cost.break_even <= 2**last else None,
        "gathered": octets(cost.gather_bytes_per_token),
    }


def _tokens(n: int) -> str:
    """ "512", "4K", "1M" """
    return f"{n >> 20}M" if n >= 2**20 else f"{n >> 10}K" if n >= 2**10 else str(n)
