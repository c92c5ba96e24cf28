"""Context parallelism x tensor parallelism, 2 x 2 ranks: Qwen3 whose heads and MLP are cut over the group "tp"."""

from __future__ import annotations

import pytest
from composition.cases import names_of
from composition.checks import ran, same_as_one_device
from composition.parallel_ranks import Seen

pytestmark = pytest.mark.timeout(700)  # the first test of the directory waits for all ranks

Results = dict[tuple[str, str], list[Seen]]

SUMMED = """\
all_gather_into_tensor [32, 32]
all_reduce [32, 64]
all_reduce [32, 64]
all_gather_into_tensor [32, 32]
all_reduce [32, 64]
all_reduce [32, 64]
all_gather_into_tensor [2, 64]"""
WITH_VOCABULARY = """\
all_reduce [32, 64]
all_gather_into_tensor [32, 32]
all_reduce [32, 64]
all_reduce [32, 64]
all_gather_into_tensor [32, 32]
all_reduce [32, 64]
all_reduce [32, 64]
all_gather_into_tensor [2, 64]
all_gather_into_tensor [2, 256]"""  # first: the embedding; last: logits of half the vocabulary
RAN = {
    # rank 0 of lengths 13, 50, 1: first and last quarters, 4 + 3, 13 + 12 and 1 + 0 rows; the other rank is padded
    "replicated": """\
all_gather_into_tensor [33, 32]
all_reduce_ [33, 64]
all_reduce_ [33, 64]
all_gather_into_tensor [33, 32]
all_reduce_ [33, 64]
all_reduce_ [33, 64]
all_gather_into_tensor [3, 64]""",
    "replicated, dynamic": WITH_VOCABULARY,
    "replicated, in place": SUMMED,
    "sharded": SUMMED,
}


@pytest.mark.parametrize("name", names_of("cp x tp"))
def test_equal_to_one_device(name: str, seen: Results) -> None:
    same_as_one_device(seen["cp x tp", name])


@pytest.mark.parametrize("name", names_of("cp x tp"))
def test_one_compile_serves_all_steps(name: str, seen: Results) -> None:
    assert all(rank.statuses == ["rewritten"] for rank in seen["cp x tp", name])


@pytest.mark.parametrize("name", names_of("cp x tp"))
def test_all_reduces_stay_and_sum_local_rows(name: str, seen: Results) -> None:
    """One K/V collective a layer, of half the heads; two all-reduces a layer, of half the rows; the last rows."""
    assert ran(seen["cp x tp", name]) == RAN[name]


def test_which_dimension_is_the_inner_one_does_not_matter(seen: Results) -> None:
    """Ranks (0, 1) (2, 3) share sequences under ("tp", "cp"), (0, 2) (1, 3) under ("cp", "tp")."""
    inner, outer = (seen["cp x tp", name] for name in ("replicated, dynamic", "sharded"))
    assert [rank.peers for rank in inner] == [0, 0, 1, 1]
    assert [rank.peers for rank in outer] == [0, 1, 0, 1]
    assert {rank.peers: rank.caches for rank in inner} == {rank.peers: rank.caches for rank in outer}
