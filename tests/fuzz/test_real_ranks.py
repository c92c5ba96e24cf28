"""Random models compiled by torch.compile(backend="npu_cp") on real ranks: processes, gloo, one spawn for many."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fuzz.check import agree, as_list, cloned, traced
from fuzz.programs import Program, case_of, programs
from fuzz.tally import Tally, drawn
from fuzz.test_programs import MakeTally
from gloo import on_ranks
from torch import Tensor

import cppass

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch_npu, copying constants
SAMPLE, CP = 6, 2
Ran = tuple[str, list[Tensor]]  # outcome; outputs and inputs after the run


def compiled(rank: int, sample: list[Program]) -> list[Ran]:
    """What becomes of each program on this rank."""
    return [_one(program) for program in sample]


def _one(program: Program) -> Ran:
    case = case_of(program)
    torch._dynamo.reset()
    cppass.clear_reports()
    model = torch.compile(traced(case), backend="npu_cp", fullgraph=True, options={"strict": program.strict})
    own = cloned(case.inputs)
    try:
        with torch.no_grad():
            outputs = as_list(model(*own))
    except Exception as error:
        ours = cppass.unwrap(error)
        if isinstance(ours, (cppass.RefusedError, cppass.Unsupported)):
            return f"refused {ours.code}", []
        raise
    return cppass.reports()[-1].status, outputs + own


def run_sample(tally: Tally, cases: int) -> None:
    """Static shapes: a graph by make_fx is compiled, whose sizes are numbers."""
    found = [drawn(programs(), tally.seed, number) for number in range(cases)]
    sample = [dataclasses.replace(program, cp_size=CP, symbolic=False) for program in found]
    by_rank = on_ranks(CP, compiled, sample)
    for program, ran in zip(sample, zip(*by_rank, strict=True), strict=True):
        outcomes = {outcome for outcome, _ in ran}
        assert len(outcomes) == 1, f"{program}: ranks disagree: {outcomes}"
        tally.counts[outcomes.pop()] += 1
        if ran[0][1]:
            agree(case_of(program), [values for _, values in ran], f"gloo: {program}")


def test_a_sample_on_real_ranks(tally: MakeTally) -> None:
    found = tally("real ranks, a sample")
    run_sample(found, SAMPLE)
    assert found.counts["rewritten"] >= 2


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_many_on_real_ranks(tally: MakeTally, request: pytest.FixtureRequest) -> None:
    found = tally("real ranks")
    for _ in range(max(1, request.config.getoption("--fuzz-cases") // 1000)):
        run_sample(found, 20)
        found.seed += 1
