"""Demo models whose hidden states have more rows than the step has tokens (`padded_to`), through the pass.

    72 rows of hidden states, 64 tokens     q, k, v = qkv(hidden)[:64]      shared by the ranks: 32 rows each
                                            out = cat([attention, zeros])   72 rows on every rank, and so is the rest

Numerics: float32, 1e-5. Rows of the caches that no token has are random before the step: a write to one shows.
"""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from npu.simulated_models import Ran, alone, build, cached, on_ranks, planned, report, rewritten, token_ids
from torch import Tensor

from cppass.demo.npu.dense import Decoder
from cppass.demo.npu.forward_metadata import Step
from cppass.halves import CAUSAL

TOLERANCE = 1e-5
BATCHES: dict[str, Any] = {  # new tokens, cached tokens, rows
    "even": ([40, 24], None, 72),
    "uneven, one token": ([13, 50, 1], None, 72),
    "prefixes": ([40, 23], [64, 3], 80),
    "one sequence": ([13], None, 16),
    "more padding than tokens": ([19], None, 64),
    "as many rows as tokens": ([40, 24], None, 64),
}
EACH_KIND = pytest.mark.parametrize("kind", ["dense", "moe"])


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Many tiny calls: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(kind: str, batch: str) -> tuple[Decoder, Tensor, Step]:
    lengths, prefixes, rows = BATCHES[batch]
    plan = planned(lengths, prefixes, padded_to=rows)
    assert plan.position_ids.shape == (rows,) and plan.metadata.prompt_tokens == sum(lengths)
    return build(kind), token_ids(plan), plan


def rows_of(caches: list[Tensor], slots: Tensor, written: bool) -> list[Tensor]:
    """Rows of the given slots, or all others."""
    flat = [cache.flatten(0, 1) for cache in caches]
    chosen = torch.full(flat[0].shape[:1], not written).index_fill(0, slots.long(), written)
    return [cache[chosen] for cache in flat]


def check(model: Decoder, plan: Step, ranks: list[Ran], expected: Ran) -> None:
    slots, tokens = plan.metadata.slot_mapping, plan.metadata.prompt_tokens
    before = rows_of(cached(model), slots, written=False)
    for rank, ran in enumerate(ranks):
        _close(f"rank {rank}: logits", ran.logits, expected.logits)
        if ran.hidden is not None and expected.hidden is not None:
            _close(f"rank {rank}: hidden states", ran.hidden[:tokens], expected.hidden[:tokens])
        for ours, theirs in zip(ran.caches, expected.caches, strict=True):
            _close(f"rank {rank}: caches", ours, theirs)
        assert all(map(torch.equal, ran.caches, ranks[0].caches)), f"rank {rank}: other bits than rank 0"
        untouched = rows_of(ran.caches, slots, written=False)
        assert all(map(torch.equal, untouched, before)), f"rank {rank}: a row of no token was written"


