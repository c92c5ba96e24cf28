"""Real ranks for tests: spawned processes, gloo on loopback, bounded in time, one thread each."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import rank_context

import cppass  # noqa: F401  (before torch: it lets torch_npu be imported where there is no CANN)

TIMEOUT = 600  # seconds for everything a set of ranks does


def on_ranks(cp_size: int, function: Callable[..., Any], *args: Any, group: bool = True) -> list[Any]:
    """Run function(rank, *args) on cp_size ranks; results by rank. A failing rank fails the test with its traceback.

    Args:
        group: False leaves it to the function to make a process group.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = rank_context()
        ranks = [
            context.Process(target=_rank, args=(rank, cp_size, folder, function, args, group), daemon=True)
            for rank in range(cp_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT)
        alive = [process for process in ranks if process.is_alive()]
        for process in alive:
            process.kill()
        errors = [p.read_text() for p in sorted(Path(folder).glob("error*"))]
        assert not errors, "\n".join(errors)
        assert not alive, f"{len(alive)} of {cp_size} ranks did not end within {TIMEOUT} s"
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(cp_size)]


def _rank(
    rank: int, cp_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...], group: bool
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        if group:
            store = dist.FileStore(f"{folder}/store", cp_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=cp_size)
        torch.save(function(rank, *args), f"{folder}/result{rank}")
        if group:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
