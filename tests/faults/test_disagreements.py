"""Ranks that do not do the same raise on every rank, with both sides shown; the group stays usable."""

from __future__ import annotations

from typing import Any

import pytest
from faults.disagreements import CASES, THEN, a_group_that_was_rebuilt, run_cases
from faults.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)

SAME = {  # the same words on both ranks
    "option_min_tokens": "[CP603] ranks do not run the same graph: option min_tokens: 0 on rank 0, 100 on rank 1",
    "option_overlap": "[CP603] ranks do not run the same graph: option overlap: False on rank 0, True on rank 1",
    "lengths_static": "[CP603] ranks do not run the same graph: the graph: rewritten, 8 tokens on rank 0, ",
    "lengths_dynamic": "[CP604] ranks are handed inputs of different sizes: ",
    "one_length_below_2p": "[CP603] ranks do not run the same graph: the graph: left alone, 3 tokens",
    "token_ids": "[CP601] ranks [1] were handed other token ids or positions than rank 0: ids",
    "token_ids_of_the_first_step": "[CP601] ranks [1] were handed other token ids or positions than rank 0: ids",
    "random_weights": "[CP609] ranks [1] have other weights than rank 0: words, layers.0.norms, layers.0.qkv and 8",
    "one_weight": "[CP609] ranks [1] have other weights than rank 0: layers.1.up\n",
    "the_order_of_token_ids": "[CP601] ranks [1] were handed other token ids",
    "the_model": "[CP603] ranks do not run the same graph: the first node that differs: ",
    "a_cache_of_another_length": "-> torch.float32[1, 2, 24, 8] on rank 0, ",
    "the_version": "[CP603] ranks do not run the same graph: version of cppass: 0.1.0 (",
    "agreement_by_graph_sees_options": "option overlap: False on rank 0, True on rank 1",
    "a_group_that_was_destroyed": "was destroyed after this graph was compiled for its rank",
}
OTHER = {  # a rank that fails, and what the other one says of it
    "an_unknown_option": ("[CP001] unknown option 'min_token'", "[CP605] rank 0 failed: [CP001] unknown option"),
    "gradients_on_one_rank": ("[CP605] rank 1 failed: [CP007] gradients", "[CP007] gradients are needed"),
}
FINE = {"a_slow_rank", "agreement_by_graph", "values_by_option_unchecked"}


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    ranks = run_ranks(2, run_cases)
    assert all(r.result for r in ranks), [r.text for r in ranks]
    return [r.result for r in ranks]


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, seen: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(seen):
        if name in FINE:
            assert found[name] < 1e-5
        else:
            assert (SAME.get(name) or OTHER[name][rank]) in found[name]
        if name in THEN:
            assert found[f"{name}, then"] < 1e-5, "a step after it works"
    if name in SAME and name != "a_group_that_was_destroyed":
        assert seen[0][name] == seen[1][name]


def test_a_group_that_was_rebuilt_with_other_ranks() -> None:
    for rank, ended in enumerate(run_ranks(2, a_group_that_was_rebuilt)):
        said, after = ended.result
        assert f"was rebuilt after this graph was compiled for its rank {rank} of 2" in said
        assert after < 1e-5, "a graph compiled anew knows its new rank"
