"""Ranks for the sections that need a process group: spawned processes of one thread, gloo over loopback."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

from cppass.demo.failure import Failure, RankError
from cppass.demo.group import bind_loopback, check_gloo, joined
from cppass.demo.streams import silenced

TIMEOUT = 900.0
"""Seconds that one set of ranks may take."""

Barrier = Callable[[], None]
Found = dict[str, list[float]]
"""What a rank hands back: numbers by name."""


def on_ranks(work: Callable[..., Found], ranks: int, *arguments: object) -> list[Found]:
    """Run work(rank, barrier, *arguments) on so many ranks; what each found, in rank order.

    Args:
        work: a function of a module (the processes import it).

    Raises:
        RankError: a rank raised, died (CP651), or was not done after TIMEOUT seconds (CP654).
    """
    check_gloo()
    with tempfile.TemporaryDirectory(prefix="cppass-") as name:
        folder, until = Path(name), time.monotonic() + TIMEOUT
        context = start_processes(  # type: ignore[no-untyped-call]
            _rank, (folder, ranks, work, arguments), nprocs=ranks, join=False, daemon=True, start_method="spawn"
        )
        try:
            while any(process.is_alive() for process in context.processes) and not _failures(folder):
                if time.monotonic() > until:
                    raise RankError("launcher", _silent(folder, ranks))
                time.sleep(0.02)
            if failures := _failures(folder):
                time.sleep(0.5)  # to hear the others: the first one heard is often only a consequence
                rank, failure = min(_failures(folder) or failures, key=lambda item: item[1].remoteness)
                raise RankError(f"rank {rank}", failure)
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        for rank in range(ranks):
            if not _result(folder, rank).is_file():
                raise RankError(f"rank {rank}", Failure("ProcessDied", f"rank {rank} ended without a result", "CP651"))
        return [json.loads(_result(folder, rank).read_text()) for rank in range(ranks)]


def slowest(found: Sequence[Found], name: str) -> tuple[float, ...]:
    """Of every turn, the number of its slowest rank."""
    return tuple(max(turn) for turn in zip(*(one[name] for one in found), strict=True))


def _rank(rank: int, folder: Path, ranks: int, work: Callable[..., Found], arguments: tuple[object, ...]) -> None:
    bind_loopback(os.environ)
    torch.set_num_threads(1)
    try:
        with silenced(folder / f"log{rank}"):
            store = FileStore(str(folder / "store"), ranks)
            with joined(store, rank, ranks, TIMEOUT) as barrier:
                found = work(rank, barrier, *arguments)
        _result(folder, rank).write_text(json.dumps(found))
    except Exception as error:
        part = folder / f"part{rank}"
        part.write_text(Failure.of(error).to_json())
        part.rename(folder / f"failure{rank}")  # whole, or not there
        os._exit(1)  # a group that still stands may hang in its destructor


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result{rank}"


def _failures(folder: Path) -> list[tuple[int, Failure]]:
    return [(int(p.name.removeprefix("failure")), Failure.from_json(p.read_text())) for p in folder.glob("failure*")]


def _silent(folder: Path, ranks: int) -> Failure:
    waiting = ", ".join(f"rank {rank}" for rank in range(ranks) if not _result(folder, rank).is_file())
    return Failure("Timeout", f"not done after {TIMEOUT:g} s: {waiting}", "CP654", "is the machine busy?")
