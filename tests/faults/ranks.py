"""Ranks that may die: spawned processes on loopback, found by a store in this process, every wait bounded."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from processes import rank_context

import cppass

LONGEST = 240  # seconds until ranks that still run are killed, and the test fails


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        result: what its function returned.
        code, text: of the error that it raised, as `cppass.unwrap` gives it.
        signal: that killed it, 0 without one.
        seconds: how long its function ran.
    """

    result: Any = None
    code: str = ""
    text: str = ""
    signal: int = 0
    seconds: float = 0.0


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Ended]:
    """Run function(rank, *args) on ranks of a gloo group, and say how each ended. None is left behind.

    Args:
        timeout: of the process group, in seconds: the bound of a collective.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = rank_context()
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, size, store.port, timeout, folder, function, args) for rank in range(size)]
        ranks = [context.Process(target=_rank, args=one, daemon=True) for one in given]
        for process in ranks:
            process.start()
        end = time.monotonic() + LONGEST
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        hung = [i for i, process in enumerate(ranks) if process.is_alive()]
        for i in hung:
            ranks[i].kill()
            ranks[i].join()
        assert not hung, f"ranks {hung} still ran after {LONGEST} s"
        return [_ended(Path(folder, str(i)), process.exitcode or 0) for i, process in enumerate(ranks)]


def _ended(path: Path, exitcode: int) -> Ended:
    if path.exists():
        return pickle.loads(path.read_bytes())  # type: ignore[no-any-return]
    assert exitcode < 0, f"a rank ended with status {exitcode} and left nothing"
    return Ended(signal=-exitcode)


def _rank(
    rank: int,
    size: int,
    port: int,
    timeout: float,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    bound = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=bound)
    start = time.monotonic()
    try:
        ended = Ended(function(rank, *args))
    except Exception as error:
        ours = cppass.unwrap(error)
        ended = Ended(code=getattr(ours, "code", type(ours).__name__), text=str(ours))
    ended = dataclasses.replace(ended, seconds=time.monotonic() - start)
    Path(folder, str(rank)).write_bytes(pickle.dumps(ended))
    os._exit(0)  # groups that lost a rank may wait for it when they are torn down


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
