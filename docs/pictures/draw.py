"""Draws the pictures of docs/how-it-works.md from cppass.layout: python docs/pictures/draw.py

tests/documentation/test_pictures.py holds that the files are what this draws.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cppass.layout import block_owner, blocks, zigzag

FOLDER = Path(__file__).parent
RANKS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1")
WHOLE, INK, FAINT, PAPER = "#9aa3ad", "#1f2933", "#e4e7eb", "#ffffff"


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """One SVG on white paper, so that it reads on light and dark pages."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}" font-family="sans-serif" font-size="13">'
    )
    paper = f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    return "\n".join((head, f"<title>{title}</title>", paper, *parts, "</svg>\n"))


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = PAPER) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{edge}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal", fill: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}">{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A horizontal or vertical arrow."""
    dx, dy = (5 if x2 > x1 else 0), (5 if y2 > y1 else 0)
    tip = f"{x2:g},{y2:g} {x2 - dx - dy * 0.8:g},{y2 - dy - dx * 0.8:g} {x2 - dx + dy * 0.8:g},{y2 - dy + dx * 0.8:g}"
    line = f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}"/>'
    return f'{line}<polygon points="{tip}" fill="{INK}"/>'


# -- who computes which part of a causal mask --------------------------------------------------------------------------


def zigzag_picture(cp_size: int = 4) -> str:
    """The score matrix of one prompt in blocks of queries (rows) and keys, coloured by the rank that computes them."""
    n, side = blocks(cp_size), 24
    layout = zigzag((n,), cp_size)
    work = {"zigzag": [layout.attention_pairs(rank, (0,)) for rank in range(cp_size)]}
    work["contiguous"] = [sum(row + 1 for row in range(2 * rank, 2 * rank + 2)) for rank in range(cp_size)]
    owners: dict[str, Callable[[int], int]] = {
        "contiguous": lambda row: row // 2,
        "zigzag": lambda row: block_owner(row, cp_size)[0],
    }
    parts = []
    for place, name in enumerate(owners):
        left = 40 + place * 340
        parts.append(text(left, 28, f"{name} blocks, P = {cp_size}", weight="bold"))
        for row in range(n):
            rank = owners[name](row)
            parts += [box(left + key * side, 44 + row * side, side, side, RANKS[rank]) for key in range(row + 1)]
            hidden = range(row + 1, n)
            parts += [box(left + key * side, 44 + row * side, side, side, FAINT) for key in hidden]
            parts.append(text(left + n * side + 10, 61 + row * side, f"rank {rank}"))
        bottom = 44 + n * side + 22
        parts.append(text(left, bottom, "work of the ranks: " + ", ".join(map(str, work[name])) + " blocks"))
        busiest = max(work[name]) * cp_size / sum(work[name])
        parts.append(text(left, bottom + 20, f"busiest / mean: {busiest:.2f}"))
    parts.append(text(20, 44 + n * side / 2, "queries", "middle").replace("<text", _turned(20, 44 + n * side / 2)))
    return picture(700, 44 + n * side + 60, f"Causal attention over {n} blocks, shared by {cp_size} ranks", *parts)


def _turned(x: float, y: float) -> str:
    return f'<text transform="rotate(-90 {x:g} {y:g})"'


# -- the stages --------------------------------------------------------------------------------------------------------

STAGES = (
    ("find", "match/", "AttentionSite", "what attention"),
    ("shard", "shard.py", "Propagation", "what can be local"),
    ("plan", "plan.py", "CPPlan", "what is demanded"),
    ("rewrite", "rewrite.py", "cppass:: ops", "the only editor"),
    ("verify", "verify.py", "checked again", "illegal: an error"),
    ("lower", "lowering/", "the rank enters", "host or npu"),
)


def stages_picture() -> str:
    """Each stage: its name, where it is, what it returns."""
    parts = [text(20, 28, "aten graph of AOTAutograd", weight="bold")]
    for i, (name, where, returns, what) in enumerate(STAGES):
        x = 20 + i * 150
        fill = "#dbe7f3" if i < 5 else "#fde3c8"
        parts.append(box(x, 44, 130, 92, fill, "#b8c4d0"))
        parts.append(text(x + 65, 66, name, "middle", "bold"))
        parts += [text(x + 65, 86 + 20 * j, words, "middle") for j, words in enumerate((where, returns, what))]
        if i:
            parts.append(arrow(x - 18, 90, x - 2, 90))
    parts.append(text(20, 160, "the same text on every rank, without a rank in it"))
    parts.append(text(20 + 5 * 150 + 130, 160, "inner compiler", "end"))
    return picture(20 + 6 * 150, 176, "Stages of the pass", *parts)


# -- one layer, before and after ---------------------------------------------------------------------------------------

LAYER = (  # op, rows on rank 0 of 2 after the pass ("local", "whole", "one"), note
    ("token ids", "whole", "every rank is handed the same"),
    ("embedding", "local", "sharded where it is cheapest"),
    ("norm, q k v projections, rope", "local", "1/P of the matrix products"),
    ("k and v of the layer", "whole", "gathered: one collective a layer"),
    ("KV cache write", "whole", "every rank has the whole cache"),
    ("attention", "local", "own queries, two halves, all keys they see"),
    ("output projection, MLP, residual", "local", "1/P of the matrix products"),
    ("last hidden row", "one", "one row travels, not all"),
    ("LM head", "one", "computed on every rank"),
)


def layer_picture() -> str:
    """Rows of each value, as the width of a bar: one device, and rank 0 of two."""
    name, before, after, width = 20, 250, 430, 140
    layout = zigzag((8,), 2)
    parts = [text(before, 28, "one device", weight="bold"), text(after, 28, "rank 0 of 2", weight="bold")]
    for i, (op, rows, note) in enumerate(LAYER):
        y = 44 + 30 * i
        parts.append(text(name, y + 14, op))
        parts.append(box(before, y, 6 if rows == "one" else width, 20, WHOLE))
        if rows == "local":
            cell = width / 8
            parts.append(box(after, y, width, 20, FAINT))
            parts += [box(after + cell * p, y, cell, 20, RANKS[0]) for p in layout.positions(0) if p is not None]
        else:
            parts.append(box(after, y, 6 if rows == "one" else width, 20, WHOLE))
        parts.append(text(after + width + 20, y + 14, note))
    y = 44 + 30 * len(LAYER) + 16
    parts += [box(name, y, 14, 14, WHOLE), text(name + 22, y + 12, "whole: all rows, the same on every rank")]
    parts += [box(name + 290, y, 14, 14, RANKS[0]), text(name + 312, y + 12, "local: this rank's zigzag rows")]
    return picture(880, y + 30, "Rows of each value in one layer", *parts)


PICTURES = {"zigzag.svg": zigzag_picture, "stages.svg": stages_picture, "layer.svg": layer_picture}


def main() -> None:
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
