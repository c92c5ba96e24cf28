"""Section `gather`: the two choices around the all-gather of K and V, on two ranks.

collectives   one all-gather of K and V together        against   one of K and one of V, the same bytes
writes        cache.index_copy_ of rows as gathered,    against   rows put back in natural order first, then written
              through slots permuted to match                     through the slots as they are
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cppass.bench.ratio import Ratio, in_turns, milliseconds, seconds_of
from cppass.bench.spawn import Barrier, Found, on_ranks, slowest
from cppass.bench.table import Table
from cppass.demo.display import Display
from cppass.layout import zigzag
from cppass.target import load

RANKS = 2
KV_HEADS, HEAD_DIM = 8, 128
WIDTH = KV_HEADS * HEAD_DIM  # F of Qwen3-0.6B
LENGTHS, TURNS = (2048, 8192), 31
QUICK_LENGTHS, QUICK_TURNS = (512,), 3


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice: seconds of its two sides in every turn, of the slower rank."""

    what: str
    tokens: int
    chosen: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def gain(self) -> Ratio:
        return Ratio.of(self.other, self.chosen)


@dataclasses.dataclass(frozen=True)
class GatherResult:
    choices: tuple[Choice, ...]

    def table(self) -> Table:
        return Table(
            "one gather of K and V, written in gathered order",
            ("choice", "tokens", "chosen, ms", "other, ms", "other / chosen"),
            tuple(
                (c.what, f"{c.tokens:,}", milliseconds(c.chosen), milliseconds(c.other), c.gain.text())
                for c in self.choices
            ),
            (
                f"{RANKS} ranks of one thread, gloo over loopback; K and V of a layer of Qwen3-0.6B ({KV_HEADS} heads "
                f"of {HEAD_DIM}, fp32); {len(self.choices[0].chosen)} turns of both sides, the slower rank of each: "
                "the median (least..most). Merging holds the copy into one buffer. Both orders were checked to leave "
                "the same cache.",
            ),
        )

    def bars(self) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> GatherResult:
    return measure_lengths(QUICK_LENGTHS if quick else LENGTHS, QUICK_TURNS if quick else TURNS, display)


def measure_lengths(lengths: tuple[int, ...], turns: int, display: Display) -> GatherResult:
    display.start("gather", len(lengths))
    choices = []
    for tokens in lengths:
        display.step(f"{tokens:,} tokens on {RANKS} ranks")
        found = on_ranks(_one_length, RANKS, tokens, turns)
        for what in ("one all-gather, not two", "write in gathered order"):
            choices.append(Choice(what, tokens, slowest(found, what), slowest(found, f"not: {what}")))
    display.finish()
    return GatherResult(tuple(choices))


def _one_length(rank: int, barrier: Barrier, tokens: int, turns: int) -> Found:
    """The work of a rank."""
    load("host")  # defines torch.ops.cppass_host
    layout = zigzag((tokens,), RANKS)
    rows = layout.local_rows
    generator = torch.Generator().manual_seed(rank)
    k_MF, v_MF = (torch.randn(rows, WIDTH, generator=generator) for _ in range(2))

    def merged() -> Tensor:
        return _all_gather(torch.cat([k_MF, v_MF], 1))

    def separate() -> tuple[Tensor, Tensor]:
        return _all_gather(k_MF), _all_gather(v_MF)

    gathered_S2F = merged()  # rank-major rows, K and V side by side
    slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(7))  # of natural rows
    permuted_S = slots[[p for r in range(RANKS) for p in layout.positions(r) if p is not None]]
    caches = [torch.zeros(2, tokens, WIDTH) for _ in range(2)]

    def in_gathered_order() -> None:
        for cache, part in zip(caches[0], torch.split(gathered_S2F, WIDTH, 1), strict=True):
            cache.index_copy_(0, permuted_S, part)

    def in_natural_order() -> None:
        natural = torch.ops.cppass_host.unpack(gathered_S2F, [k_MF, v_MF], [0, 0], [1, 1], [tokens], RANKS, layout.even)
        for cache, full in zip(caches[1], natural, strict=True):
            cache.index_copy_(0, slots, full)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            barrier()
            return seconds_of(work)

        return run

    one, two = in_turns(timed(merged), timed(separate), turns)
    gathered, natural = in_turns(timed(in_gathered_order), timed(in_natural_order), turns)
    assert torch.equal(*caches) and caches[0].any(), "both orders fill the cache alike"
    k_full, v_full = separate()
    assert torch.equal(gathered_S2F, torch.cat([k_full, v_full], 1))
    return {
        "one all-gather, not two": list(one),
        "not: one all-gather, not two": list(two),
        "write in gathered order": list(gathered),
        "not: write in gathered order": list(natural),
    }


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty(RANKS * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x)
    return out
