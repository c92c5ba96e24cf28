"""Section `attention`: the busiest rank of contiguous shards against the busiest of zigzag halves; one kernel for both.

To the kernel a contiguous shard is one rank of one: both halves of rows [start, start + S), behind `start` keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppass.bench.compile_time import one_thread
from cppass.bench.layouts import contiguous_share, zigzag_share
from cppass.bench.ratio import Ratio, in_turns, milliseconds, seconds_of
from cppass.bench.table import Table
from cppass.demo.display import Display
from cppass.layout import zigzag
from cppass.target import load

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
SHAPES, TURNS = tuple((tokens, cp_size) for tokens in (2048, 8192) for cp_size in (2, 4)), 5
QUICK_SHAPES, QUICK_TURNS = ((1024, 2), (1024, 4)), 3


@dataclasses.dataclass(frozen=True)
class Shared:
    """Seconds of the busiest rank in every turn.

    Attributes:
        ideal: contiguous over zigzag, counted in (query, key) pairs.
    """

    tokens: int
    cp_size: int
    zigzag: tuple[float, ...]
    contiguous: tuple[float, ...]
    ideal: float

    @property
    def gain(self) -> Ratio:
        return Ratio.of(self.contiguous, self.zigzag)


@dataclasses.dataclass(frozen=True)
class AttentionResult:
    lines: tuple[Shared, ...]

    def table(self) -> Table:
        return Table(
            "attention of the busiest rank, contiguous over zigzag",
            ("tokens", "P", "zigzag, ms", "contiguous, ms", "contiguous / zigzag", "ideal"),
            tuple(
                (
                    f"{line.tokens:,}",
                    str(line.cp_size),
                    milliseconds(line.zigzag),
                    milliseconds(line.contiguous),
                    line.gain.text(),
                    f"{line.ideal:.2f}x",
                )
                for line in self.lines
            ),
            (
                f"Host kernel, one process, one thread, fp32, {HEADS} query and {KV_HEADS} K/V heads of {HEAD_DIM}; "
                f"ranks 0 and P - 1, the slower one counts; {len(self.lines[0].zigzag)} turns of both: the median "
                "(least..most). Ideal is the ratio of (query, key) pairs, about 2 - 1/P.",
            ),
        )

    def bars(self) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> AttentionResult:
    return measure_shapes(QUICK_SHAPES if quick else SHAPES, QUICK_TURNS if quick else TURNS, display)


def measure_shapes(shapes: tuple[tuple[int, int], ...], turns: int, display: Display) -> AttentionResult:
    load("host")  # defines torch.ops.cppass_host
    display.start("attention", len(shapes))
    lines = []
    with one_thread(), torch.no_grad():
        for tokens, cp_size in shapes:
            display.step(f"{tokens:,} tokens, P={cp_size}")
            lines.append(_shared(tokens, cp_size, turns))
    display.finish()
    return AttentionResult(tuple(lines))


def _shared(tokens: int, cp_size: int, turns: int) -> Shared:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def busiest(of_rank: Callable[[int], Callable[[], Tensor]]) -> Callable[[], float]:
        works = [of_rank(rank) for rank in (0, cp_size - 1)]
        return lambda: max(seconds_of(work) for work in works)

    balanced, plain = in_turns(
        busiest(lambda rank: zigzag_work(q, k, v, cp_size, rank)),
        busiest(lambda rank: contiguous_work(q, k, v, cp_size, rank)),
        turns,
    )
    pairs = [max(s.pairs) for s in (contiguous_share((tokens,), cp_size), zigzag_share((tokens,), cp_size, "first"))]
    return Shared(tokens, cp_size, balanced, plain, pairs[0] / pairs[1])


def zigzag_work(q: Tensor, k: Tensor, v: Tensor, cp_size: int, rank: int) -> Callable[[], Tensor]:
    """Attention of a rank's zigzag halves, its query rows laid out already."""
    layout = zigzag((q.shape[2],), cp_size)
    local = torch.cat([q[:, :, first : first + rows] for first, rows in layout.spans(rank)], 2)
    return lambda: _kernel(local, k, v, 0, q.shape[2], cp_size, layout.even, rank)


def contiguous_work(q: Tensor, k: Tensor, v: Tensor, cp_size: int, rank: int) -> Callable[[], Tensor]:
    """Attention of the rank's S = T / P rows that lie together."""
    rows = q.shape[2] // cp_size
    start = rows * rank
    local = q[:, :, start : start + rows].contiguous()
    return lambda: _kernel(local, k, v, start, rows, 1, rows % 2 == 0, 0)


def _kernel(q: Tensor, k: Tensor, v: Tensor, prefix: int, tokens: int, cp_size: int, even: bool, rank: int) -> Tensor:
    out: Tensor = torch.ops.cppass_host.attention(
        q, k, v, None, None, prefix, [tokens], cp_size, even, True, 0, None, rank
    )
    return out
