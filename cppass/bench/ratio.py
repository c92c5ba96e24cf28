"""Two things measured in turns, and their ratio. The machine drifts; what is measured together drifts together."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One ratio per turn."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, over: Sequence[float], under: Sequence[float]) -> Ratio:
        """over[i] / under[i] of every turn i."""
        return cls(tuple(a / b for a, b in zip(over, under, strict=True)))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def text(self, unit: str = "x", scale: float = 1.0, digits: int = 2) -> str:
        """ "1.53x (1.48..1.60)"."""
        shown = [f"{scale * value:.{digits}f}" for value in (self.median, *self.spread)]
        return f"{shown[0]}{unit} ({shown[1]}..{shown[2]})"


def in_turns(
    first: Callable[[], float], second: Callable[[], float], turns: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of both in every turn, A B, B A, A B, ...; each is called once before, unmeasured.

    Args:
        first, second: do the work and return the seconds it took.
    """
    first()
    second()
    found: list[tuple[float, float]] = []
    for turn in range(turns):
        if turn % 2 == 0:
            a = first()
            b = second()
        else:
            b = second()
            a = first()
        found.append((a, b))
    return tuple(a for a, _ in found), tuple(b for _, b in found)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, with three digits."""
    return f"{statistics.median(seconds) * 1e3:.3g}"
