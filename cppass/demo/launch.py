"""Start the processes of a phase, hear them out, and leave none behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cppass.demo.failure import OUT_OF_MEMORY, UNKNOWN, Failure, RankError
from cppass.demo.group import bind_loopback
from cppass.demo.job import Job, Phase
from cppass.demo.results import ProcessResult
from cppass.demo.worker import JOB_FILE

GRACE = 2.0
"""Seconds to hear the other ranks after a first failure: the one heard first is often only a consequence."""

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclasses.dataclass(frozen=True)
class Message:
    """One line of a process; kind "end" when it closed its output."""

    rank: int
    kind: str
    text: str = ""


def run_phase(job: Job, phase: Phase, folder: Path, say: Callable[[str], None]) -> tuple[ProcessResult, ...]:
    """Run the processes of a phase and return their results in rank order.

    Args:
        folder: where processes leave files for each other.
        say: told what rank 0 starts next.

    Raises:
        RankError: a process raised (its own CP code, or CP650), died (CP651), or was not heard for job.timeout (CP654).
    """
    (folder / JOB_FILE).write_text(job.to_json())
    with _started(phase, folder) as (processes, inbox):
        results: dict[int, ProcessResult] = {}
        last_heard = dict.fromkeys(range(phase.processes), "nothing yet")
        while len(results) < phase.processes:
            message = _next(inbox, job.timeout)
            if message is None:
                raise _silent(job.timeout, {r: s for r, s in last_heard.items() if r not in results})
            if message.kind == "result":
                results[message.rank] = ProcessResult.from_json(message.text)
            elif message.kind == "step":
                last_heard[message.rank] = message.text
                if message.rank == 0:
                    say(message.text)
            elif message.kind == "failure" or message.rank not in results:
                raise _worst(message, inbox, processes, phase, folder)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it has delivered; what is left is its own tear-down
                process.wait(GRACE * 5)
        return tuple(results[r] for r in range(phase.processes))


@contextlib.contextmanager
def _started(phase: Phase, folder: Path) -> Iterator[tuple[list[subprocess.Popen[str]], queue.Queue[Message]]]:
    processes: list[subprocess.Popen[str]] = []
    inbox: queue.Queue[Message] = queue.Queue()
    try:
        for rank in range(phase.processes):
            with _log(folder, phase, rank).open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "cppass.demo.worker", os.fspath(folder), phase.name, str(rank)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=_environment(phase.threads),
                    start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
                )
            processes.append(process)
            threading.Thread(target=_listen, args=(rank, process, inbox), daemon=True).start()
        yield processes, inbox
    finally:
        _end(processes)


def _listen(rank: int, process: subprocess.Popen[str], inbox: queue.Queue[Message]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if line.endswith("\n"):  # a process that is killed may leave half a line
                for kind, text in json.loads(line).items():
                    inbox.put(Message(rank, kind, text))
    inbox.put(Message(rank, "end"))


def _next(inbox: queue.Queue[Message], timeout: float) -> Message | None:
    try:
        return inbox.get(timeout=timeout)
    except queue.Empty:
        return None


def _environment(threads: int) -> dict[str, str]:
    """This process's, without a launcher's rank, quiet, offline, with so many threads and loopback only."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("TORCHELASTIC")
    }
    inherited.pop("GLOO_SOCKET_IFNAME", None)
    bind_loopback(inherited)
    set_here = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return {**inherited, **set_here, "PYTHONUNBUFFERED": "1"}


def _worst(
    first: Message, inbox: queue.Queue[Message], processes: list[subprocess.Popen[str]], phase: Phase, folder: Path
) -> RankError:
    """The failure that explains the others; of several alike, the one heard first."""
    found = [_failure(first, processes, phase, folder)]
    until = time.monotonic() + GRACE
    while len(found) < phase.processes and (left := until - time.monotonic()) > 0:
        message = _next(inbox, left)
        already = {rank for rank, _ in found}
        if message is not None and message.rank not in already and message.kind in ("failure", "end"):
            found.append(_failure(message, processes, phase, folder))

    rank, failure = min(found, key=lambda item: item[1].remoteness)
    return RankError(_name(phase, rank), failure)


def _failure(
    message: Message, processes: list[subprocess.Popen[str]], phase: Phase, folder: Path
) -> tuple[int, Failure]:
    if message.kind == "failure":
        return message.rank, Failure.from_json(message.text)
    try:
        status = processes[message.rank].wait(GRACE)
    except subprocess.TimeoutExpired:
        status = 0
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    hint = OUT_OF_MEMORY if status == -signal.SIGKILL else UNKNOWN
    log = _log(folder, phase, message.rank).read_text(errors="replace").strip()
    last = f"; its last words: {log.splitlines()[-1]}" if log and status >= 0 else ""
    text = f"{_name(phase, message.rank)} {how} before it had a result{last}"
    return message.rank, Failure("ProcessDied", text, "CP651", hint, log)


def _silent(timeout: float, waiting: dict[int, str]) -> RankError:
    ranks = ", ".join(f"rank {r} ({step})" for r, step in waiting.items())
    text = f"nothing heard for {timeout:g} s; still busy: {ranks}"
    return RankError("launcher", Failure("Timeout", text, "CP654", "give a longer --timeout, or fewer --tokens"))


def _name(phase: Phase, rank: int) -> str:
    return f"rank {rank}" if phase.compiled else f"the process of phase {phase.title!r}"


def _log(folder: Path, phase: Phase, rank: int) -> Path:
    return folder / f"{phase.name}-{rank}.log"


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """Kill what still runs, with its own children, and reap it. They hold nothing that wants an orderly end."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE * 5)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
