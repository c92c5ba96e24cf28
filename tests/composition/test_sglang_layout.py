"""SGLang's own layout on four ranks (PR #21685): TP 4, ATTN_CP 2, MOE_DP 2.

rank                0        1        2        3
attention rows      -- half a --      -- half b --      of the sequence; ATTN_CP groups {0, 2}, {1, 3}
attention heads     half 0   half 1   half 0   half 1   attention TP groups {0, 1}, {2, 3}
experts             half 0   half 1   half 0   half 1   MOE_DP: {0, 1} and {2, 3} each have all experts, for their rows
"""

from __future__ import annotations

import pytest
from composition.cases import names_of
from composition.checks import ran, same_as_one_device
from composition.parallel_ranks import Seen

pytestmark = pytest.mark.timeout(700)  # the first test of the directory waits for all ranks

Results = dict[tuple[str, str], list[Seen]]

RAN = {
    "replicated": """\
all_gather_into_tensor [33, 32]
all_reduce [33, 64]
all_reduce [33, 64]
all_gather_into_tensor [33, 32]
all_reduce [33, 64]
all_reduce [33, 64]
all_gather_into_tensor [3, 64]""",
    "sharded": """\
all_reduce [32, 64]
all_gather_into_tensor [32, 32]
all_reduce [32, 64]
all_reduce [32, 64]
all_gather_into_tensor [32, 32]
all_reduce [32, 64]
all_reduce [32, 64]
all_gather_into_tensor [2, 64]
all_gather_into_tensor [2, 256]""",  # vocabulary cut as well
}


@pytest.mark.parametrize("name", names_of("sglang"))
def test_equal_to_one_device(name: str, seen: Results) -> None:
    """Each expert cut in half ("replicated"), or half of the experts on each rank ("sharded")."""
    same_as_one_device(seen["sglang", name])
    assert all(rank.statuses == ["rewritten"] for rank in seen["sglang", name])
    assert [rank.peers for rank in seen["sglang", name]] == [0, 1, 0, 1]


@pytest.mark.parametrize("name", names_of("sglang"))
def test_attention_and_experts_are_summed_over_local_rows(name: str, seen: Results) -> None:
    assert ran(seen["sglang", name]) == RAN[name]
