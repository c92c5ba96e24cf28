"""Section `agreement`: what it costs that ranks agree before a step, against the least collective there is.

agreement     cppass.party.exchange over a TCPStore, as under torchrun    against    all-gather of 8 bytes over gloo
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from cppass.bench.ratio import Ratio, in_turns, milliseconds, seconds_of
from cppass.bench.spawn import Barrier, Found, on_ranks, slowest
from cppass.bench.table import Table
from cppass.demo.display import Display
from cppass.party import Party
from cppass.target import Ranks

RANKS, TURNS = (2, 4), 301
QUICK_TURNS = 21
WORDS = {"graph": "0" * 64, "sizes": {"the number ids.size()[1]": 8192}, "ids": ""}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of every turn, of the slowest rank."""

    ranks: int
    agreement: tuple[float, ...]
    gather: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class AgreementResult:
    costs: tuple[Cost, ...]

    def table(self) -> Table:
        return Table(
            "agreement of the ranks before a step",
            ("ranks", "agreement, ms", "all-gather of 8 bytes, ms", "agreement / all-gather"),
            tuple(
                (
                    str(c.ranks),
                    milliseconds(c.agreement),
                    milliseconds(c.gather),
                    Ratio.of(c.agreement, c.gather).text(),
                )
                for c in self.costs
            ),
            (
                "Ranks of one thread on loopback; the store is a TCPStore, held by rank 0, as MASTER_ADDR has it. "
                f"{len(self.costs[0].agreement)} turns of both: the median (least..most). An agreement comes once a "
                "step, not once a layer. With more ranks than cores, ranks wait for each other's turn on a core.",
            ),
        )

    def bars(self) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> AgreementResult:
    display.start("agreement", len(RANKS))
    costs = []
    for ranks in RANKS:
        display.step(f"{ranks} ranks")
        found = on_ranks(_agree, ranks, ranks, QUICK_TURNS if quick else TURNS)
        costs.append(Cost(ranks, slowest(found, "agreement"), slowest(found, "gather")))
    display.finish()
    return AgreementResult(tuple(costs))


def _agree(rank: int, barrier: Barrier, ranks: int, turns: int) -> Found:
    """The work of a rank."""
    group = dist.group.WORLD
    party = Party(group, _tcp_store(rank, ranks), Ranks(rank, ranks, str(group.group_name)))  # type: ignore[union-attr]
    one, all_of_them = torch.zeros(1, dtype=torch.int64), [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]

    def agree() -> float:
        barrier()
        return seconds_of(lambda: party.exchange(WORDS))

    def gather() -> float:
        barrier()
        return seconds_of(lambda: dist.all_gather(all_of_them, one))

    agreement, gathers = in_turns(agree, gather, turns)
    barrier()
    return {"agreement": list(agreement), "gather": list(gathers)}


def _tcp_store(rank: int, ranks: int) -> Any:
    """A TCPStore that rank 0 holds, at a port that is free."""
    port = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        held = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        port[0] = held.port
    dist.broadcast(port, 0)
    return held if rank == 0 else dist.TCPStore("127.0.0.1", int(port), ranks, is_master=False)  # type: ignore[attr-defined]
