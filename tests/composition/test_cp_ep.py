"""Context parallelism x expert parallelism, 2 x 2 ranks: Qwen3-MoE whose experts are spread over a group."""

from __future__ import annotations

import pytest
from composition.cases import names_of
from composition.checks import ran, same_as_one_device
from composition.parallel_ranks import Seen

pytestmark = pytest.mark.timeout(700)  # the first test of the directory waits for all ranks

Results = dict[tuple[str, str], list[Seen]]


@pytest.mark.parametrize(("name", "rows"), [("replicated", 33), ("sharded", 32)])
def test_experts_summed_in_the_graph(name: str, rows: int, seen: Results) -> None:
    """Ranks of "ep" hold the same rows, so each runs its experts on its local rows; one all-reduce a layer."""
    ranks = seen["cp x ep", name]
    same_as_one_device(ranks)
    assert len({rank.caches for rank in ranks}) == 1  # heads are not cut: all four
    layer = f"all_gather_into_tensor [{rows}, 64]\nall_reduce [{rows}, 64]\n"
    assert ran(ranks) == 2 * layer + "all_gather_into_tensor [3, 64]"


@pytest.mark.parametrize("name", ["over ep", "over cp"])
def test_an_exchange_that_breaks_the_graph(name: str, seen: Results) -> None:
    """Each graph restores whole rows, so what runs between graphs may use any group, the sequence's own too."""
    same_as_one_device(seen["exchange", name])
    for rank in seen["exchange", name]:
        # per layer: attention and gate, then what follows the exchange, which has no attention
        assert rank.statuses == ["rewritten", "left alone", "rewritten", "left alone"]


@pytest.mark.parametrize("name", ["over ep", "over cp"])
def test_what_an_exchange_costs(name: str, seen: Results) -> None:
    """K and V, and both values that leave a graph: hidden states for the exchange, and the residual."""
    assert ran(seen["exchange", name]) == "\n".join(6 * ["all_gather_into_tensor [33, 64]"])


def test_an_exchange_with_sharded_inputs_is_refused(seen: Results) -> None:
    """Behind a break, local rows come in under names that were not given."""
    for rank in seen["exchange", "sharded"]:
        assert rank.failure.startswith("RefusedError: [CP312]")


def test_all_cases_are_looked_at() -> None:
    assert names_of("cp x ep") == ["replicated", "sharded"]
    assert names_of("exchange") == ["over ep", "over cp", "sharded"]
