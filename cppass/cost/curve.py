"""Seconds of a step on one device and on P ranks, from the numbers that a graph gives. Plain arithmetic.

    one(S) = max(S a, W) + S (S + 1) / 2 b            P ranks: max(S a / P, W) + S (S + 1) / 2 b / P + S g + c

The symbols are those of `break_even_tokens` (cppass/cost/gate.py), which says where the two meet.
"""

from __future__ import annotations

from cppass.cost.hardware import Hardware


def step_seconds(
    flops_per_token: float,
    attention_flops_per_pair: float,
    gather_bytes_per_token: float,
    sites: int,
    cp_size: int,
    hardware: Hardware,
    tokens: int,
    *,
    weight_bytes: float = 0.0,
) -> float:
    """Seconds of the matmuls, attention and collectives of `tokens` new tokens; on one device with `cp_size` 1.

    Args: as `break_even_tokens` takes them. What both sides do alike (ops between matmuls, the LM head) is left out.
    """
    read = weight_bytes / hardware.memory_bandwidth
    matmuls = max(tokens * flops_per_token / hardware.matmul_rate / cp_size, read)
    pairs = tokens * (tokens + 1) / 2
    attention = pairs * attention_flops_per_pair / hardware.attention_rate / cp_size
    if cp_size == 1:
        return matmuls + attention
    saved = 1 - 1 / cp_size
    row = gather_bytes_per_token * (saved / hardware.gather_rate(cp_size) + 2 / hardware.memory_bandwidth)
    return matmuls + attention + tokens * row + sites * (hardware.latency + 2 * hardware.launch)
