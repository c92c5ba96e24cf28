"""Random batches of torch_npu's ops: every rank gives what one device gives, or the graph is refused."""

from __future__ import annotations

import pytest
from fuzz.check import outcome
from fuzz.npu_batches import Batch, batches, case_of
from fuzz.tally import sweep
from fuzz.test_programs import MakeTally, assert_nothing_wrong

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch_npu, copying constants
SAMPLE = 25


def checked(batch: Batch) -> str:
    return outcome(case_of(batch))


def test_a_sample_of_batches(tally: MakeTally) -> None:
    found = tally("NPU batches, a sample")
    sweep(batches(), checked, found, SAMPLE)
    assert_nothing_wrong(found)
    assert found.share("rewritten") > 0.6


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_many_batches(tally: MakeTally, request: pytest.FixtureRequest) -> None:
    found = tally("NPU batches")
    sweep(batches(), checked, found, request.config.getoption("--fuzz-cases") // 4)
    assert_nothing_wrong(found)
