"""A process that `launch` starts: `python -m cppass.demo.worker FOLDER PHASE RANK`.

It answers on its standard output with one JSON object a line ({"step": text}, then {"result": json} or
{"failure": json}) and leaves everything that libraries print in its standard error, a file. It ends when its standard
input does, so it never outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from cppass.demo.failure import Failure
from cppass.demo.job import Job, phases
from cppass.demo.results import ProcessResult
from cppass.demo.streams import private_copy

JOB_FILE = "job.json"


def main() -> None:
    folder, phase, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    answers = private_copy(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer(kind: str, text: str) -> None:
        answers.write(json.dumps({kind: text}) + "\n")

    try:
        answer("result", work(folder, phase, rank, lambda text: answer("step", text)).to_json())
    except Exception as error:
        answer("failure", Failure.of(error).to_json())
        answers.flush()
        os._exit(1)  # a group that still stands may hang in its destructor


def work(folder: Path, name: str, rank: int, say: Callable[[str], None]) -> ProcessResult:
    """Run one process of a phase of the job in `folder`."""
    job = Job.from_json((folder / JOB_FILE).read_text())
    phase = next(p for p in phases(job) if p.name == name)
    say("starting")

    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from cppass.demo.group import check_gloo, joined
    from cppass.demo.prefill import run_process

    check_gloo()
    if not phase.compiled:
        return run_process(job, phase, folder, say, barrier=lambda: None)
    store = FileStore(str(folder / "store"), phase.processes)
    with joined(store, rank, phase.processes, job.timeout) as barrier:
        return run_process(job, phase, folder, say, barrier)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
