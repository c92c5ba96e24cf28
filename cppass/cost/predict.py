"""Time to first token and memory of a rank, from closed forms and a device's figures.

    layer   = max(matmul FLOPs / rate, weight bytes / memory rate)      a roofline: short steps wait for weights
            + attention FLOPs / rate + bytes between matmuls / memory rate + kernels * launch + exposed communication
    exposed = latency + max(0, bytes / link - what runs meanwhile)
    TTFT    = layers * layer + the LM head of the last row

What runs meanwhile: the Q projection under context parallelism, the attention of a block in a ring, nothing under
tensor parallelism and Ulysses. Host time, padding and a runner's own work are not in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cppass.cost.formulas import q_projection, value
from cppass.cost.hardware import Hardware
from cppass.cost.model import ModelShape

SCHEMES = ("cp", "tp", "ulysses", "ring")
LONGEST = 2**20
"""Tokens up to which break_even looks."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One scheme on so many ranks.

    Attributes:
        seconds: time to first token.
        exposed: seconds of it in which a rank waits for others.
        received: bytes a rank receives in a layer.
        collectives: in a layer.
        memory: bytes of a rank: weights, K/V cache, activations, K and V of one layer that others own.
        fits: that is less than a device has (True where this is unknown).
    """

    scheme: str
    ranks: int
    tokens: int
    seconds: float
    exposed: float
    received: float
    collectives: int
    memory: float
    fits: bool


def predict(
    shape: ModelShape, hardware: Hardware, tokens: int, ranks: int = 1, scheme: str = "cp", prefix: int = 0
) -> Prediction | None:
    """The prediction; None where the scheme cannot deal out this model's heads to so many ranks.

    Args:
        tokens: new tokens of one sequence.
        scheme: "cp", "tp", "ulysses" or "ring"; any of them on one rank is one device.
        prefix: tokens that are in the K/V cache already.
    """
    if scheme in ("tp", "ulysses") and not shape.splits_heads(ranks):
        return None
    form = scheme if ranks > 1 else "one"

    def of(name: str) -> float:
        return value(form, name, shape, tokens, ranks, prefix)

    matmuls = max(of("linear") / hardware.matmul_rate, of("read") / hardware.memory_bandwidth)
    attention = of("attention") / hardware.attention_rate
    between = of("traffic") / hardware.memory_bandwidth + of("kernels") * hardware.launch
    waiting = _exposed(form, shape, hardware, tokens, ranks, of("received"), attention)
    layer = matmuls + attention + between + waiting
    vocabulary = shape.vocab * shape.hidden * shape.weight_bytes / (ranks if form == "tp" else 1)
    head = max(of("head") / hardware.matmul_rate, vocabulary / hardware.memory_bandwidth)
    head += 0 if form == "one" else hardware.latency  # the last row, or shards of its logits
    memory = of("weights") + of("cache") + of("activations") + of("buffers")
    return Prediction(
        scheme=scheme,
        ranks=ranks,
        tokens=tokens,
        seconds=shape.layers * layer + head,
        exposed=shape.layers * waiting,
        received=of("received"),
        collectives=int(of("collectives")),
        memory=memory,
        fits=not hardware.memory or memory <= hardware.memory,
    )


def _exposed(
    form: str, shape: ModelShape, hardware: Hardware, tokens: int, ranks: int, received: float, attention: float
) -> float:
    """Seconds of a layer in which a rank waits for others."""
    if form == "cp":
        meanwhile = q_projection(shape, tokens, ranks) / hardware.matmul_rate
        return hardware.latency + max(0.0, received / hardware.gather_rate(ranks) - meanwhile)
    if form == "tp":
        return 2 * hardware.latency + received / hardware.gather_rate(ranks)
    if form == "ulysses":
        return 2 * hardware.latency + received / hardware.exchange_rate(ranks)
    if form == "ring":
        steps = ranks - 1
        step = hardware.latency + received / steps / hardware.neighbour_rate(ranks)
        return steps * max(0.0, step - attention / ranks)
    return 0.0


def ttft(shape: ModelShape, hardware: Hardware, tokens: int, ranks: int = 1) -> float:
    """Seconds to the first token under context parallelism."""
    found = predict(shape, hardware, tokens, ranks)
    assert found is not None  # rows can always be dealt out
    return found.seconds


def break_even(shape: ModelShape, hardware: Hardware, ranks: int) -> int | None:
    """The fewest tokens (a multiple of 2P) from which on P ranks beat one device; None where they do not at 1M tokens.

    Looked for from above, on a grid of a quarter octave and then exactly: a few tokens of a mixture of experts may win,
    too, since each rank then reads fewer experts, but longer steps lose again.
    """
    unit = 2 * ranks
    if ranks == 1:
        return None

    def wins(units: int) -> bool:
        return ttft(shape, hardware, units * unit, ranks) < ttft(shape, hardware, units * unit)

    high = LONGEST // unit
    if not wins(high):
        return None
    while high > 1 and wins(low := max(1, min(high - 1, int(high / 2**0.25)))):
        high = low
    if high == 1:
        return unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high * unit


def best_ranks(shape: ModelShape, hardware: Hardware, tokens: int, choices: Sequence[int]) -> int:
    """Of these numbers of ranks, the one with the least TTFT under context parallelism; the fewest of equals."""
    return min(sorted(choices), key=lambda ranks: ttft(shape, hardware, tokens, ranks))
