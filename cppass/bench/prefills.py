"""Section `prefill`: time to first token, as `cppass run` measures it, on two ranks against one device.

Beside it what the cost model says of this host, calibrated anew in every round: predicted against measured.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from cppass.bench.ratio import Ratio
from cppass.bench.table import Bars, Table
from cppass.cost import MODELS, ModelShape
from cppass.cost.host import calibrate
from cppass.cost.predict import ttft
from cppass.demo import run as runs
from cppass.demo.display import Display
from cppass.demo.job import Job
from cppass.demo.outcome import Outcome
from cppass.demo.presets import PRESETS
from cppass.errors import CPError
from cppass.report import REWRITTEN

LENGTHS, ROUNDS = (1024, 2048, 4096), 2  # longer ones: cppass run --tokens 8192
QUICK_LENGTHS, QUICK_ROUNDS = (256, 512), 2
JOB = Job(preset="qwen3-0.6b", layers=4, ranks=2, decode=0, repeat=3)
QUICK_JOB = dataclasses.replace(JOB, layers=1, repeat=1)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """One length; one number per round.

    Attributes:
        one, ranks, threads: seconds of one device, of the ranks (the slowest), of one process with as many threads.
        equal: every rank gave what one device gave, in every round.
        rewritten: the pass rewrote the graph, in every round.
        predicted_one, predicted_ranks: seconds that the cost model says.
    """

    tokens: int
    cp_size: int
    one: tuple[float, ...]
    ranks: tuple[float, ...]
    threads: tuple[float, ...]
    equal: bool
    rewritten: bool = True
    predicted_one: tuple[float, ...] = ()
    predicted_ranks: tuple[float, ...] = ()

    @property
    def speedup(self) -> Ratio:
        return Ratio.of(self.one, self.ranks)

    @property
    def threads_speedup(self) -> Ratio:
        return Ratio.of(self.one, self.threads)


@dataclasses.dataclass(frozen=True)
class PrefillResult:
    prefills: tuple[Prefill, ...]
    job: Job

    def table(self) -> Table:
        p = self.job.ranks
        return Table(
            f"prefill on {p} ranks against one device",
            (
                "tokens",
                "1 thread, s",
                f"{p} ranks, s",
                "speed-up",
                "of ideal",
                f"{p} threads",
                "predicted, 1 thread",
                f"predicted, {p} ranks",
                "equal",
            ),
            tuple(
                (
                    f"{one.tokens:,}",
                    f"{statistics.median(one.one):.3f}",
                    f"{statistics.median(one.ranks):.3f}",
                    one.speedup.text(),
                    f"{100 * one.speedup.median / one.cp_size:.0f}%",
                    one.threads_speedup.text(),
                    _against(one.predicted_one, one.one),
                    _against(one.predicted_ranks, one.ranks),
                    ("yes" if one.equal else "NO") + ("" if one.rewritten else ", not rewritten"),
                )
                for one in self.prefills
            ),
            (
                f"Widths of {self.job.preset}, layers: {self.job.layers}, {self.job.dtype}. A rank is a process of one "
                f"thread and stands for a device. {len(self.prefills[0].one)} rounds of one device, {p} ranks, one "
                f"process with {p} threads; in each the median of {self.job.repeat} prefills. Speed-up is over one "
                f"device, the median of the rounds (least..most); ideal is {p}x. Equal: every rank has one device's "
                "tokens, logits and caches, to rounding.",
                f"{p} threads: what the same cores do for one process, without context parallelism; over one thread.",
                "Predicted: seconds by cppass.cost with this host's figures, measured before each round (error against "
                "what was measured).",
            ),
        )

    def bars(self) -> Bars:
        ratios = [(one.speedup, one.threads_speedup) for one in self.prefills]
        return Bars(
            f"time to first token, {self.job.preset} widths, {self.job.layers} layers",
            "speed-up over one thread",
            tuple(f"{one.tokens:,}" for one in self.prefills),
            (
                (f"{self.job.ranks} ranks of 1 thread", tuple(ranks.median for ranks, _ in ratios)),
                (f"1 process, {self.job.ranks} threads", tuple(threads.median for _, threads in ratios)),
            ),
            (tuple(ranks.spread for ranks, _ in ratios), tuple(threads.spread for _, threads in ratios)),
            ideal=("ideal", (float(self.job.ranks),) * len(ratios)),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> PrefillResult:
    if quick:
        return checked(measure_lengths(QUICK_JOB, QUICK_LENGTHS, QUICK_ROUNDS, display))
    return checked(measure_lengths(JOB, LENGTHS, ROUNDS, display))


def checked(result: PrefillResult) -> PrefillResult:
    """The result, if it is of right numbers: how fast wrong ones are is no answer.

    Raises:
        CPError: CP655, ranks gave other tokens, logits or caches than one device.
    """
    wrong = [one.tokens for one in result.prefills if not one.equal]
    if wrong:
        raise CPError("CP655", f"ranks gave other results than one device at {wrong} tokens", "please report this")
    return result


def measure_lengths(job: Job, lengths: tuple[int, ...], rounds: int, display: Display) -> PrefillResult:
    """Run the job at every length in every round."""
    outcomes: dict[int, list[Outcome]] = {tokens: [] for tokens in lengths}
    predicted: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in lengths}
    shape = _shape(job)
    for _ in range(rounds):
        host = calibrate()
        for tokens, found in outcomes.items():
            predicted[tokens].append((ttft(shape, host, tokens), ttft(shape, host, tokens, job.ranks)))
            found.append(runs.run(dataclasses.replace(job, tokens=tokens), display))
    return PrefillResult(tuple(_prefill(tokens, found, predicted[tokens]) for tokens, found in outcomes.items()), job)


def _shape(job: Job) -> ModelShape:
    """The model of the job, as the cost model knows it: float32."""
    built = PRESETS[job.preset].sized(job.layers, job.vocab)
    sizes = {"layers": built.layers, "vocab": built.vocab, "weight_bytes": 4, "activation_bytes": 4}
    return dataclasses.replace(MODELS[job.preset], **sizes)  # type: ignore[arg-type]


def _against(predicted: tuple[float, ...], measured: tuple[float, ...]) -> str:
    """ "4.17 s (-9%)"; "" without a prediction."""
    if not predicted:
        return ""
    said, seen = statistics.median(predicted), statistics.median(measured)
    return f"{said:.3g} s ({100 * (said / seen - 1):+.0f}%)"


def _prefill(tokens: int, outcomes: list[Outcome], predicted: list[tuple[float, float]]) -> Prefill:
    threads = [outcome.threads_time for outcome in outcomes]
    return Prefill(
        tokens,
        outcomes[0].job.ranks,
        tuple(o.one_rank_time.median for o in outcomes),
        tuple(o.ranks_time.median for o in outcomes),
        tuple(t.median for t in threads if t),
        all(o.passed for o in outcomes),
        all(o.rewriting.status == REWRITTEN for o in outcomes),
        tuple(one for one, _ in predicted),
        tuple(ranks for _, ranks in predicted),
    )
