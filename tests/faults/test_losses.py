"""A rank that dies, hangs or raises: every other one raises a named error in time, and nothing is left behind."""

from __future__ import annotations

import signal
import socket

import psutil
import pytest
from faults.disagreements import CASES
from faults.losses import LOSSES, store_holder_dies
from faults.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)
SHORT = {"killed_before_compiling": 5, "raises_and_ends": 5, "hangs_in_the_middle": 6}  # timeouts of the group
LOADED = 2  # compiling, which is part of the seconds below, takes longer on a machine with other work
KILLED = (signal.SIGKILL.name, 0.0)

# what happens to rank 1: (what rank 0 must say, within seconds), (what rank 1 must say or the signal it died of, ...)
EXPECTED: dict[str, tuple[tuple[str, float], tuple[str, float]]] = {
    "killed_before_compiling": (("[CP606] rank 1 of 2 did not reach this step within 5 s", 15), KILLED),
    "killed_while_compiling": (("[CP606] rank 1 of 2 ended; this is rank 0, step 1", 12), KILLED),
    "killed_in_the_middle_of_a_prefill": (("", 15), KILLED),
    "killed_at_decode": (("", 15), KILLED),
    "raises_and_ends": (("[CP606] rank 1 of 2 did not reach this step within 5 s", 15), ("no such request", 1)),
    "raises_in_the_middle_and_lives": (
        ("[CP605] rank 1 failed: MemoryError: no more pages", 18),
        ("no more pages", 18),
    ),
    "hangs_in_the_middle": (("[CP608] a collective of this step failed", 25), ("[CP608]", 25)),
    "comes_too_late": (("[CP606] rank 1 of 2 did not reach this step within 2 s", 12), ("[CP605] rank 0 failed", 15)),
    "raises_while_compiling": (
        ("[CP605] rank 1 failed: [CP901] compilation failed: DataDependentOutputException", 12),
        ("[CP901] compilation failed", 12),
    ),
    "a_cache_of_another_dtype": (("[CP606] rank 1 of 2 ended", 15), ("RuntimeError when making fake tensor call", 12)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_ends_in_time_and_says_why(name: str) -> None:
    ranks = run_ranks(2, LOSSES[name], timeout=SHORT.get(name, 60))
    for ended, (words, seconds) in zip(ranks, EXPECTED[name], strict=True):
        if words == signal.SIGKILL.name:
            assert ended.signal == signal.SIGKILL
        else:
            assert words in ended.text
            assert ended.seconds < LOADED * seconds
    if name == "killed_in_the_middle_of_a_prefill":
        assert ranks[0].result == {"code": "CP608", "committed rows unchanged": True}
    elif name == "killed_at_decode":
        prefill, decode = ranks[0].result["errors"]
        assert ranks[0].result["code"] == "CP606"
        assert max(prefill, decode) < 1e-5, "what rank 0 does on its own goes on"
    else:
        assert ranks[0].text, "rank 0 has to raise"
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.parametrize("name", ["killed_in_the_middle_of_a_prefill", "raises_in_the_middle_and_lives"])
def test_a_rank_that_waits_for_a_rank_that_waits_ends_too(name: str) -> None:
    """Four ranks, whose collectives go in a ring: not all of them talk to the one that is lost."""
    ranks = run_ranks(4, LOSSES[name], timeout=150)
    lost = ranks.pop(1)
    assert lost.signal == signal.SIGKILL or "no more pages" in lost.text
    for ended in ranks:
        assert ended.seconds < 60, "well before the timeout of the group"
        assert (ended.result or {}).get("code") == "CP608" or "[CP60" in ended.text


def test_the_holder_of_the_store_dies() -> None:
    """As under MASTER_ADDR: rank 0's process is where the others meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    holder, other = run_ranks(2, store_holder_dies, port)
    assert holder.signal == signal.SIGKILL
    assert "[CP606] the store of the process group cannot be reached" in other.text


def test_ranks_that_are_well_say_nothing() -> None:
    """Control: the same harness without a fault."""
    assert all(r.result is not None and r.result < 1e-5 for r in run_ranks(2, CASES["a_slow_rank"]))
