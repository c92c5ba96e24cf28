"""The whole run: its phases in order, each alone on the machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cppass.demo.display import Display
from cppass.demo.job import Job, phases
from cppass.demo.launch import run_phase
from cppass.demo.outcome import Outcome
from cppass.demo.results import ProcessResult

STEPS_BESIDE_REPEATS = 4
"""Steps a process announces beside its timed prefills: start, build, first prefill, decode."""


def run(job: Job, display: Display) -> Outcome:
    """Run the job in processes of our own.

    Raises:
        CPError: RankError of whatever failed first, see `run_phase`.
    """
    with tempfile.TemporaryDirectory(prefix="cppass-") as name:
        results: dict[str, tuple[ProcessResult, ...]] = {}
        for phase in phases(job):
            display.start(phase.title, job.repeat + STEPS_BESIDE_REPEATS)
            results[phase.name] = run_phase(job, phase, Path(name), display.step)
            display.finish()
    (threads,) = results.get("threads", (None,))
    return Outcome(job, results["one_rank"][0], results["ranks"], threads)
