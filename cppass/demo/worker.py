"""A process that `launch` starts: `python -m cppass.demo.worker FOLDER PHASE RANK`.

It answers on its standard output with one JSON object a line ({"step": text}, then {"result": ...} or
{"failure": ...}) and leaves everything that libraries print in its standard error, a file. It ends when its standard
input does, so it never outlives the process that started it.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
from pathlib import Path

from cppass.demo.failure import Failure
from cppass.demo.job import Job, phases
from cppass.demo.streams import private_copy

JOB_FILE = "job.json"


def main() -> int:
    folder, name, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    answers = private_copy(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer(kind: str, text: str) -> None:
        answers.write(json.dumps({kind: text}) + "\n")
        answers.flush()

    try:
        answer("result", _work(folder, name, rank, lambda text: answer("step", text)))
    except Exception as error:
        answer("failure", Failure.of(error).to_json())
        return 1
    return 0


def _work(folder: Path, name: str, rank: int, say: object) -> str:
    job = Job.from_json((folder / JOB_FILE).read_text())
    phase = next(p for p in phases(job) if p.name == name)
    raise NotImplementedError


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
