"""Random steps of a model runner: every rank has the rows and caches of one device, or the graph is refused."""

from __future__ import annotations

import dataclasses
import unittest.mock

import pytest
from fuzz.runner_steps import Step, outcome, runner_steps
from fuzz.tally import sweep
from fuzz.test_programs import MakeTally, assert_nothing_wrong

from cppass.layout import Zigzag

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch_npu, copying constants
SAMPLE = 25
STEP = Step(4, (13, 50, 1), (0, 20, 130), bucket=(4, 1), before=(("rms norm", 0),))


def test_a_sample_of_steps(tally: MakeTally) -> None:
    found = tally("runner's steps, a sample")
    sweep(runner_steps(), outcome, found, SAMPLE)
    assert_nothing_wrong(found)
    assert found.share("rewritten") > 0.6


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_many_steps(tally: MakeTally, request: pytest.FixtureRequest) -> None:
    found = tally("runner's steps")
    sweep(runner_steps(), outcome, found, request.config.getoption("--fuzz-cases") // 4)
    assert_nothing_wrong(found)


def test_rows_that_mix_are_refused() -> None:
    step = dataclasses.replace(STEP, after=(("mixing: cumsum", 0),))
    assert outcome(STEP) == "rewritten"
    assert outcome(step).startswith("refused")


def test_an_order_that_is_wrong_is_found() -> None:
    """Control: rows put back in another order."""
    right = Zigzag.homes
    wrong = unittest.mock.patch.object(Zigzag, "homes", lambda self: reversed(list(right(self))))
    with wrong, pytest.raises(AssertionError):
        outcome(STEP)
