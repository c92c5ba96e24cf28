"""A rule from outside in graphs of torch_npu's ops, of whole inputs and of a rank's own rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extending import own_ops as own
from runner.sharded_snippets import BATCH, CP, NAMED, PLAN, D, Layer, attend, layer_of, rows_of, traced
from torch import Tensor

import cppass
from cppass.extend import row_wise

ONE = BATCH.plan(1)


def layer(x: Tensor, *tensors: Tensor, plan: Any = PLAN) -> Tensor:
    """Attention, and a norm of one's own behind it; the last row of each sequence."""
    own_tensors = Layer(*tensors)
    return own.norm(attend(x, own_tensors, plan), torch.arange(4 * D) / D).index_select(0, own_tensors.last - 1)


def test_rows_of_one_rank() -> None:
    given = [(BATCH.plan(CP, rank).shard(rows_of(BATCH)), *layer_of(BATCH, PLAN).tensors) for rank in range(CP)]
    config = cppass.CPConfig(inputs="sharded", sharded_inputs=NAMED, cp_size=CP)
    with pytest.raises(cppass.RefusedError, match=r"CP310.*owntest.norm.default has no rule"):
        cppass.run_pass(traced(layer, given[0]), given[0], config)
    cppass.rule("owntest::norm", row_wise("x"))
    one = layer_of(BATCH, None)
    expected = layer(rows_of(BATCH), *one.tensors, plan=ONE)
    for seen, _ in cppass.simulate(layer, given[0], CP, config, rank_inputs=given):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_whole_inputs() -> None:
    inputs = (rows_of(BATCH), *layer_of(BATCH, None).tensors)

    def whole(x: Tensor, *tensors: Tensor) -> Tensor:
        return layer(x, *tensors, plan=ONE)

    cppass.rule("owntest::norm", row_wise("x"))
    report = cppass.run_pass(traced(whole, inputs), inputs, cp_size=CP, strict=True)
    assert (report.status, report.notes) == ("rewritten", ())
    expected = whole(*[x.clone() for x in inputs])
    for seen, _ in cppass.simulate(whole, inputs, CP, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
