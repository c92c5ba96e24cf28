"""From how many tokens on a graph gains by context parallelism. Plain arithmetic: a compiler asks this per graph."""

from __future__ import annotations

import math

from cppass.cost.hardware import Hardware

NEVER = 2**62
"""No number of tokens is enough."""


def break_even_tokens(
    flops_per_token: float,
    attention_flops_per_pair: float,
    gather_bytes_per_token: float,
    sites: int,
    cp_size: int,
    hardware: Hardware,
    *,
    weight_bytes: float = 0.0,
) -> int:
    """The smallest even step (2P divides it) from which on P ranks are predicted to beat one device, or NEVER.

        one(S) = max(S a, W) + S (S + 1) / 2 b            P ranks: max(S a / P, W) + S (S + 1) / 2 b / P + S g + c

    a, b, g are seconds of a token, a pair and a gathered token, W those of reading weights, c those of collectives that
    move nothing and of launches. No overlap is assumed; a cached prefix, which favours the ranks, is left out.

    Args:
        flops_per_token: FLOPs of all matmuls of the graph, per token.
        attention_flops_per_pair: FLOPs of all attention sites, per (query, key) pair: 4 * heads * head_dim each.
        gather_bytes_per_token: bytes of a token's K and V rows, all sites together.
        sites: attention sites: each adds one collective, one attention call and one reordering.
        weight_bytes: bytes of the matmuls' weights. Every rank reads them all: short steps gain nothing while they wait
            for them, so without this the answer is too low.
    """
    if cp_size < 2:
        return NEVER
    saved = 1 - 1 / cp_size
    token = flops_per_token / hardware.matmul_rate
    read = weight_bytes / hardware.memory_bandwidth
    half = attention_flops_per_pair / hardware.attention_rate * saved / 2
    lost = gather_bytes_per_token * (saved / hardware.gather_rate(cp_size) + 2 / hardware.memory_bandwidth) - half
    fixed = sites * (hardware.latency + 2 * hardware.launch)
    pieces = (  # (from S, slope, constant) of the gain, a convex quadratic in each: who computes, who waits for weights
        (cp_size * read / token if token else math.inf, token * saved - lost, -fixed),  # both compute
        (read / token if token else math.inf, token - lost, -read - fixed),  # the ranks wait
        (0.0, -lost, -fixed),  # both wait
    )
    step, root = 2 * cp_size, 0.0
    for start, slope, constant in pieces:
        root = 0.0 if start == math.inf else _last_root(half, slope, constant)
        if root >= start and start < math.inf:
            break
    if not root < NEVER - step:
        return NEVER
    return (math.floor(root / step) + 1) * step


def _last_root(half: float, slope: float, constant: float) -> float:
    """The last x with half x^2 + slope x + constant <= 0, half >= 0: -inf without one, inf without an end."""
    if half == 0:
        if slope == 0:
            return math.inf if constant <= 0 else -math.inf
        return -constant / slope if slope > 0 else math.inf
    discriminant = slope * slope - 4 * half * constant
    if discriminant < 0:
        return -math.inf
    if slope > 0:  # without cancellation
        return -2 * constant / (slope + math.sqrt(discriminant))
    return (math.sqrt(discriminant) - slope) / (2 * half)
