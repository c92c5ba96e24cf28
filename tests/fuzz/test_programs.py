"""Random models: every rank gives what one device gives, or the graph is refused. docs/verification.md has the record.

    pytest -m fuzz --fuzz-cases 10000 --fuzz-seed 1

A failure prints the program as data: `outcome(case_of(Program(...)))` runs it again, `smallest(program, fails)` is its
smallest part that fails (fuzz/shrink.py).
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from fuzz.check import Wrong, alone, outcome
from fuzz.programs import Program, case_of, programs
from fuzz.tally import Tally, drawn, sweep

from cppass import op_rules
from cppass.layout import Zigzag
from cppass.match import mask

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch_npu, copying constants
MakeTally = Callable[[str], Tally]
SAMPLE = 40


def checked(program: Program) -> str:
    return outcome(case_of(program))


def assert_nothing_wrong(tally: Tally) -> None:
    assert not tally.failures, "\n\n".join(f"{case}\n  {error}" for case, error in tally.failures[:20])


def fails(program: Program) -> bool:
    """For `smallest`. A program that one device cannot run does not fail."""
    try:
        case = case_of(program)
        alone(case)
    except Exception:
        return False
    try:
        outcome(case)
    except Exception:
        return True
    return False


def test_a_sample_of_programs(tally: MakeTally) -> None:
    found = tally("programs, a sample")
    sweep(programs(), checked, found, SAMPLE)
    assert_nothing_wrong(found)
    assert found.share("rewritten") > 0.6  # most compare something


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_many_programs(tally: MakeTally, request: pytest.FixtureRequest) -> None:
    found = tally("programs")
    sweep(programs(), checked, found, request.config.getoption("--fuzz-cases"))
    assert_nothing_wrong(found)


# -- controls: what the sample would find ------------------------------------------------------------------------------


def first_wrong(word: str = "") -> Program | None:
    """Of the sample's programs with this word in them."""
    sample = (drawn(programs(), 0, number) for number in range(SAMPLE))
    for program in sample:
        try:
            if word in str(program):
                checked(program)
        except Wrong:
            return program
    return None


def test_a_wrong_rule_is_found() -> None:
    """cumsum as if it kept rows apart: verification trusts the rules, numbers do not."""
    with unittest.mock.patch.dict(op_rules.RULES, {torch.ops.aten.cumsum.default: op_rules.POINTWISE}):
        assert first_wrong("cumsum") is not None


def test_rows_put_back_in_another_order_are_found() -> None:
    def homes(self: Zigzag) -> Iterator[tuple[int, Any, Any]]:
        yield from reversed(list(right(self)))

    right = Zigzag.homes
    with unittest.mock.patch.object(Zigzag, "homes", homes):
        assert first_wrong() is not None


def test_a_wrong_window_is_found() -> None:
    """One key more in a sliding window."""

    def one_more(value: sympy.Expr) -> int:
        return right(value) + 1

    right = mask.static_int
    with unittest.mock.patch.object(mask, "static_int", one_more):
        assert first_wrong("window of") is not None
