"""All cases that run on ranks. They register themselves where they are imported, in spawned processes too."""

from __future__ import annotations

import errors.call_cases
import errors.input_cases
import errors.model_cases  # noqa: F401
from errors.rank_case import CASES, Seen, seen

__all__ = ["CASES", "Seen", "run_cases"]


def run_cases(rank: int, names: list[str]) -> dict[str, Seen]:
    return {name: seen(CASES[name]()) for name in names}
