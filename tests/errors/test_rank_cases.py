"""Two real ranks: whatever a compiled model is handed, it equals the plain model, or every rank has a clear error."""

from __future__ import annotations

import pytest
from errors.rank_cases import CASES, Seen, run_cases
from gloo import on_ranks

pytestmark = pytest.mark.timeout(300)  # the first test waits for all cases

BOTH = "both raise "  # the compiled model raises what the plain one raises
TORCH = "torch.compile raises "  # and so does every other backend
OUTCOMES: dict[str, tuple[str, str]] = {
    # not "equal": the outcome, and words of the error
    "heads that groups do not divide": (BOTH + "RuntimeError", "scaled_dot_product_attention"),
    "ids of one dimension": (BOTH + "ValueError", "unpack"),
    "ids that are floats": (BOTH + "RuntimeError", "scalar types"),
    "ids that are a list": (BOTH + "TypeError", "must be Tensor"),
    "ids beyond the vocabulary": (BOTH + "IndexError", "out of range"),
    "ids without memory": ("CP503", "tensors on meta"),
    "a model without memory": ("CP503", "tensors on meta"),
    "embeddings of two widths": (BOTH + "RuntimeError", "reduction dim"),
    "a mask of other sizes": (BOTH + "RuntimeError", "size"),
    "a cache too short for the prompt": (BOTH + "IndexError", "out of bounds"),
    "a prompt past the end of the cache": (BOTH + "IndexError", "out of bounds"),
    "a cache of another dtype": (BOTH + "RuntimeError", "dtype"),
    "a cache of another batch": (BOTH + "RuntimeError", "dimension"),
    "an encoder beside a decoder": ("CP105", "tiny_model.py"),
    "torchs transformer encoder": ("CP101", "_transformer_encoder_layer_fwd"),
    "flex attention": ("CP101", "flex_attention"),
    "a flash attention that writes its result": ("CP101", "unified_attention_with_output"),
    "dropout in training mode": ("CP102", "tiny_model.py"),
    "dropout between layers": ("CP203", "native_dropout"),
    "gradients": ("CP007", "torch.no_grad()"),
    "control flow that depends on data in a whole graph": (TORCH + "Unsupported", "Data-dependent"),
    "an operator without a shape function": (TORCH + "TorchRuntimeError", "shapeless"),
    "an operator that fails": (BOTH + "ArithmeticError", "no such luck"),
    "suppressed errors": ("CP008", "suppress_errors"),
    "a group that was destroyed": ("CP005", "was destroyed"),
    "the name of a group that was destroyed": ("CP005", "no process group is named"),
    "a group of no such name": ("CP005", "'nobody'"),
    "a mesh of two dimensions": ("CP006", "mesh['dp']"),
    "a size that the group does not have": ("CP006", "cp_size=4"),
    "a rank that is not this one": ("CP006", "leave rank out"),
    "other token ids on each rank": ("CP601", "ranks [1]"),
}
UNSHARDED = {
    "no tokens",
    "no sequences",
    "one token",
    "one token fewer than two a rank",
    "no attention",
    "a graph break inside attention",
}
"""Equal, and on every rank the whole of it: too short, or nothing that a graph shows as attention."""

WARNED = {
    "a graph break inside attention": ["if that is attention, cppass does not know", "attention broke in two and runs"],
}
"""What each graph of it warns of."""


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Seen]]:
    return on_ranks(2, run_cases, list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_equal_or_a_clear_error(name: str, ranks: list[dict[str, Seen]]) -> None:
    outcome, words = OUTCOMES.get(name, ("equal", ""))
    for seen in (rank[name] for rank in ranks):
        assert seen.outcome == outcome, seen.text
        assert words in seen.text
        assert "way out: " in seen.text or not outcome.startswith("CP")
        if outcome == "equal":
            assert ("rewritten" in seen.statuses) == (name not in UNSHARDED)
        for warned, meant in zip(seen.warnings, WARNED.get(name, []), strict=True):
            assert meant in warned


def test_every_expectation_is_of_a_case() -> None:
    assert {*OUTCOMES, *UNSHARDED, *WARNED} <= CASES.keys()
