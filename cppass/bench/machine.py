"""What a record has to say of where and how it was measured; no host names and no paths."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Machine:
    """Attributes:
    cpu: the model's name.
    cores: that this process may use.
    torch: its version.
    commit: of cppass, with "-dirty" where the sources differ from it; "" where there is no repository.
    """

    cpu: str
    cores: int
    torch: str
    commit: str

    def lines(self) -> tuple[tuple[str, str], ...]:
        return (
            ("CPU", self.cpu),
            ("cores", str(self.cores)),
            ("torch", self.torch),
            ("commit", self.commit or "unknown"),
        )


def this_machine() -> Machine:
    import torch

    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Machine(_cpu(), cores, str(torch.__version__), _commit(Path(__file__).parents[1]))


def command_line(sections: Sequence[str], quick: bool, out: Path | None) -> str:
    """The command of this run. An absolute --out is shortened to DIR: where it is says nothing to others."""
    where = [] if out is None else ["--out", "DIR" if out.is_absolute() else out.as_posix()]
    return " ".join(["cppass bench", *sections, *(["--quick"] if quick else []), *where])


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit(folder: Path) -> str:
    """ "" unless `folder` is part of a repository: an installed package may lie inside someone else's."""
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return ""
    commit = _git(folder, "rev-parse", "--short=12", "HEAD") or ""
    return commit and commit + (
        "-dirty" if _git(folder, "status", "--porcelain", "-uno", "--", ".", "../lowering") else ""
    )


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
