"""Everyday uses on two real ranks: chunks, decode, generate(), masks, outputs, graph breaks, refusals."""

from typing import Any

import pytest
from gloo import on_ranks
from scenarios import SCENARIOS, run_scenarios

TOLERANCE = 1e-5
pytestmark = pytest.mark.timeout(700)  # the first test waits for all scenarios


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(2, run_scenarios, list(SCENARIOS))


@pytest.fixture
def seen(results: list[dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What rank 0 saw in the scenario the test is named after; no rank failed, no error is too large."""
    name = request.node.name.removeprefix("test_")
    by_rank = [result[name] for result in results]
    for result in by_rank:
        assert "error" not in result, result["error"]
        assert all(error <= TOLERANCE for error in result.get("errors", ())), result
    return by_rank[0]


@pytest.fixture
def errors(results: list[dict[str, Any]], request: pytest.FixtureRequest) -> list[str | None]:
    name = request.node.name.removeprefix("test_")
    return [result[name].get("error") for result in results]


def test_prefill_then_decode(seen):
    assert [status for status, _ in seen["reports"]] == ["rewritten", "left alone"]


def test_second_chunk_on_a_filled_static_cache(seen):
    assert {mask for _, mask in seen["reports"]} == {"causal on a filled cache"}


def test_second_chunk_on_a_filled_dynamic_cache(seen):
    assert ("rewritten", "causal on a filled cache") in seen["reports"]
    assert all(mask.startswith("causal") for _, mask in seen["reports"])


def test_one_graph_for_many_lengths(seen):
    assert [status for status, _ in seen["reports"]] == ["rewritten"]


def test_padding_mask(seen):
    assert any("not plainly causal" in note for note in seen["notes"])


def test_packed_sequences(seen):
    assert any("not plainly causal" in note for note in seen["notes"])


def test_last_token_logits(seen):
    assert seen["gathers"] == ["K and V of a site", "K and V of a site", "1 selected rows"]


def test_hidden_states_and_attention_weights(seen):
    assert seen["forms"] == ["softmax(q @ k.T, ...) @ v"] * 2


def test_inputs_embeds(seen):
    assert [status for status, _ in seen["reports"]] == ["rewritten"]


def test_generate(seen):
    assert seen["equal"]
    assert "rewritten" in [status for status, _ in seen["reports"]]


def test_generate_with_a_static_cache_and_compile_config(seen):
    assert seen["equal"]
    assert "rewritten" in [status for status, _ in seen["reports"]]


def test_graph_break(seen):
    assert [status for status, mask in seen["reports"] if mask] == ["rewritten", "rewritten"]


def test_moe_with_batched_experts(seen):
    assert seen["notes"] == ()


def test_bfloat16(seen):
    assert 0 < seen["ours"] <= 1.5 * seen["eager"]


def test_min_tokens_leaves_short_prefills_alone(seen):
    assert [status for status, _ in seen["reports"]] == ["rewritten", "left alone"]
    assert "min_tokens = 32" in seen["reasons"][1]


def test_broken_layouts_are_noticed(seen):
    assert all(difference > 1e-2 for difference in seen["differences"].values())


def test_inductor(seen):
    assert [status for status, _ in seen["reports"]][:1] == ["rewritten"]


def test_subgroup_by_mesh(seen):
    assert {status for status, _ in seen["reports"]} == {"rewritten"}


def test_recompile_limit_is_reported(seen):
    assert any("last one Dynamo compiles" in warning for warning in seen["warnings"])
    assert any("last one Dynamo compiles" in reason for reason in seen["reasons"])


def test_different_token_ids_are_noticed(errors):
    assert all(error and "CP601" in error for error in errors)


def test_gradients_are_refused(errors):
    assert all(error and "CP007" in error for error in errors)


def test_a_group_without_this_rank_is_refused(errors):
    assert errors[0] is None
    assert errors[1] is not None
    assert "CP005" in errors[1]


def test_suppressed_errors_are_refused(errors):
    assert all(error and "CP008" in error for error in errors)
