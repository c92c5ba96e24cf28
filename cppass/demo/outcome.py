"""What a whole run found: the phases' results side by side, the verdict, and the same as JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from cppass.demo.job import DIALECTS, Job
from cppass.demo.results import ProcessResult, Rewriting

SCHEMA = 1
"""Version of the JSON output; a new number where a key changes its meaning or goes."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the timed prefills of a phase: of each step that of its slowest rank."""

    steps: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.steps)

    @classmethod
    def of(cls, processes: tuple[ProcessResult, ...]) -> Timing:
        return cls(tuple(max(step) for step in zip(*(p.prefill_seconds for p in processes), strict=True)))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of the phases.

    Attributes:
        one_rank: one device.
        ranks: one result per rank, each with `comparison` and `rewriting`.
        threads: the cores of all ranks given to one process; None where that was not run.
        launcher: "spawn" or "torchrun".
    """

    job: Job
    one_rank: ProcessResult
    ranks: tuple[ProcessResult, ...]
    threads: ProcessResult | None = None
    launcher: str = "spawn"

    @property
    def tokens_equal(self) -> bool:
        return all(r.tokens == self.one_rank.tokens for r in self.ranks)

    @property
    def caches_identical(self) -> bool:
        return len({r.cache_digest for r in self.ranks}) == 1

    @property
    def logits_error(self) -> float:
        return _worst([r.comparison.logits_error for r in self.ranks if r.comparison])

    @property
    def cache_error(self) -> float:
        return _worst([r.comparison.cache_error for r in self.ranks if r.comparison])

    @property
    def logits_allowed(self) -> float:
        return self.job.tolerance * _scale([r.comparison.logits_scale for r in self.ranks if r.comparison])

    @property
    def cache_allowed(self) -> float:
        return self.job.tolerance * _scale([r.comparison.cache_scale for r in self.ranks if r.comparison])

    @property
    def rewriting(self) -> Rewriting:
        found = self.ranks[0].rewriting
        assert found is not None
        return found

    @property
    def tokens_enforced(self) -> bool:
        """In 16 bit two correct roundings may pick different tokens."""
        return self.job.dtype == "float32"

    @property
    def passed(self) -> bool:
        """Comparisons are written so that a NaN fails."""
        return (
            (self.tokens_equal or not self.tokens_enforced)
            and self.logits_error <= self.logits_allowed
            and self.cache_error <= self.cache_allowed
            and self.caches_identical
        )

    @property
    def one_rank_time(self) -> Timing:
        return Timing.of((self.one_rank,))

    @property
    def ranks_time(self) -> Timing:
        return Timing.of(self.ranks)

    @property
    def threads_time(self) -> Timing | None:
        return Timing.of((self.threads,)) if self.threads else None

    @property
    def kernels(self) -> str:
        """What ran, where its speed says nothing; "" where it does."""
        return DIALECTS[self.job.dialect].kernels

    @property
    def speedup(self) -> tuple[float, float, float] | None:
        """One rank over P ranks: of the medians, then the least and the most that any two steps give."""
        if self.kernels:
            return None
        one, many = self.one_rank_time, self.ranks_time
        return one.median / many.median, min(one.steps) / max(many.steps), max(one.steps) / min(many.steps)

    @property
    def compile_seconds(self) -> float:
        """The first call of the slowest rank less the fastest prefill: an estimate, as noisy as the machine."""
        return max(0.0, max(r.first_seconds for r in self.ranks) - min(self.ranks_time.steps))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with seconds and bytes as units; a NaN error becomes null."""
        return {
            "schema": SCHEMA,
            "ok": self.passed,
            "launcher": self.launcher,
            "job": dataclasses.asdict(self.job),
            "model": dataclasses.asdict(self.one_rank.model),
            "check": {
                "tokens": self.one_rank.tokens,
                "tokens_equal": self.tokens_equal,
                "tokens_enforced": self.tokens_enforced,
                "logits_max_error": _number(self.logits_error),
                "logits_allowed": _number(self.logits_allowed),
                "cache_max_error": _number(self.cache_error),
                "cache_allowed": _number(self.cache_allowed),
                "caches_identical_across_ranks": self.caches_identical,
            },
            "rewriting": dataclasses.asdict(self.rewriting),
            "kernels": self.kernels,
            "seconds": {
                "one_rank": self.one_rank_time.steps,
                "ranks": self.ranks_time.steps,
                "threads": self.threads_time.steps if self.threads_time else None,
                "compile": self.compile_seconds,
            },
            "speedup": dict(zip(("median", "least", "most"), self.speedup, strict=True)) if self.speedup else None,
            "peak_memory": {
                "method": self.one_rank.peak_method,
                "one_rank_bytes": self.one_rank.peak_bytes,
                "ranks_bytes": [r.peak_bytes for r in self.ranks],
                "threads_bytes": self.threads.peak_bytes if self.threads else None,
            },
        }


def _worst(errors: list[float]) -> float:
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def _scale(values: list[float]) -> float:
    return max(1.0, _worst(values))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
