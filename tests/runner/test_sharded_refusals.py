"""inputs="sharded": what a graph of local rows may not do. Every refusal has its code, says what was seen and the way
out, and leaves the graph as it was. The same layer without the offence is rewritten, and is what one device computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runner.batches import batch_of
from runner.sharded_snippets import (
    BATCH,
    BLOCK,
    CP,
    GROUPS,
    NAMED,
    PLAN,
    UNEVEN,
    D,
    Layer,
    attend,
    layer_of,
    layer_run,
    refusal,
    rows_of,
    traced,
)
from torch import Tensor

import cppass
from cppass.errors import OptionError

LAYER = layer_of(BATCH, PLAN)
ROWS = PLAN.shard(rows_of(BATCH))  # [32, F]
INPUTS = (ROWS, *LAYER.tensors)


def after(tail: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The layer, and something behind it."""
    return lambda x, *tensors: tail(attend(x, Layer(*tensors)))


# -- what is allowed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [False, True], ids=["meanings", "lowered"])
@pytest.mark.parametrize("batch", [BATCH, UNEVEN], ids=["no padding", "padding"])
@pytest.mark.parametrize("packed", [False, True], ids=["paged", "packed"])
def test_the_layer_of_these_tests_is_rewritten(lower: bool, batch: Any, packed: bool) -> None:
    """Control: every rank has the last rows, and the caches, of one device."""
    batch = batch_of(batch.lengths, None, BLOCK) if packed else batch
    plans = [batch.plan(CP, rank) for rank in range(CP)]
    one, x = layer_of(batch, None), rows_of(batch)

    def run(plan: Any) -> Callable[..., Any]:
        def layer(x: Tensor, *tensors: Tensor) -> Tensor:
            own = Layer(*tensors)
            return attend(x, own, plan, packed=packed).index_select(0, own.last - 1)

        return layer

    expected = run(batch.plan(1))(x, *one.tensors)
    given = [(plan.shard(x), *layer_of(batch, plan).tensors) for plan in plans]
    config = cppass.CPConfig(inputs="sharded", sharded_inputs=NAMED, cp_size=CP)
    real = [page for page in range(batch.pages) if page != batch.pad_slot // BLOCK]
    for seen, own in cppass.simulate(run(plans[0]), given[0], CP, config, rank_inputs=given, lower=lower):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
        for cache, meant in zip(own[4:6], (one.kc, one.vc), strict=True):
            torch.testing.assert_close(cache[real], meant[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tail",
    [lambda h: h.sum(1), lambda h: torch.softmax(h, -1), lambda h: h * 2 + 1, lambda h: h.unflatten(1, (4, D))],
    ids=["sum of a row", "softmax of a row", "every value", "view of a row"],
)
def test_ops_of_each_row_are_allowed(tail: Callable[[Tensor], Tensor]) -> None:
    """Control of the test below."""
    gm = traced(after(tail), INPUTS)
    report = cppass.run_pass(gm, INPUTS, cp_size=CP, inputs="sharded", sharded_inputs=NAMED)
    assert report.status == "rewritten"


# -- CP310: rows of different ranks ------------------------------------------------------------------------------------

MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "the last row": lambda h: h[-1:],
    "a row": lambda h: h[3],
    "all but the first": lambda h: h[1:],
    "sum over rows": lambda h: h.sum(0),
    "mean of all": lambda h: h.mean(),
    "softmax over rows": lambda h: torch.softmax(h, 0),
    "running sum": lambda h: h.cumsum(0),
    "reversed rows": lambda h: h.flip(0),
    "rows times rows": lambda h: h @ h.t(),
    "rows moved by one": lambda h: torch.roll(h, 1, 0),
    "sorted rows": lambda h: h.sort(0)[0],
    "rows behind rows": lambda h: torch.cat([h, h], 0),
    "padded rows": lambda h: torch.nn.functional.pad(h, (0, 0, 0, 1)),
    "two rows in one": lambda h: h.reshape(h.shape[0] // 2, -1),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_op_that_mixes_rows(name: str) -> None:
    error = refusal(after(MIXING[name]), INPUTS)
    assert error.code == "CP310"
    assert "mixes rows of different ranks" in str(error) or "has no rule" in str(error)
    assert "index_select(hidden, 0, cu_q - 1)" in str(error)


def test_an_op_that_mixes_rows_before_attention() -> None:
    error = refusal(lambda x, *tensors: attend(x - x.mean(0), Layer(*tensors)), INPUTS)
    assert error.code == "CP310" and "aten.mean.dim" in str(error)


def test_a_value_of_all_rows_meets_local_ones() -> None:
    """A bias of as many rows as the local ones: nobody said that it is sharded."""
    bias = torch.ones(PLAN.rows, 4 * D)
    error = refusal(lambda x, bias, *tensors: attend(x, Layer(*tensors)) + bias, (ROWS, bias, *LAYER.tensors))
    assert error.code == "CP310"
    assert "arg1_1: whole" in str(error) and "sharded_inputs" in str(error)


def test_a_sharded_bias_meets_local_rows() -> None:
    """Control: the same bias, named."""
    inputs = (ROWS, torch.ones(PLAN.rows, 4 * D), *LAYER.tensors)
    gm = traced(lambda x, bias, *tensors: attend(x, Layer(*tensors)) + bias, inputs)
    named = {"arg0_1": 0, "arg1_1": 0}
    assert cppass.run_pass(gm, inputs, cp_size=CP, inputs="sharded", sharded_inputs=named).status == "rewritten"


# -- CP311: whole where local is meant, or the other way round ---------------------------------------------------------


def test_a_query_that_is_not_made_of_local_rows() -> None:
    other = torch.ones_like(ROWS)
    error = refusal(lambda x, y, *tensors: attend(x, Layer(*tensors), queries=y), (ROWS, other, *LAYER.tensors))
    assert error.code == "CP311"
    assert "the query" in str(error) and "the same on every rank" in str(error) and "arg0_1" in str(error)


def test_keys_that_are_not_made_of_local_rows() -> None:
    other = torch.ones_like(ROWS)
    error = refusal(lambda x, y, *tensors: attend(x, Layer(*tensors), keys=y), (ROWS, other, *LAYER.tensors))
    assert error.code == "CP311"
    assert "key or value of this step" in str(error)


def test_a_cache_that_is_said_to_be_sharded() -> None:
    """Rows of all ranks go into a cache that all ranks have whole."""

    def run(x: Tensor, cache: Tensor, *tensors: Tensor) -> Tensor:
        def write(pages: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
            torch.ops.npu.npu_scatter_nd_update_(cache, slots.view(-1, 1), rows)
            return pages

        return attend(x, Layer(*tensors), write=write, packed=True)

    cache = torch.zeros(PLAN.rows, GROUPS, D)
    error = refusal(run, (ROWS, cache, *LAYER.tensors), {"arg0_1": 0, "arg1_1": 0})
    assert error.code == "CP311"
    assert "the cache (arg1_1)" in str(error) and "one that holds all rows is meant" in str(error)


# -- CP312: no sharded input -------------------------------------------------------------------------------------------


def test_attention_that_no_named_input_enters() -> None:
    error = refusal(layer_run, INPUTS, {"input_ids": 0})
    assert error.code == "CP312"
    assert "input_ids" in str(error)


def test_a_graph_without_attention_that_no_named_input_enters_is_left_alone() -> None:
    """Control: graph breaks leave such graphs, and they are right on every rank."""
    gm = traced(lambda x: x + 1, (ROWS,))
    options = {"inputs": "sharded", "sharded_inputs": {"input_ids": 0}}
    assert cppass.run_pass(gm, (ROWS,), cp_size=CP, **options).status == "left alone"


# -- CP313: slots ------------------------------------------------------------------------------------------------------


def with_slots(slots: Tensor, batch: Any = UNEVEN) -> cppass.RefusedError:
    plan = batch.plan(CP)
    own = layer_of(batch, plan)
    inputs = (plan.shard(rows_of(batch)), own.wq, own.wk, own.wv, own.kc, own.vc, slots, own.table, own.mask, own.last)
    return refusal(lambda x, *tensors: attend(x, Layer(*tensors), plan), inputs)


def test_slots_in_natural_order() -> None:
    """59 tokens on 2 ranks: 60 gathered rows."""
    error = with_slots(UNEVEN.slots)
    assert error.code == "CP313"
    assert "59 slots" in str(error) and "2 ranks * 30 local rows" in str(error) and "plan.slot_mapping" in str(error)


def test_slots_of_one_rank() -> None:
    assert with_slots(UNEVEN.slots[:30]).code == "CP313"


# -- CP113: forms ------------------------------------------------------------------------------------------------------


def test_attention_in_bsh() -> None:
    def run(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        q, k, v = (x @ w for w in (wq, wk, wv))
        call = torch.ops.npu.npu_fused_infer_attention_score
        return call(q, k, v, num_heads=4, num_key_value_heads=2, input_layout="BSH", scale=1.0)[0]

    error = refusal(run, (ROWS[None], LAYER.wq, LAYER.wk, LAYER.wv), {"x_1": 1})
    assert error.code == "CP113"
    assert "TND" in str(error) and "inputs='replicated'" in str(error)


def test_attention_by_sdpa() -> None:
    def run(x: Tensor, wq: Tensor) -> Tensor:
        q = (x @ wq).view(1, -1, 4, D).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    assert refusal(run, (ROWS[None], LAYER.wq), {"x_1": 1}).code == "CP113"


def by_slice_scatter(cache: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    flat = cache.view(-1, *rows.shape[1:])
    return torch.slice_scatter(flat, rows, 0, 0, rows.shape[0]).view_as(cache)


def test_a_write_that_names_no_slots() -> None:
    error = refusal(lambda x, *tensors: attend(x, Layer(*tensors), write=by_slice_scatter), INPUTS)
    assert error.code == "CP113"
    assert "a KV write by slice_scatter" in str(error) and "npu_scatter_nd_update_" in str(error)


def by_index_copy(cache: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """The slots of this rank's rows alone."""
    cache.view(-1, *rows.shape[1:]).index_copy_(0, slots[: rows.shape[0]].long(), rows)
    return cache


def test_a_write_to_the_slots_of_local_rows() -> None:
    assert refusal(lambda x, *tensors: attend(x, Layer(*tensors), write=by_index_copy), INPUTS).code == "CP313"


def test_rows_copied_into_a_slice_of_the_cache() -> None:
    """cache[:n] = rows: a copy into whole rows, to the pass."""

    def write(cache: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        cache.view(-1, *rows.shape[1:])[: rows.shape[0]] = rows
        return cache

    error = refusal(lambda x, *tensors: attend(x, Layer(*tensors), write=write), INPUTS)
    assert error.code in ("CP113", "CP310")


def test_attention_over_more_keys_than_this_step_has() -> None:
    """Packed keys that the runner put together of old and new ones: their place among gathered rows is unknown."""

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        longer = [n + 4 * (i + 1) for i, n in enumerate(PLAN.cu_q)]
        return attend(x, Layer(*tensors), packed=True, kv_lens=longer)

    error = refusal(run, INPUTS)
    assert error.code == "CP113" and "packed keys" in str(error)


# -- CP114: a step above its rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cu_q", "remainder"), [([13, 63, 65], "balanced"), ([13, 63, 640], "balanced"), ([5, 10, 15], "first")]
)
def test_a_step_above_its_local_rows(cu_q: list[int], remainder: str) -> None:
    """65 tokens do not fit 2 * 32 rows; 3 * 5 tokens with first need 9 rows on rank 0, though 2 * 8 are enough."""
    rows = ROWS if remainder == "balanced" else ROWS[:8]
    inputs = (rows, *LAYER.tensors)
    error = refusal(lambda x, *tensors: attend(x, Layer(*tensors), cu_q=cu_q), inputs, remainder=remainder)
    assert error.code == "CP114"
    assert f"{cu_q[-1]} tokens" in str(error) and f"{rows.shape[0]} local rows" in str(error)


def test_balanced_rows_are_even() -> None:
    error = refusal(lambda x, *tensors: attend(x, Layer(*tensors), cu_q=[5, 10, 15]), (ROWS[:9], *LAYER.tensors))
    assert error.code == "CP114"


# -- CP105: two steps --------------------------------------------------------------------------------------------------


def test_two_sets_of_query_lengths() -> None:
    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        layer = Layer(*tensors)
        return attend(x, layer) + attend(x, layer, cu_q=[14, 63, 64])

    error = refusal(run, INPUTS)
    assert error.code == "CP105"
    assert "two sets of query lengths" in str(error)


# -- CP011: names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"arg0_1": 2}, ["'arg0_1'", "dimension 2", "[32, 32]"]),
        ({"arg0_1": -3}, ["'arg0_1'", "dimension -3"]),
    ],
)
def test_a_dimension_that_the_input_lacks(named: dict[str, int], said: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        cppass.run_pass(traced(layer_run, INPUTS), INPUTS, cp_size=CP, inputs="sharded", sharded_inputs=named)
    assert caught.value.code == "CP011"
    assert all(text in str(caught.value) for text in said)


def test_sharded_inputs_of_different_rows() -> None:
    inputs = (ROWS, torch.ones(31, 4 * D), *LAYER.tensors)
    gm = traced(lambda x, bias, *tensors: attend(x, Layer(*tensors)), inputs)
    with pytest.raises(OptionError, match=r"arg0_1 \[32, 32\], arg1_1 \[31, 64\]") as caught:
        cppass.run_pass(gm, inputs, cp_size=CP, inputs="sharded", sharded_inputs={"arg0_1": 0, "arg1_1": 0})
    assert caught.value.code == "CP011"
