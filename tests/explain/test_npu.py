"""Graphs of torch_npu's ops: several sequences, paged caches, and inputs that arrive as local rows."""

from __future__ import annotations

import jsonschema
import pytest

pytest.importorskip("torch_npu")

from runner.sharded_snippets import BATCH, CP, PLAN, attend, layer_of, rows_of
from torch import Tensor

import cppass
from cppass.demo.explained import explain_job
from cppass.demo.job import Job
from cppass.inspection.document import schema


def test_packed_sequences_in_a_paged_cache() -> None:
    job = Job(dialect="npu", preset="qwen3-tiny", layers=3, tokens=20, batch=2, ranks=2, decode=0)
    found = explain_job(job, {}, None)
    view = found.graph_view
    assert (found.status, len(found.sites), view.layout.lengths) == ("rewritten", 3, (20, 20))
    assert (view.cost.hardware, view.report.sites[0].module) == ("ascend-910b", "layers.0.attention")
    roles = [node.role for node in view.after]
    assert (roles.count("attention"), roles.count("kv write")) == (3, 6)
    jsonschema.validate(found.to_dict(), schema())
    assert "40 tokens of 2 sequences in 4 blocks each" in str(found)
    assert "<svg" in found.to_html()


def sharded(run: object, named: dict[str, int]) -> cppass.Explanation:
    layer = layer_of(BATCH, PLAN)
    options = {"inputs": "sharded", "sharded_inputs": named, "target": "npu"}
    given = (PLAN.shard(rows_of(BATCH)), *layer.tensors)
    return cppass.explain(run, *given, cp_size=CP, options=options)  # type: ignore[arg-type]


def layer(x: Tensor, *tensors: Tensor) -> Tensor:
    """One layer of local rows."""
    given = type(layer_of(BATCH, PLAN))(*tensors)
    return attend(x, given)


def test_inputs_that_arrive_as_local_rows() -> None:
    def run(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, kc: Tensor, vc: Tensor, *more: Tensor) -> Tensor:
        return layer(x, wq, wk, wv, kc, vc, *more)

    found = sharded(run, {"x": 0})
    view = found.graph_view
    assert (found.status, view.cost) == ("rewritten", None)
    assert view.layout is not None and view.layout.lengths == (13, 50, 1)
    kinds = {node.state.kind for node in view.nodes}
    assert kinds >= {"local", "full", "gathered"}
    assert any(node.state.text == "full, rank after rank" for node in view.after)
    jsonschema.validate(found.to_dict(), schema())


def test_rows_that_no_input_brings_are_refused_by_name() -> None:
    def run(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, kc: Tensor, vc: Tensor, *more: Tensor) -> Tensor:
        return layer(x, wq, wk, wv, kc, vc, *more)

    found = sharded(run, {"hidden": 0})
    assert (found.status, found.refusals[0].code) == ("refused", "CP312")
    assert "name the inputs as the model's forward does" in str(found)
    assert "on_refusal" not in str(found)  # whole rows are not there to run on
