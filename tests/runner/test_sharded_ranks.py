"""Inputs that arrive sharded, on real ranks: outputs and caches of one device, through every inner compiler."""

from __future__ import annotations

import pytest
from gloo import on_ranks
from runner.sharded_ranks import Case, Lengths, Seen, run

from cppass.runner import Bucket

pytestmark = pytest.mark.timeout(700)  # the first test of a set waits for all of it

PROMPTS: Lengths = ([13, 50, 1], None)
FULL: Lengths = ([40, 24], None)  # as many tokens as the bucket has rows
CHUNKS: Lengths = ([20, 9, 7, 1], [64, 3, 0, 5])
MIXED: Lengths = ([1, 1, 30, 1], [77, 5, 0, 128])  # decode rows beside a prompt; a first sequence of one token
FEW: Lengths = ([8], None)
ONES: Lengths = ([1, 9, 1, 1], [0, 120, 0, 40])  # most halves hold nothing of most sequences

STEPS = (PROMPTS, FULL, CHUNKS, MIXED, FEW, ONES)
TWO = {
    "dense, npugraph_ex, bucket": Case("dense", "npugraph_ex", STEPS, Bucket(32, 4, 2)),
    "dense, eager, bucket": Case("dense", "eager", STEPS, Bucket(40, 5, 3)),
    "dense, torchair, bucket": Case("dense", "torchair", (CHUNKS, FULL, MIXED), Bucket(32, 4, 2)),
    "dense, eager, first": Case("dense", "eager", (PROMPTS, CHUNKS, ONES), remainder="first"),
    "dense, npugraph_ex, first": Case("dense", "npugraph_ex", (CHUNKS, MIXED), remainder="first"),
    "dense, eager, balanced without a bucket": Case("dense", "eager", (CHUNKS, ONES)),
    "moe, npugraph_ex, bucket": Case("moe", "npugraph_ex", (PROMPTS, FULL, FEW), Bucket(32, 4, 2)),
    "moe, eager, bucket, on prefixes": Case("moe", "eager", (CHUNKS, MIXED), Bucket(32, 4, 2)),
    "scatter_pa, eager, bucket": Case("scatter_pa", "eager", STEPS, Bucket(40, 5, 3)),
    "scatter_pa, npugraph_ex, first": Case("scatter_pa", "npugraph_ex", (CHUNKS, ONES), remainder="first"),
}
FOUR = {
    "dense, npugraph_ex, bucket": Case("dense", "npugraph_ex", STEPS, Bucket(16, 4, 2)),
    "dense, eager, first": Case("dense", "eager", (ONES, MIXED), remainder="first"),
    "moe, eager, bucket": Case("moe", "eager", (PROMPTS,), Bucket(16, 4, 2)),
    "scatter_pa, eager, bucket": Case("scatter_pa", "eager", (ONES, CHUNKS), Bucket(16, 4, 2)),
}
FIRST_IN_A_BUCKET = {  # local rows of a known number, beside lengths that are symbols
    "moe, eager, first": Case("moe", "eager", (PROMPTS, CHUNKS), remainder="first", broken=True),
    "dense, eager, first, bucket": Case(
        "dense", "eager", (CHUNKS, FULL, ONES), Bucket(32, 4, 2), remainder="first", broken=True
    ),
}
CONTROL = {"slots in natural order": Case("dense", "eager", (FULL,), Bucket(32, 2, 1), natural=True)}
COLLECTIVES = {"dense": 3, "moe": 3, "scatter_pa": 1}  # one a layer, and one for the last rows

Results = dict[str, list[Seen]]


def results(cp_size: int, cases: dict[str, Case]) -> Results:
    by_rank = on_ranks(cp_size, run, cp_size, list(cases.values()))
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def two() -> Results:
    return results(2, TWO | FIRST_IN_A_BUCKET | CONTROL)


@pytest.fixture(scope="module")
def four() -> Results:
    return results(4, FOUR)


def check(case: Case, ranks: list[Seen]) -> None:
    for seen in ranks:
        assert not seen.failure, seen.failure
        assert max(seen.errors + seen.cache_errors) <= 1e-5
        assert seen.touched == [[]] * len(case.steps)  # no bit of a page that the step does not write
        assert seen.caches == ranks[0].caches  # every rank, every bit
        assert set(seen.statuses) == {"rewritten"}
        assert set(seen.collectives) == {COLLECTIVES[case.model]}


@pytest.mark.parametrize("name", TWO)
def test_two_ranks(name: str, two: Results) -> None:
    check(TWO[name], two[name])


@pytest.mark.parametrize("name", FIRST_IN_A_BUCKET)
def test_first_in_a_bucket(name: str, two: Results) -> None:
    check(FIRST_IN_A_BUCKET[name], two[name])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name: str, four: Results) -> None:
    check(FOUR[name], four[name])


@pytest.mark.parametrize("name", [name for name in TWO if "bucket" in name and "without" not in name])
def test_one_graph_serves_all_steps_of_a_bucket(name: str, two: Results) -> None:
    for seen in two[name]:
        assert seen.statuses == ["rewritten"]


def test_one_graph_serves_all_steps_of_a_bucket_of_four_ranks(four: Results) -> None:
    for seen in four["dense, npugraph_ex, bucket"]:
        assert seen.statuses == ["rewritten"]


def test_slots_in_natural_order_are_noticed(two: Results) -> None:
    """Control: as many slots as rows, in the wrong order; rows land in slots of others, and logits show it."""
    for seen in two["slots in natural order"]:
        assert seen.errors[0] > 1e-2
        assert seen.cache_errors[0] > 1e-1
