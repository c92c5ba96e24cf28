"""Section `layout`: how evenly ranks share attention, and what padding costs. Counted, not timed.

before:  contiguous blocks, P = 4      rank 0 | rank 1 | rank 2 | rank 3      the last rank works 2 - 1/P times the mean
after:   zigzag blocks                 0 1 2 3 3 2 1 0                        every rank the same
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from cppass.bench.table import Bars, Table
from cppass.demo.display import Display
from cppass.layout import Remainder, Zigzag

POLICIES = ("first", "balanced", "contiguous")
SHAPES = (
    ("1,024", (1024,), 8),
    ("4,096", (4096,), 8),
    ("33", (33,), 8),
    ("64 x 9", (9,) * 64, 4),
)
RANKS_OF_BATCHES = (2, 4, 8)
BATCH_TOKENS = 1000


@dataclasses.dataclass(frozen=True)
class Share:
    """How one step is shared.

    Attributes:
        pairs: (query, key) pairs of a causal mask that each rank computes.
        rows: rows of each rank, padding included.
        tokens: rows of the step.
    """

    pairs: tuple[int, ...]
    rows: int
    tokens: int

    @property
    def imbalance(self) -> Fraction:
        """Pairs of the busiest rank over the mean: 1 is perfect."""
        return Fraction(max(self.pairs) * len(self.pairs), sum(self.pairs))

    @property
    def padding(self) -> Fraction:
        """Rows of all ranks over the rows of the step: 1 is none."""
        return Fraction(self.rows * len(self.pairs), self.tokens)


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table; several steps give their median and their worst.

    Attributes:
        imbalance, padding: per policy, of every step.
    """

    lengths: str
    cp_size: int
    imbalance: dict[str, tuple[float, ...]]
    padding: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class LayoutResult:
    lines: tuple[Line, ...]

    def table(self) -> Table:
        return Table(
            "attention work of the busiest rank, and rows with padding",
            ("lengths", "P", "blocks", "work, max / mean", "rows, padded / real"),
            tuple(
                (line.lengths, str(line.cp_size), policy, _text(line.imbalance[policy]), _text(line.padding[policy]))
                for line in self.lines
                for policy in POLICIES
            ),
            (
                "Work is (query, key) pairs of a causal mask, the busiest rank over the mean; rows are those of all "
                "ranks over those of the step. Counted, not timed; 1 is ideal. Of many batches: median (worst).",
                "first and balanced are zigzag blocks with the two remainder policies of cppass.layout; contiguous "
                "cuts every sequence into P blocks, for which one long sequence gives 2 - 1/P.",
            ),
        )

    def bars(self) -> Bars:
        return Bars(
            "attention work of the busiest rank over the mean (1 is ideal)",
            "max / mean",
            tuple(f"{line.lengths}\nP={line.cp_size}" for line in self.lines),
            tuple((p, tuple(statistics.median(line.imbalance[p]) for line in self.lines)) for p in POLICIES),
            ideal=("ideal", (1.0,) * len(self.lines)),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> LayoutResult:
    batches = tuple(uneven_batches(20 if quick else 200))
    display.start("layout", len(SHAPES) + len(RANKS_OF_BATCHES))
    lines = []
    for name, lengths, cp_size in SHAPES:
        display.step(f"{name} tokens, P={cp_size}")
        lines.append(_line(name, (lengths,), cp_size))
    for cp_size in RANKS_OF_BATCHES:
        display.step(f"{len(batches)} uneven batches, P={cp_size}")
        lines.append(_line(f"{len(batches)} batches", batches, cp_size))
    display.finish()
    return LayoutResult(tuple(lines))


def zigzag_share(lengths: tuple[int, ...], cp_size: int, remainder: Remainder) -> Share:
    """Zigzag blocks. "first" has as many rows as its fullest rank, as cppass.runner has it."""
    layout = Zigzag(lengths, cp_size, remainder=remainder)
    pairs = tuple(layout.attention_pairs(rank, (0,) * len(lengths)) for rank in range(cp_size))
    fullest = max(layout.real_rows(rank) for rank in range(cp_size))
    return Share(pairs, layout.local_rows if remainder == "balanced" else fullest, sum(lengths))


def contiguous_share(lengths: tuple[int, ...], cp_size: int) -> Share:
    """P blocks of every sequence, the first L mod P of them a row longer; rank r owns block r."""
    pairs, rows = [0] * cp_size, [0] * cp_size
    for length in lengths:
        end = 0
        for rank in range(cp_size):
            own = (length + cp_size - 1 - rank) // cp_size
            end += own
            pairs[rank] += own * end - own * (own - 1) // 2
            rows[rank] += own
    return Share(tuple(pairs), max(rows), sum(lengths))


def uneven_batches(count: int) -> Iterator[tuple[int, ...]]:
    """Batches of about a thousand tokens: short, middle and long sequences at random, always the same ones."""
    rng = random.Random(0)
    for _ in range(count):
        lengths: list[int] = []
        while sum(lengths) < BATCH_TOKENS:
            lengths.append(rng.choice((rng.randrange(1, 9), rng.randrange(1, 200), rng.randrange(100, 700))))
        yield tuple(lengths)


def _line(name: str, steps: tuple[tuple[int, ...], ...], cp_size: int) -> Line:
    shares = {
        "first": [zigzag_share(lengths, cp_size, "first") for lengths in steps],
        "balanced": [zigzag_share(lengths, cp_size, "balanced") for lengths in steps],
        "contiguous": [contiguous_share(lengths, cp_size) for lengths in steps],
    }
    return Line(
        name,
        cp_size,
        {policy: tuple(float(s.imbalance) for s in found) for policy, found in shares.items()},
        {policy: tuple(float(s.padding) for s in found) for policy, found in shares.items()},
    )


def _text(values: tuple[float, ...]) -> str:
    middle = f"{statistics.median(values):.4f}"
    return middle if len(values) == 1 else f"{middle} ({max(values):.4f})"
