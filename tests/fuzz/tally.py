"""Counts of what became of the cases of a run, by generator, printed when pytest ends."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


@dataclasses.dataclass
class Tally:
    """Outcomes of one generator's cases.

    Attributes:
        counts: outcome -> cases.
        failures: (case, error) of those that went wrong.
        seconds: spent on it.
    """

    name: str
    seed: int
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[tuple[Any, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.counts.values())

    def share(self, outcome: str) -> float:
        return self.counts[outcome] / max(self.cases, 1)

    def lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.cases} cases, seed {self.seed}, {self.seconds:.0f} s"
        counts = dict(self.counts.most_common()) | {"wrong": self.counts["wrong"], "crashed": self.counts["crashed"]}
        for outcome, count in counts.items():
            yield f"  {outcome:<16} {count:>6}  {100 * count / max(self.cases, 1):5.1f} %"


TALLIES = pytest.StashKey[list[Tally]]()


def drawn(strategy: st.SearchStrategy[Any], seed: int, number: int) -> Any:
    """Case `number` of a seed, independent of the others.

    A search of its own each: hypothesis starts with the simplest case, draws one at random, and would go on with
    variations of these.
    """
    found: list[Any] = []

    @hypothesis.seed(f"{seed} {number}")
    @settings(
        max_examples=2,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def keep(case: Any) -> None:
        found.append(case)

    keep()
    return found[-1]


def sweep(strategy: st.SearchStrategy[Any], check: Callable[[Any], str], tally: Tally, cases: int) -> None:
    """Draw cases and count what becomes of them; goes on after a failure."""
    started = time.monotonic()
    for number in range(cases):
        case = drawn(strategy, tally.seed, number)
        try:
            tally.counts[check(case)] += 1
        except AssertionError as error:
            _failed(tally, "wrong", case, error)
        except Exception as error:
            _failed(tally, "crashed", case, error)
    tally.seconds += time.monotonic() - started


def _failed(tally: Tally, outcome: str, case: Any, error: Exception) -> None:
    tally.counts[outcome] += 1
    tally.failures.append((case, f"{type(error).__name__}: {error}"))
