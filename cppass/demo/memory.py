"""Peak resident memory of this process over a stretch of code."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

WINDOW = "VmHWM, reset before the timed prefills"
LIFETIME = "ru_maxrss, over the life of the process"


def reset_peak() -> bool:
    """Set the peak to the present resident size. False where the system has no such reset (it is Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc_pid_clear_refs
        return True
    except OSError:
        return False


def peak_bytes(was_reset: bool) -> tuple[int, str]:
    """Bytes at the peak since `reset_peak`, and how they were measured; since the start where it could not reset."""
    if was_reset:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024, WINDOW
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, LIFETIME
