"""NPU-style Qwen3 on real ranks, through eager, npugraph_ex (force_eager) and torchair (run_eagerly)."""

from __future__ import annotations

import pytest
import torch
from gloo import on_ranks
from npu.npu_ranks import Case, Seen, run

pytestmark = pytest.mark.timeout(700)  # the first test of a set waits for all of it

EVEN, UNEVEN = ([40, 24], None), ([13, 50, 1], None)
CHUNK, DECODE = ([40, 24], [64, 3]), ([1, 1], [104, 27])
LENGTHS = (EVEN, ([64, 32], None), ([41, 23], None), ([20, 9], [64, 3]))  # of two sequences, for one compile

TWO = {
    "dense, npugraph_ex": Case("dense", "npugraph_ex", (EVEN, CHUNK, DECODE)),
    "dense, torchair": Case("dense", "torchair", (UNEVEN, CHUNK)),
    "dense, eager, version 1": Case("dense", "eager", (UNEVEN, ([64], None), ([7], [64])), op="v1"),
    "moe, npugraph_ex": Case("moe", "npugraph_ex", (UNEVEN, CHUNK)),
    "moe, torchair": Case("moe", "torchair", (EVEN, DECODE)),
    "dense, npugraph_ex, dynamic": Case("dense", "npugraph_ex", LENGTHS, dynamic=True),
    "dense, torchair, dynamic": Case("dense", "torchair", LENGTHS, dynamic=True),
    "moe, eager, dynamic": Case("moe", "eager", (EVEN, ([32, 29], None)), dynamic=True),  # counts differ
    "dense, eager, bfloat16": Case("dense", "eager", (EVEN,), dtype=torch.bfloat16),
    "hook of torchair": Case("moe", "", (UNEVEN,), hook="torchair"),
    "hook of torchair, dynamic": Case("dense", "", (EVEN, ([64, 32], None)), hook="torchair", dynamic=True),
}
FOUR = {
    "dense, npugraph_ex": Case("dense", "npugraph_ex", (UNEVEN, ([17, 9, 64], [13, 50, 1]))),
    "moe, eager": Case("moe", "eager", (([41, 7, 1, 64], None),)),
    "dense, eager, dynamic": Case("dense", "eager", LENGTHS, dynamic=True),
}
OWN = {"hook of npugraph_ex": Case("dense", "", (EVEN,), hook="npugraph_ex")}  # torchair's patches collide with its
REFUSED = {"hook of npugraph_ex, dynamic": Case("dense", "", (EVEN,), hook="npugraph_ex", dynamic=True, refused=True)}

Results = dict[str, list[Seen]]


def _results(cp_size: int, cases: dict[str, Case]) -> Results:
    by_rank = on_ranks(cp_size, run, list(cases.values()))
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def two() -> Results:
    return _results(2, TWO)


@pytest.fixture(scope="module")
def own() -> Results:
    return _results(2, OWN | REFUSED)


@pytest.fixture(scope="module")
def four() -> Results:
    return _results(4, FOUR)


def _check(case: Case, ranks: list[Seen]) -> None:
    assert not any(seen.failure for seen in ranks), ranks[0].failure
    tolerance = 1e-5 if case.dtype is torch.float32 else 5e-2
    assert max(error for seen in ranks for error in seen.errors + seen.cache_errors) <= tolerance
    assert len({seen.caches for seen in ranks}) == 1  # every rank, every bit
    assert ranks[0].statuses[0] == "rewritten"
    assert ranks[0].collectives[0] == 3  # two layers and the last rows


@pytest.mark.parametrize("name", TWO)
def test_two_ranks(name: str, two: Results) -> None:
    _check(TWO[name], two[name])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name: str, four: Results) -> None:
    _check(FOUR[name], four[name])


@pytest.mark.parametrize("name", ["dense, npugraph_ex, dynamic", "dense, torchair, dynamic"])
def test_one_compile_serves_all_lengths_that_divide_and_one_the_others(name: str, two: Results) -> None:
    assert two[name][0].statuses == ["rewritten", "rewritten"]


def test_decode_is_left_alone(two: Results) -> None:
    assert two["dense, npugraph_ex"][0].statuses == ["rewritten", "rewritten", "left alone"]


def test_the_hook_in_a_backend_of_npugraph_ex(own: Results) -> None:
    _check(OWN["hook of npugraph_ex"], own["hook of npugraph_ex"])


def test_the_hook_cannot_take_symbolic_lengths_under_acl_graph(own: Results) -> None:
    for seen in own["hook of npugraph_ex, dynamic"]:
        assert "[CP507]" in seen.failure
        assert "backend='npu_cp'" in seen.failure
