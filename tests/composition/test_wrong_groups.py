"""Negative controls: a wrong group is refused on every rank, and a sum that is left out shows."""

from __future__ import annotations

import pytest
from composition.parallel_ranks import Seen

pytestmark = pytest.mark.timeout(700)  # the first test of the directory waits for all ranks

Results = dict[tuple[str, str], list[Seen]]


def test_the_group_that_the_model_sums_over_is_refused(seen: Results) -> None:
    for rank in seen["wrong", "the tp group"]:
        assert rank.failure.startswith("RefusedError: [CP112] _c10d_functional.all_reduce.default runs over ranks of")
        assert "options={'group': mesh['cp']}" in rank.failure


def test_a_size_that_the_group_does_not_have_is_refused(seen: Results) -> None:
    for rank in seen["wrong", "another size"]:
        assert rank.failure.startswith("OptionError: [CP006] cp_size=4, but the group has 2 ranks")


@pytest.mark.parametrize("name", ["the world", "a twin of the tp group"])
def test_a_group_that_shares_ranks_with_the_models_own_is_refused(name: str, seen: Results) -> None:
    """Ranks that the model sums over would hold different rows of the sequence."""
    for rank in seen["wrong", name]:
        assert rank.failure.startswith("RefusedError: [CP112]")


def test_a_sum_that_is_left_out_shows(seen: Results) -> None:
    """The comparison with one device sees it on every rank, in logits and caches."""
    for rank in seen["wrong", "not summed"]:
        assert rank.statuses == ["rewritten"]
        assert min(rank.errors + rank.cache_errors) > 0.1