def _close(what: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{what}: {text}")


@EACH_KIND
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("batch", BATCHES)
def test_ranks_equal_one_device(batch: str, cp_size: int, kind: str) -> None:
    model, ids, plan = case(kind, batch)
    expected = alone(model, ids, plan)
    check(model, plan, on_ranks(model, ids, plan, cp_size), expected)
    written = rows_of(expected.caches, plan.metadata.slot_mapping, written=True)
    before = rows_of(cached(model), plan.metadata.slot_mapping, written=True)
    assert not any(torch.isclose(a, b).all(-1).any() for a, b in zip(written, before, strict=True))  # every row is new


@EACH_KIND
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("batch", ["even", "prefixes"])
def test_every_row_of_the_last_hidden_states(batch: str, cp_size: int, kind: str) -> None:
    model, ids, plan = case(kind, batch)
    check(model, plan, on_ranks(model, ids, plan, cp_size, hidden=True), alone(model, ids, plan, hidden=True))


@EACH_KIND
def test_what_is_in_the_padding_changes_nothing(kind: str) -> None:
    model, ids, plan = case(kind, "even")
    others = ids.clone()
    others[plan.metadata.prompt_tokens :] += 1
    assert not torch.equal(others, ids)
    for a, b in zip(on_ranks(model, ids % 512, plan, 2), on_ranks(model, others % 512, plan, 2), strict=True):
        assert torch.equal(a.logits, b.logits) and all(map(torch.equal, a.caches, b.caches))


# -- what the report says ----------------------------------------------------------------------------------------------


def gathered(kind: str, batch: str, cp_size: int) -> str:
    found = report(*case(kind, batch), cp_size)
    lines = [f"{found.status}, {found.tokens} tokens"]
    lines += [f"{g.why}: {g.received_bytes} bytes" for g in found.gathers]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def test_the_report_of_a_padded_batch() -> None:
    """32 (local rows) * 256 (2 * 2 * 16 * 4 of K and V, 4 * 16 * 4 of the output) * 1 (other rank)."""
    assert_expected_inline(
        gathered("dense", "even", 2),
        """\
rewritten, 64 tokens
K and V of a site: 8192 bytes
K and V of a site: 8192 bytes
aten.cat.default mixes tokens (node cat): 8192 bytes
aten.cat.default mixes tokens (node cat_1): 8192 bytes
note: gathered view_15: aten.cat.default mixes tokens (node cat)
note: gathered view_31: aten.cat.default mixes tokens (node cat_1)
note: aten.slice.Tensor mixes tokens (node slice_3): it runs whole on every rank, with 4 matrix products before it
note: aten.slice.Tensor mixes tokens (node slice_2): it runs whole on every rank, with 1 matrix product before it""",
    )


def test_the_report_of_a_padded_batch_on_four_ranks() -> None:
    """[13, 50, 1] in 8 blocks each: 2 + 2, 7 + 6 and 1 + 0 local rows, 18 * 256 bytes from each of 3 other ranks."""
    assert_expected_inline(
        gathered("moe", "uneven, one token", 4),
        """\
rewritten, 64 tokens
K and V of a site: 13824 bytes
K and V of a site: 13824 bytes
aten.cat.default mixes tokens (node cat): 13824 bytes
aten.cat.default mixes tokens (node cat_1): 13824 bytes
note: gathered view_11: aten.cat.default mixes tokens (node cat)
note: gathered view_23: aten.cat.default mixes tokens (node cat_1)
note: aten.slice.Tensor mixes tokens (node slice_3): it runs whole on every rank, with 5 matrix products before it
note: aten.slice.Tensor mixes tokens (node slice_2): it runs whole on every rank, with 1 matrix product before it""",
    )


@EACH_KIND
def test_linear_layers_of_padded_rows_are_computed_on_every_rank(kind: str) -> None:
    """docs/npu.md says so. The last one is the LM head, of the last row of each sequence."""
    model, ids, plan = case(kind, "even")
    assert linear_rows(model, ids, plan) == {72, 2}
    plan = planned([40, 24])
    assert linear_rows(model, token_ids(plan), plan) == {64 // 2, 2}


def linear_rows(model: Decoder, ids: Tensor, plan: Step) -> set[int]:
    nodes = rewritten(model, ids, plan, 2).graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    return {node.meta["val"].shape[0] for node in nodes}


@EACH_KIND
def test_padded_decode_is_left_alone(kind: str) -> None:
    plan = planned([1, 1], [30, 2], padded_to=8)
    found = report(build(kind), token_ids(plan), plan, 2)
    assert (found.status, found.gathers) == ("left alone", ())


# -- controls ----------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_a_row_of_padding_that_is_written_is_noticed(kind: str) -> None:
    """In the first row that no token has."""
    model, ids, plan = case(kind, "even")
    expected, ranks = alone(model, ids, plan), on_ranks(model, ids, plan, 2)
    free = torch.ones(ranks[1].caches[0].flatten(0, 1).shape[0], dtype=torch.bool)
    free[plan.metadata.slot_mapping.long()] = False
    row = int(free.nonzero()[0])
    for ran in (expected, *ranks):  # by one device too, so that comparing with it does not tell
        ran.caches[-1].flatten(0, 1)[row] = 0
    with pytest.raises(AssertionError, match="rank 0: a row of no token was written"):
        check(model, plan, ranks, expected)


@EACH_KIND
def test_blocks_of_other_ranks_are_noticed(kind: str) -> None:
    model, ids, plan = case(kind, "even")
    expected = alone(model, ids, plan)
    with (
        unittest.mock.patch("cppass.layout.owned_blocks", lambda rank, cp_size: (2 * rank, 2 * rank + 1)),
        pytest.raises(AssertionError, match="rank 0: logits"),
    ):
        check(model, plan, on_ranks(model, ids, plan, 2), expected)


@EACH_KIND
def test_keys_that_are_not_cut_are_noticed(kind: str) -> None:
    model, ids, plan = case(kind, "prefixes")
    expected = alone(model, ids, plan)
    with unittest.mock.patch.dict(CAUSAL, clear=True), pytest.raises((AssertionError, RuntimeError)):
        check(model, plan, on_ranks(model, ids, plan, 2), expected)
