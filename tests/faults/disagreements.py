"""Two ranks that do not do the same: each case runs on both, in processes that live on. Results: what each raised."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from faults.served import Served

import cppass
import cppass.fingerprint

CASES: dict[str, Callable[[int], Any]] = {}
THEN = {
    "option_overlap",
    "lengths_dynamic",
    "token_ids",
    "random_weights",
    "gradients_on_one_rank",
    "a_group_that_was_destroyed",
}
"""After these a step that all ranks do alike is tried."""


def case(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CASES[function.__name__] = function
    return function


def run_cases(rank: int) -> dict[str, Any]:
    """What each case returned, or its error."""
    found: dict[str, Any] = {}
    for name, function in CASES.items():
        torch._dynamo.reset()
        try:
            found[name] = function(rank)
        except Exception as error:
            found[name] = str(cppass.unwrap(error))
        if name in THEN:
            torch._dynamo.reset()
            found[f"{name}, then"] = Served().step(8)
    return found


@case
def option_min_tokens(rank: int) -> None:
    Served(min_tokens=(0, 100)[rank]).step(8)


@case
def option_overlap(rank: int) -> None:
    Served(overlap=bool(rank)).step(8)


@case
def an_unknown_option(rank: int) -> None:
    Served(**({} if rank else {"min_token": 3})).step(8)


@case
def lengths_static(rank: int) -> None:
    Served().step((8, 12)[rank])


@case
def lengths_dynamic(rank: int) -> None:
    served = Served(dynamic=True)
    assert max(served.step(6), served.step(8)) < 1e-5
    served.step((6, 8)[rank])


@case
def one_length_below_2p(rank: int) -> None:
    Served().step((3, 8)[rank])


@case
def token_ids(rank: int) -> None:
    Served(check_inputs=True).step(8, shift=rank)


@case
def the_order_of_token_ids(rank: int) -> None:
    """The same ids, two of them exchanged."""
    served = Served(check_inputs=True)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        served.compiled(ids.flip(1) if rank else ids, torch.tensor(0), *served.caches)


@case
def token_ids_of_the_first_step(rank: int) -> None:
    Served().step(8, shift=rank)


@case
def values_by_option_unchecked(rank: int) -> float:
    """Relaxed: other ids are not noticed, and the report says that nobody looks."""
    Served(check_inputs=False).step(8, shift=rank)
    assert "check_inputs=False: ranks compare neither token ids nor weights" in cppass.reports()[-1].notes
    return 0.0


@case
def random_weights(rank: int) -> None:
    served = Served()
    torch.manual_seed(rank)
    for weight in served.model.parameters():
        torch.nn.init.normal_(weight)
    served.step(8)


@case
def one_weight(rank: int) -> None:
    served = Served(agreement="graph")
    with torch.no_grad():
        served.model.layers[1].up.mul_(1 + rank)  # type: ignore[union-attr,operator]
    served.step(8)


@case
def the_model(rank: int) -> None:
    served = Served()
    if rank:
        layer = served.model.layers[1]
        forward = layer.forward
        layer.forward = lambda x, *args: forward(x * 2, *args)  # type: ignore[method-assign]
    served.step(8)


@case
def gradients_on_one_rank(rank: int) -> None:
    served = Served()
    ids, at = torch.zeros(1, 8, dtype=torch.int64), torch.tensor(0)
    with torch.set_grad_enabled(rank == 1):
        served.compiled(ids, at, *served.caches)


@case
def a_cache_of_another_length(rank: int) -> None:
    served = Served()
    served.caches = [cache[:, :, : (24, 20)[rank]].contiguous() for cache in served.caches]
    with torch.no_grad():
        served.compiled(torch.zeros(1, 8, dtype=torch.int64), torch.tensor(0), *served.caches)


@case
def the_version(rank: int) -> None:
    """The same number, another source."""
    real = cppass.fingerprint.source_hash
    cppass.fingerprint.versions.cache_clear()
    if rank:
        cppass.fingerprint.source_hash = lambda: "0123456789ab"  # type: ignore[assignment]
    try:
        Served().step(8)
    finally:
        cppass.fingerprint.source_hash = real
        cppass.fingerprint.versions.cache_clear()


@case
def agreement_by_graph(rank: int) -> float:
    """Relaxed: the first step of a graph alone is compared."""
    served = Served(dynamic=True, agreement="graph")
    return max(served.step(8), served.step(8))


@case
def agreement_by_graph_sees_options(rank: int) -> None:
    Served(agreement="graph", overlap=bool(rank)).step(8)


@case
def a_slow_rank(rank: int) -> float:
    served = Served()
    worst = served.step(8)
    if rank:
        threading.Event().wait(1.5)
    return max(worst, served.step(8))


@case
def a_group_that_was_destroyed(rank: int) -> None:
    group = dist.new_group([0, 1])
    served = Served(group=group.group_name)
    assert served.step(8) < 1e-5
    dist.destroy_process_group(group)
    served.step(8)


def a_group_that_was_rebuilt(rank: int) -> tuple[str, float]:
    """The world anew, of the same size and on the same store, with ranks swapped; then after a reset."""
    served = Served()
    assert served.step(8) < 1e-5
    store = torch.distributed.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=1 - rank, world_size=2, timeout=datetime.timedelta(seconds=20))
    try:
        served.step(8)
    except Exception as error:
        seen = str(cppass.unwrap(error))
    torch.compiler.reset()
    return seen, Served().step(8)
