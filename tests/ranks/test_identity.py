"""Graphs belong to a rank, group, world size and options; compiling again and again leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
from faults.ranks import run_ranks
from ranks.identity import run

pytestmark = pytest.mark.timeout(300)
EQUAL = ["two groups", "another world size", "after a reset", "threads", "recompiles"]


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    ranks = run_ranks(2, run)
    assert all(r.result for r in ranks), [r.text for r in ranks]
    return [r.result for r in ranks]


@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_one_device(name: str, seen: list[dict[str, Any]]) -> None:
    assert max(found[name] for found in seen) < 1e-5


def test_options_are_part_of_a_graph(seen: list[dict[str, Any]]) -> None:
    assert [found["other options"] for found in seen] == [["rewritten", "left alone"]] * 2


def test_nothing_is_left_of_earlier_compilations(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert found["leak"]["models"] <= 1, "at most the last one, held by torch"
        assert found["leak"]["words"] <= 2
