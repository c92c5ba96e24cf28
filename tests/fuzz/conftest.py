"""One thread, and a tally for each test that sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fuzz.tally import TALLIES, Tally


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny calls: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str], Tally]:
    """Makes a tally that is printed when pytest ends."""

    def make(name: str) -> Tally:
        made = Tally(name, request.config.getoption("--fuzz-seed"))
        request.config.stash.setdefault(TALLIES, []).append(made)
        return made

    return make
