"""What a graph costs on one device and on P ranks, by the cost model."""

from __future__ import annotations

import math

from cppass import torch_private
from cppass.cost import NEVER, Hardware, break_even_tokens
from cppass.cost.curve import step_seconds
from cppass.gate import work_of
from cppass.inspection.views import CostView
from cppass.pipeline import Stages
from cppass.shard import propagate
from cppass.sharded_plan import ShardedPlan

SHORTEST, LONGEST = 2**5, 2**20
POINTS_PER_OCTAVE = 2


def cost_view(stages: Stages, hardware: Hardware) -> CostView | None:
    """The cost of a graph with attention sites; None without one, and where inputs arrive sharded.

    The work is counted from the graph as it was before the pass, for one token; seconds follow for any length.
    """
    sites, cp_size = stages.sites, stages.report.cp_size
    if not sites or cp_size < 2 or isinstance(stages.plan, ShardedPlan):
        return None
    work = work_of(stages.before, sites, propagate(stages.before, sites))
    given = (work.flops_per_token, work.attention_flops_per_pair, work.gather_bytes_per_token)

    def seconds(tokens: int, ranks: int) -> float:
        return step_seconds(*given, len(sites), ranks, hardware, tokens, weight_bytes=work.weight_bytes)

    tokens = int(torch_private.hinted(sites[0].query.meta["val"])[sites[0].query_dim])
    least = break_even_tokens(*given, len(sites), cp_size, hardware, weight_bytes=work.weight_bytes)
    steps = range(POINTS_PER_OCTAVE * int(math.log2(LONGEST / SHORTEST)) + 1)
    lengths = [round(SHORTEST * 2 ** (step / POINTS_PER_OCTAVE)) for step in steps]
    return CostView(
        hardware=hardware.name,
        cp_size=cp_size,
        tokens=tokens,
        flops_per_token=work.flops_per_token,
        attention_flops_per_pair=work.attention_flops_per_pair,
        gather_bytes_per_token=work.gather_bytes_per_token,
        weight_bytes=work.weight_bytes,
        one_device=seconds(tokens, 1),
        on_ranks=seconds(tokens, cp_size),
        break_even=None if least >= NEVER else least,
        curve=tuple((n, seconds(n, 1), seconds(n, cp_size)) for n in lengths),
        source=hardware.source,
    )
