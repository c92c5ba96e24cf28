"""Which process this is, in words that another process of the same machine can check: does it still run?"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def this_process() -> str:
    """ "machine pid start": the boot and the PID namespace, the number, and the clock tick at which it started.

    "" where there is no /proc: then nobody can tell.
    """
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(PROC / 'self/ns/pid')} {os.getpid()} {_start(os.getpid())}"
    except (OSError, IndexError):
        return ""


def has_ended(process: str) -> bool:
    """Whether a process that gave `this_process()` has ended; False where that cannot be known (another machine)."""
    machine, _, rest = process.partition(" ")
    if not rest or machine != this_process().partition(" ")[0]:
        return False
    pid, _, start = rest.partition(" ")
    try:
        return _start(int(pid)) != start
    except (OSError, IndexError, ValueError):
        return True


def _start(pid: int) -> str:
    """Start time of a process; "ended" of one that waits for its parent to notice."""
    state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return "ended" if state in "ZX" else fields[18]
