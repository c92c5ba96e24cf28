"""Section `memory`: peak of what a prefill allocates, on each rank against one device.

Counted, not sampled: torch's allocator reports every allocation and release to the profiler, and the peak is that of
their running sum; resident memory would be neither exact nor of the prefill alone. Weights and the static cache were
allocated before. On CPU, gloo's thread gathers through a buffer of its own, as large as the gathered rows, while the
graph goes on: how much of the graph it overlaps with is a matter of time, so it is counted apart.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cppass.bench.ratio import Ratio
from cppass.bench.spawn import Barrier, Found, on_ranks
from cppass.bench.table import Table
from cppass.demo.display import Display
from cppass.demo.job import Job
from cppass.demo.prefill import compiled, reported, timed_prefill
from cppass.demo.subject import Forward, Subject, build, prompt
from cppass.errors import CPError
from cppass.report import REWRITTEN

JOB = Job(preset="qwen3-0.6b", layers=2, tokens=2048, ranks=2, decode=0, cache="static", repeat=7)
QUICK_JOB = dataclasses.replace(JOB, layers=1, tokens=256, repeat=3)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Bytes at the peak of every measured prefill.

    Attributes:
        eager: one device, the plain model.
        aot: one device, compiled through AOT autograd alone (backend "aot_eager"), as the pass gets it.
        ranks: of each rank, what the graph allocates.
        with_gloo: the same, and what gloo allocates while it gathers.
        gathered: bytes of K and V of one layer, all rows.
    """

    job: Job
    eager: tuple[int, ...]
    aot: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    with_gloo: tuple[tuple[int, ...], ...]
    gathered: int

    @property
    def busiest(self) -> tuple[int, ...]:
        """Of every prefill, the rank with the highest peak."""
        return tuple(max(prefill) for prefill in zip(*self.ranks, strict=True))

    def ideal(self, one: Sequence[int]) -> float:
        """1/P of one device, and K and V of one layer, over one device."""
        return 1 / len(self.ranks) + self.gathered / statistics.median(one)

    def table(self) -> Table:
        p = len(self.ranks)
        one_device = (("one device, eager", self.eager), ("one device, AOT autograd alone", self.aot))
        return Table(
            "peak of activations of one prefill",
            ("", "peak, MB", "busiest rank / this", "1/P and K/V"),
            (
                *(
                    (name, _mb(one), Ratio.of(self.busiest, one).text("", digits=3), f"{self.ideal(one):.3f}")
                    for name, one in one_device
                ),
                *((f"rank {rank}", _mb(peaks), "", "") for rank, peaks in enumerate(self.ranks)),
                *((f"rank {rank}, gloo too", _mb(peaks), "", "") for rank, peaks in enumerate(self.with_gloo)),
            ),
            (
                f"{self.job.preset} widths, layers: {self.job.layers}, {self.job.tokens:,} tokens, {self.job.dtype}, "
                f"static cache, {p} ranks; {self.job.repeat} prefills: the median (least..most). Peak of the running "
                "sum of the allocator's reports during a prefill (torch.profiler, profile_memory): counted, not "
                "sampled. Weights and caches are not in it. gloo too: with the buffer that gloo itself gathers "
                "through on CPU, for as long as the gather takes beside the graph.",
                f"1/P and K/V: what is left where all is cut in P ({1 / p:.3f}) but K and V of one layer, gathered "
                f"({self.gathered / 1e6:.1f} MB). Less is possible: the peak may lie in the MLP, where they are gone.",
            ),
        )

    def bars(self) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> Peaks:
    return measure_job(QUICK_JOB if quick else JOB, display)


def measure_job(job: Job, display: Display) -> Peaks:
    display.start("memory", 1)
    display.step(f"{job.tokens:,} tokens, one device and {job.ranks} ranks")
    found = on_ranks(_peaks, job.ranks, job)
    display.finish()
    one = found[0]
    ranks = tuple(_whole(rank["rank"]) for rank in found)
    with_gloo = tuple(_whole(rank["rank, gloo"]) for rank in found)
    return Peaks(job, _whole(one["eager"]), _whole(one["aot"]), ranks, with_gloo, int(one["gathered"][0]))


@torch.no_grad()
def _peaks(rank: int, barrier: Barrier, job: Job) -> Found:
    """The work of a rank; rank 0 is one device before it is a rank."""
    subject = build(job)
    facts = subject.facts
    found = {"gathered": [2.0 * job.tokens * facts.kv_heads * facts.head_dim * getattr(torch, job.dtype).itemsize]}
    if rank == 0:
        found["eager"], _ = _peaks_of_prefills(job, subject, subject.module)
        found["aot"], _ = _peaks_of_prefills(job, subject, torch.compile(subject.module, backend="aot_eager"))
        torch._dynamo.reset()
    barrier()
    found["rank"], found["rank, gloo"] = _peaks_of_prefills(job, subject, compiled(job, subject.module))
    status = reported(job).status
    if status != REWRITTEN:
        raise CPError(
            "CP653", f"the graph of {job.tokens} tokens was {status}", "memory is measured of a rewritten one"
        )
    return found


def _peaks_of_prefills(job: Job, subject: Subject, forward: Forward) -> tuple[list[float], list[float]]:
    """Of every prefill but the first, which compiles: of the thread of the graph, and of all threads."""
    ids = prompt(job, subject.facts.vocab)
    timed_prefill(forward, ids, subject.begin())
    own: list[float] = []
    every: list[float] = []
    for _ in range(job.repeat):
        session = subject.begin()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            timed_prefill(forward, ids, session)
        own.append(peak_of(seen))
        every.append(peak_of(seen, all_threads=True))
    return own, every


def peak_of(seen: profile, all_threads: bool = False) -> int:
    """The most bytes at once, over what was there at the start; of the first thread that allocates, or of all."""
    results: Any = seen.profiler and seen.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    assert events, "a prefill allocates"
    events.sort(key=lambda event: event.start_ns())
    own = events[0].start_thread_id()
    changes: list[int] = [event.nbytes() for event in events if all_threads or event.start_thread_id() == own]
    return max(itertools.accumulate(changes, initial=0))


def _whole(values: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _mb(peaks: Sequence[int]) -> str:
    """ "8.46 (8.46..10.55)"."""
    return Ratio.of(peaks, [1e6] * len(peaks)).text("")
