"""What a rank of a test does: a module that spawned processes can import."""

from __future__ import annotations

from cppass.bench.spawn import Barrier, Found


def failing(rank: int, barrier: Barrier) -> Found:
    if rank:
        raise ValueError("no such thing")
    barrier()
    return {}
