"""Tensors of a plan that is not meant for a compiled model: shapes fit, numbers would not, so it raises (CP616)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runner.batches import batch_of

from cppass.errors import StepError
from cppass.runner import Bucket, StepPlan
from cppass.step_tag import check_steps

BATCH = batch_of([13, 50, 1], [0, 20, 30])
MODEL = (2, 0, "balanced")  # compiled for rank 0 of 2


def planned(cp_size: int = 2, rank: int = 0, **given: Any) -> StepPlan:
    return BATCH.plan(cp_size, rank, bucket=Bucket(64, 4), pad_slot=BATCH.pad_slot, **given)


def inputs_of(plan: StepPlan) -> list[Any]:
    """What a model is handed, in the order of its inputs: tensors and lengths."""
    ids = plan.shard(torch.arange(BATCH.tokens))
    return [ids, plan.slot_mapping, *plan.cu_q, plan.block_table, torch.ones(3)]


def call(inputs: list[Any], boxed: bool = False) -> Any:
    run = check_steps(lambda *given: len(given), MODEL)
    return run(inputs) if boxed else run(*inputs)


@pytest.mark.parametrize("boxed", [False, True])
def test_a_plan_for_this_model_passes(boxed: bool) -> None:
    inputs = inputs_of(planned())
    assert call(inputs, boxed) == (1 if boxed else len(inputs))


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"cp_size": 4}, "rank 0 of 4, remainder='balanced'"),
        ({"rank": 1}, "rank 1 of 2, remainder='balanced'"),
        ({"remainder": "first"}, "rank 0 of 2, remainder='first'"),
    ],
)
@pytest.mark.parametrize("boxed", [False, True])
def test_a_plan_for_another_model_is_refused(given: dict[str, Any], seen: str, boxed: bool) -> None:
    with pytest.raises(StepError) as caught:
        call(inputs_of(planned(**given)), boxed)
    assert caught.value.code == "CP616"
    assert f"planned for {seen}; the model is compiled for rank 0 of 2, remainder='balanced'" in str(caught.value)


def test_tensors_of_two_steps_are_refused() -> None:
    old, new = inputs_of(planned()), inputs_of(planned())
    with pytest.raises(StepError, match=r"(?s)\[CP616\].*different steps.*one plan") as caught:
        call([new[0], *old[1:]])
    assert caught.value.hint


def test_tensors_that_a_runner_made_itself_pass() -> None:
    """There is nothing to compare: the contract is the runner's."""
    assert call([torch.arange(64), torch.arange(128)]) == 2
