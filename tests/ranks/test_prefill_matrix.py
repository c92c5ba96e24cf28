"""The acceptance matrix on real ranks: pairs of settings here, every combination with `pytest -m matrix`."""

import itertools
import random

import pytest
from gloo import on_ranks
from prefill_case import MATRIX, Case, run_cases


def pairwise(seed: int = 0) -> list[Case]:
    """A small set of cases in which every pair of two settings' values occurs (greedy cover)."""
    names = list(MATRIX)
    everything = [dict(zip(names, values, strict=True)) for values in itertools.product(*MATRIX.values())]
    random.Random(seed).shuffle(everything)
    missing = {pair for case in everything for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(missing & _pairs(case)))
        chosen.append(Case(**best))
        missing -= _pairs(best)
    return chosen


def _pairs(case: dict) -> set:
    return set(itertools.combinations(sorted(case.items()), 2))


def check(cp_size: int, cases: list[Case]) -> None:
    by_rank = on_ranks(cp_size, run_cases, cases)
    for outcomes in zip(*by_rank, strict=True):
        for outcome in outcomes:
            outcome.check()
        assert len({o.cache_hash for o in outcomes}) == 1, f"caches differ between ranks: {outcomes[0].case}"


@pytest.mark.timeout(700)
@pytest.mark.parametrize("cp_size", MATRIX["cp_size"])
def test_every_pair_of_settings(cp_size: int) -> None:
    check(cp_size, [case for case in pairwise() if case.cp_size == cp_size])


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cp_size", MATRIX["cp_size"])
@pytest.mark.parametrize("family", MATRIX["family"])
@pytest.mark.parametrize("cache", MATRIX["cache"])
def test_every_combination(cp_size: int, family: str, cache: str) -> None:
    fixed = {"cp_size": cp_size, "family": family, "cache": cache}
    free = {name: values for name, values in MATRIX.items() if name not in fixed}
    combinations = (dict(zip(free, values, strict=True)) for values in itertools.product(*free.values()))
    check(cp_size, [Case(**fixed, **c) for c in combinations])
