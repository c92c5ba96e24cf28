"""Several models, groups, threads and resets in one process a rank: nothing is served what was made for another."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import torch
import torch.distributed as dist
from core import toy_transformer as toy
from faults.served import Served

import cppass
from cppass import party


def run(rank: int) -> dict[str, Any]:
    return {
        "two groups": two_groups(rank),
        "another world size": another_world_size(rank),
        "after a reset": after_a_reset(),
        "threads": threads(),
        "recompiles": recompiles(),
        "other options": other_options(),
        "leak": leak(),
    }


def two_groups(rank: int) -> float:
    """Two groups of the same ranks, the second with ranks swapped, two models in turns."""
    first, second = dist.new_group([0, 1]), dist.new_group([1, 0], sort_ranks=False)
    assert dist.get_rank(second) == 1 - rank
    one, other = Served(group=first), Served(group=second)
    return max(served.step(4) for served in (one, other, other, one, other, one))


def another_world_size(rank: int) -> float:
    """One model compiled for two ranks, then for this rank alone: the same code, other options."""
    alone = [dist.new_group([i]) for i in range(2)][rank]
    shared = Served()
    worst = shared.step(8)
    return max(worst, Served(group=alone).step(8), shared.step(8))


def after_a_reset() -> float:
    served, worst = Served(), 0.0
    for _ in range(3):
        worst = max(worst, served.step(6))
        torch.compiler.reset()
    return worst


def threads() -> float:
    """Two threads, each with a group, a model and a dynamic length of its own, at the same time."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    errors = [1.0, 1.0]

    def work(i: int) -> None:
        served = Served(dynamic=True, group=groups[i])
        errors[i] = max(served.step(n) for n in ((4, 8, 6), (5, 7, 9))[i])

    running = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    return max(errors)


def recompiles() -> float:
    """Static lengths, one after the other and again: each has a graph of its own."""
    torch.compiler.reset()
    worst = 0.0
    for tokens in (6, 8, 12, 8, 6, 12):
        worst = max(worst, Served().step(tokens))
    return worst


def other_options() -> list[str]:
    """The same model again with an option that says not to: it must not be served the first graph."""
    torch.compiler.reset()
    cppass.clear_reports()
    Served().step(8)
    Served(min_tokens=100).step(8)
    return [report.status for report in cppass.reports()]


def leak() -> dict[str, int]:
    """What is left of five compilations."""
    alive: list[weakref.ref[Any]] = []
    keys = []
    for _ in range(5):
        torch.compiler.reset()
        served = Served()
        served.step(8)
        served.step(8)
        alive.append(weakref.ref(served.model))
        keys.append(_own_keys())
        del served
    torch.compiler.reset()
    gc.collect()
    return {"models": sum(ref() is not None for ref in alive), "words": keys[-1] - keys[0], "rows": toy.ROWS}


def _own_keys() -> int:
    """Words of this rank that are still in the store."""
    found = party._parties[dist.group.WORLD.group_name]  # type: ignore[union-attr]
    return len(found._said)
