"""Section `options`: the same prefill compiled in two ways, on two ranks.

overlap          queries computed while K and V travel      against   overlap=False
inductor         inner="inductor"                           against   inner="eager"
one call         attention_calls=1, NPU graph on the CPU    against   two calls
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cppass.bench.ratio import Ratio, in_turns, milliseconds
from cppass.bench.spawn import Barrier, Found, on_ranks, slowest
from cppass.bench.table import Table
from cppass.demo.display import Display
from cppass.demo.job import BACKEND, Job
from cppass.demo.prefill import timed_prefill
from cppass.demo.subject import Forward, build, prompt
from cppass.errors import CPError

HOST = Job(layers=2, tokens=2048, decode=0, cache="static", dynamic=False)
NPU = Job(dialect="npu", layers=1, tokens=512, batch=2, decode=1024, dynamic=False, inner="eager")
"""No token is decoded: that many make the cache large enough for the pages that one call counts twice."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One option, and what it is compared with.

    Attributes:
        what: names it.
        job: the model and the prompt.
        chosen, other: options of the backend.
    """

    what: str
    job: Job
    chosen: Mapping[str, Any]
    other: Mapping[str, Any]


VARIANTS = (
    Variant("overlap", HOST, {"overlap": True}, {"overlap": False}),
    Variant("inner='inductor'", HOST, {"inner": "inductor"}, {"inner": "eager"}),
    Variant("one attention call (NPU graph)", NPU, {"attention_calls": 1}, {"attention_calls": 2}),
)
TURNS, QUICK_TURNS, QUICK_TOKENS = 9, 3, 256


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Seconds of both sides in every turn, of the slower rank, and the largest difference of their logits."""

    what: str
    job: Job
    chosen: tuple[float, ...]
    other: tuple[float, ...]
    difference: float


@dataclasses.dataclass(frozen=True)
class VariantsResult:
    comparisons: tuple[Comparison, ...]

    def table(self) -> Table:
        return Table(
            "one prefill, compiled in two ways",
            ("option", "tokens", "chosen, ms", "other, ms", "other / chosen", "logits differ by"),
            tuple(
                (
                    c.what,
                    f"{c.job.sequence_rows:,}",
                    milliseconds(c.chosen),
                    milliseconds(c.other),
                    Ratio.of(c.other, c.chosen).text(),
                    f"{c.difference:.1e}",
                )
                for c in self.comparisons
            ),
            (
                f"Two ranks of one thread, gloo over loopback, Qwen3-0.6B widths of {HOST.layers} layers (NPU graph: "
                f"{NPU.layers}), static shapes, float32; {len(self.comparisons[0].chosen)} turns of both sides, the "
                "slower rank of each: the median (least..most).",
                "The NPU graph ran on CPU kernels that were made for their numbers: its ratio says nothing of an NPU, "
                "where one call saves a launch a layer.",
            ),
        )

    def bars(self) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> VariantsResult:
    tokens = QUICK_TOKENS if quick else None
    return measure_variants(VARIANTS, tokens, QUICK_TURNS if quick else TURNS, display)


def measure_variants(
    variants: tuple[Variant, ...], tokens: int | None, turns: int, display: Display, **changes: Any
) -> VariantsResult:
    """Measure variants; `tokens` and further changes of their jobs where those should be smaller."""
    display.start("options", len(variants))
    found = []
    for variant in variants:
        job = dataclasses.replace(variant.job, tokens=tokens or variant.job.tokens, **changes)
        display.step(f"{variant.what}, {job.sequence_rows:,} tokens on {job.ranks} ranks")
        seen = on_ranks(_one_variant, job.ranks, job, dict(variant.chosen), dict(variant.other), turns)
        difference = max(one["difference"][0] for one in seen)
        sides = (slowest(seen, "chosen"), slowest(seen, "other"))
        found.append(Comparison(variant.what, job, *sides, difference))
    display.finish()
    return VariantsResult(tuple(found))


@torch.no_grad()
def _one_variant(
    rank: int, barrier: Barrier, job: Job, chosen: dict[str, Any], other: dict[str, Any], turns: int
) -> Found:
    """The work of a rank."""
    import cppass

    subject = build(job)
    ids = prompt(job, subject.facts.vocab)
    logits: list[torch.Tensor] = []

    def prefill(options: dict[str, Any]) -> Callable[[], float]:
        forward: Forward = torch.compile(
            subject.module, backend=BACKEND, dynamic=job.dynamic, options={"inner": job.inner, **options}
        )

        def run() -> float:
            session = subject.begin()
            barrier()
            seconds, out, _ = timed_prefill(forward, ids, session)
            logits.append(out)
            return seconds

        return run

    one, two = in_turns(prefill(chosen), prefill(other), turns)
    statuses = [r.status for r in cppass.reports()]
    if statuses.count("rewritten") != 2:
        raise CPError("CP653", f"graphs were {', '.join(statuses)}", "two rewritten ones are compared")
    difference = float((logits[0] - logits[1]).abs().max())
    return {"chosen": list(one), "other": list(two), "difference": [difference]}
