"""The verifier's mutation score: broken rewritten graphs, and how many of them verification notices.

    pytest -m fuzz tests/fuzz/test_mutants.py --fuzz-cases 10000

A survivor is found again by `random.Random(f"{seed} {name} {kind} {i}")`, which draws where the mutation goes.
"""

from __future__ import annotations

import pytest
from fuzz.mutants import SUBJECTS, Score, scored
from fuzz.mutations import MUTATIONS
from fuzz.tally import TALLIES

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch_npu, copying constants
FLOOR = 0.98


def assert_score(score: Score, config: pytest.Config) -> None:
    config.stash.setdefault(TALLIES, []).append(score)
    caught, all_of = score.of()
    assert caught >= FLOOR * all_of, f"survivors: {score.survivors[:20]}"


def test_a_sample_of_mutants(request: pytest.FixtureRequest) -> None:
    score = scored(1, 0)
    assert score.of()[1] > 80  # most mutations find a place and change a number
    assert_score(score, request.config)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_many_mutants(request: pytest.FixtureRequest) -> None:
    cases = request.config.getoption("--fuzz-cases")
    rounds = max(1, cases // (len(SUBJECTS) * len(MUTATIONS)))
    assert_score(scored(rounds, request.config.getoption("--fuzz-seed")), request.config)
