"""All cases on four ranks, started once."""

from __future__ import annotations

import pytest
from composition.cases import CASES
from composition.parallel_ranks import Seen, run
from gloo import on_ranks


@pytest.fixture(scope="session")
def seen() -> dict[tuple[str, str], list[Seen]]:
    """What each rank saw, by case."""
    by_rank = on_ranks(4, run, list(CASES.values()))
    return {key: [rank[i] for rank in by_rank] for i, key in enumerate(CASES)}
