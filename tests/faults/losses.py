"""What can happen to one rank of two: it dies, hangs or raises, at every stage. Each runs in processes of its own."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from faults.ranks import kill_self
from faults.served import Served, at_attention

import cppass.backend
from cppass import unwrap

LOSSES: dict[str, Callable[[int], Any]] = {}


def loss(function: Callable[[int], Any]) -> Callable[[int], Any]:
    LOSSES[function.__name__] = function
    return function


@loss
def killed_before_compiling(rank: int) -> None:
    if rank == 1:
        kill_self()
    Served().step(12)


@loss
def killed_while_compiling(rank: int) -> None:
    if rank == 1:
        cppass.backend.rewrite_graph = lambda *_: kill_self()  # type: ignore[assignment]
    Served().step(12)


@loss
def killed_in_the_middle_of_a_prefill(rank: int) -> dict[str, Any]:
    """Rank 0 tells whether the rows committed before the step stayed as they were."""
    served = Served()
    assert served.step(8) < 1e-5
    committed = copy.deepcopy([cache[:, :, :8] for cache in served.caches])
    code = ""
    with at_attention(1, kill_self if rank == 1 else lambda: None):  # the second layer
        try:
            served.step(8)
        except Exception as error:
            code = unwrap(error).code  # type: ignore[attr-defined]
    same = all(bool((cache[:, :, :8] == old).all()) for cache, old in zip(served.caches, committed, strict=True))
    return {"code": code, "committed rows unchanged": same}


@loss
def killed_at_decode(rank: int) -> dict[str, Any]:
    """Decode is each rank's own: it goes on; the next prefill says who is missing."""
    served = Served()
    errors = [served.step(8)]
    if rank == 1:
        kill_self()
    errors.append(served.step(1))
    try:
        served.step(8)
    except Exception as error:
        return {"code": unwrap(error).code, "errors": errors}  # type: ignore[attr-defined]
    return {}


@loss
def raises_and_ends(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such request")
    Served().step(12)


@loss
def raises_in_the_middle_and_lives(rank: int) -> None:
    served = Served()
    served.step(8)

    def fault() -> None:
        raise MemoryError("no more pages")

    try:
        with at_attention(1, fault if rank == 1 else lambda: None):
            served.step(8)
    finally:
        if rank == 1:
            time.sleep(3)  # it holds its connections; what ends rank 0's wait is not that this process does


@loss
def hangs_in_the_middle(rank: int) -> None:
    served = Served(agreement_timeout=60)
    served.step(8)
    with at_attention(1, (lambda: time.sleep(12)) if rank == 1 else lambda: None):
        served.step(8)


@loss
def comes_too_late(rank: int) -> None:
    served = Served(agreement_timeout=2)
    if rank == 1:
        time.sleep(8)
    served.step(8)


@loss
def raises_while_compiling(rank: int) -> None:
    """An error that Dynamo would take for a reason to run eagerly, on one rank alone."""
    if rank == 1:

        def fail(*_: Any) -> None:
            raise torch._subclasses.fake_tensor.DataDependentOutputException(torch.ops.aten.item.default)

        cppass.backend.rewrite_graph = fail  # type: ignore[assignment]
    Served().step(12)


@loss
def a_cache_of_another_dtype(rank: int) -> None:
    """An error of torch's own, before the backend is called; then the process ends."""
    served = Served()
    served.step(8)
    torch._dynamo.reset()
    served.caches = [cache.to((torch.float32, torch.float64)[rank]) for cache in served.caches]
    with torch.no_grad():
        served.compiled(torch.zeros(1, 8, dtype=torch.int64), torch.tensor(0), *served.caches)


def store_holder_dies(rank: int, port: int) -> None:
    """As under MASTER_ADDR and MASTER_PORT: rank 0's process holds the store, and dies."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    served = Served()
    served.step(8)
    if rank == 0:
        kill_self()
    time.sleep(0.5)
    served.step(8)
