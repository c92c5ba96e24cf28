"""Run-time check of a step: are all ranks handed the same token ids?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cppass.checked import checked_first
from cppass.errors import CPError
from cppass.target import Ranks
from cppass.torch_private import resolve_group

PRIME = 1_000_003


def agree_on_inputs(run: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """`run` with a check before it: a hash of every integer input is compared over the group.

    Costs one all-gather of 8 bytes and a sum over the integer inputs per step.

    Raises:
        CPError: CP601, on every rank, naming the ranks that differ.
    """

    return checked_first(run, lambda inputs: _compare(_hash(inputs), ranks))


def _hash(inputs: Sequence[Any]) -> int:
    value = 0
    for x in inputs:
        if isinstance(x, torch.Tensor) and not x.is_floating_point() and x.dtype != torch.bool and x.numel():
            weights = torch.arange(1, x.numel() + 1, dtype=torch.int64, device=x.device)
            value = (value * PRIME + int((x.reshape(-1).to(torch.int64) * weights).sum())) % 2**62
    return value


def _compare(value: int, ranks: Ranks) -> None:
    mine = torch.tensor([value], dtype=torch.int64)
    theirs = [torch.empty_like(mine) for _ in range(ranks.cp_size)]
    dist.all_gather(theirs, mine, group=resolve_group(ranks.group_name))
    values = [int(t) for t in theirs]
    if len(set(values)) > 1:
        odd = [r for r, v in enumerate(values) if v != values[0]]
        raise CPError(
            "CP601",
            f"ranks {odd} were handed other token ids or positions than rank 0",
            "hand every rank the same inputs: broadcast them from rank 0, and seed samplers alike",
        )
