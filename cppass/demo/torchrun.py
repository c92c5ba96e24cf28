"""The same run where torchrun started the ranks: this process is one of them; rank 0 runs the other phases and prints.

The ranks talk over torchrun's store, under the prefix "cppass/": "alive/N" (rank 0 is at its Nth step before the
prefill; the text of the last one is "ready" or "failed"), "answer/R" (result or failure of rank R), "shown" (rank 0
showed the failure).
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cppass.demo.display import Display
from cppass.demo.failure import Failure, RankError
from cppass.demo.group import bind_loopback
from cppass.demo.job import Job, phases
from cppass.demo.launch import run_phase
from cppass.demo.outcome import Outcome
from cppass.demo.results import ProcessResult
from cppass.demo.run import STEPS_BESIDE_REPEATS
from cppass.demo.streams import silenced
from cppass.errors import OptionError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

GRACE = 5.0
"""Seconds a failed rank waits for rank 0 to show the failure before it does so itself."""


@dataclasses.dataclass(frozen=True)
class World:
    """What torchrun says about this process: its rank, and how many there are."""

    rank: int
    size: int


class ShownElsewhere(SystemExit):
    """This rank failed too, and rank 0 has said so: leave with status 1 and say nothing."""


def detect() -> World | None:
    """The launcher's variables, or None where there is none.

    Raises:
        OptionError: CP054, ranks on several hosts, or variables that are no numbers.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    numbers = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    if not all(number is None or number.isdecimal() for number in numbers):
        raise OptionError(
            "CP054", f"RANK, WORLD_SIZE, LOCAL_WORLD_SIZE are {numbers}", "start it by torchrun, or unset them"
        )
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) != world.size:
        raise OptionError("CP054", "the ranks are on several hosts", "run the demonstration on one host (--nnodes 1)")
    return world


def run_as_rank(job: Job, world: World, display: Display) -> Outcome | None:
    """Be one rank of the job; the outcome on rank 0, None elsewhere.

    Raises:
        RankError: what failed, on the one rank that is to show it.
        ShownElsewhere: on the others.
    """
    from torch.distributed import DistError, PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    from cppass.demo.group import check_gloo

    check_gloo()
    bind_loopback(os.environ)
    try:
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=job.timeout)))
    except (DistError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OptionError(
            "CP054", f"the ranks cannot meet at {where}: {error}", "start it by torchrun, or choose a free MASTER_PORT"
        ) from error
    store = PrefixStore("cppass", store)
    store.set_timeout(datetime.timedelta(seconds=job.timeout))
    if world.rank == 0:
        return _lead(job, world, store, display)
    _follow(job, world, store)
    return None


def _lead(job: Job, world: World, store: Store, display: Display) -> Outcome:
    alive = itertools.count(1)
    with tempfile.TemporaryDirectory(prefix="cppass-") as name:
        folder, (one, ranks, *others) = Path(name), phases(job)
        store.set("alive/0", name)

        def step(text: str) -> None:
            store.set(f"alive/{next(alive)}", text)
            display.step(text)

        try:
            display.start(one.title, job.repeat + STEPS_BESIDE_REPEATS)
            baseline = run_phase(job, one, folder, step)
        except BaseException:
            store.set(f"alive/{next(alive)}", "failed")
            raise
        display.finish()
        display.start(ranks.title, job.repeat + STEPS_BESIDE_REPEATS)
        store.set(f"alive/{next(alive)}", "ready")
        _answer(job, world, store, folder, display.step)
        results = _gather(world, store)
        display.finish()
        last: ProcessResult | None = None
        for phase in others:
            display.start(phase.title, job.repeat + STEPS_BESIDE_REPEATS)
            (last,) = run_phase(job, phase, folder, display.step)
            display.finish()
    return Outcome(job, baseline[0], results, last, launcher="torchrun")


def _follow(job: Job, world: World, store: Store) -> None:
    """A rank other than 0. Waits step by step, so that only silence runs into the timeout."""
    folder = Path(store.get("alive/0").decode())
    for n in itertools.count(1):
        said = store.get(f"alive/{n}").decode()
        if said == "failed":
            raise ShownElsewhere(1)
        if said == "ready":
            break
    failure = _answer(job, world, store, folder, lambda text: None)
    if failure is None:
        return
    try:
        store.wait(["shown"], datetime.timedelta(seconds=GRACE))
    except RuntimeError as silence:
        raise RankError(f"rank {world.rank}", failure) from silence
    raise ShownElsewhere(1)


def _answer(job: Job, world: World, store: Store, folder: Path, say: Callable[[str], None]) -> Failure | None:
    """Run this rank and put its result, or its failure, where rank 0 finds it."""
    from cppass.demo.group import joined
    from cppass.demo.prefill import run_process

    say("starting")
    phase = phases(job)[1]
    failure = None
    with silenced(folder / f"{phase.name}-{world.rank}.log"):
        try:
            with joined(store, world.rank, world.size, job.timeout) as barrier:
                text = json.dumps({"result": run_process(job, phase, folder, say, barrier).to_json()})
        except Exception as error:
            failure = Failure.of(error)
            text = json.dumps({"failure": failure.to_json()})
    store.set(f"answer/{world.rank}", text)
    return failure


def _gather(world: World, store: Store) -> tuple[ProcessResult, ...]:
    """All results in rank order, or RankError of the failure that explains the others."""
    results: list[ProcessResult] = []
    failures: list[tuple[int, Failure]] = []
    for rank in range(world.size):
        if failures:
            store.set_timeout(datetime.timedelta(seconds=GRACE / 2))
        try:
            answer = json.loads(store.get(f"answer/{rank}"))
        except RuntimeError as error:
            failures.append((rank, Failure.of(error)))
            continue
        if "failure" in answer:
            failures.append((rank, Failure.from_json(answer["failure"])))
        else:
            results.append(ProcessResult.from_json(answer["result"]))
    if failures:
        store.set("shown", "1")
        rank, failure = min(failures, key=lambda item: item[1].remoteness)
        raise RankError(f"rank {rank}", failure)
    return tuple(results)
