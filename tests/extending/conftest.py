"""Every test starts and ends with nothing registered."""

from collections.abc import Iterator

import pytest

from cppass import registry


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    registry._registrations.clear()
    yield
    registry._registrations.clear()
