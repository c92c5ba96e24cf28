"""What one process measured, as frozen values that travel between processes as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The model that was built.

    Attributes:
        family: transformers' model_type.
        parameters: number of weights.
        layers, hidden, heads, kv_heads, head_dim, vocab: its shape.
        experts: experts per layer, 0 for a dense model.
        note: how it differs from the published model, "" where it does not.
    """

    family: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    note: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One rank against one device, after prefill. NaN where either side has one.

    Attributes:
        logits_error, cache_error: max absolute error of the last token's logits and of K and V of all layers.
        logits_scale, cache_scale: max absolute value of the reference.
    """

    logits_error: float
    logits_scale: float
    cache_error: float
    cache_scale: float


@dataclasses.dataclass(frozen=True)
class Rewriting:
    """What cppass reported about the graphs of one prefill.

    Attributes:
        status: "rewritten", "left alone" or "refused".
        sites: attention sites.
        collectives: per forward.
        received_bytes: per forward and rank; None where it is not known.
        text: the report as text.
    """

    status: str
    sites: int
    collectives: int
    received_bytes: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class ProcessResult:
    """One process of one phase.

    Attributes:
        model: the model it built.
        first_seconds: its first prefill, with compilation where there is any.
        prefill_seconds: the timed prefills, in order.
        tokens: generated ids, [batch][decode + 1].
        cache_digest: of all bytes of K and V after the prefill and after the last decode step; "" without a cache.
        peak_bytes, peak_method: peak resident memory of the timed prefills, and how it was measured.
        comparison, rewriting: of a rank; None elsewhere.
    """

    model: ModelFacts
    first_seconds: float
    prefill_seconds: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]
    cache_digest: str
    peak_bytes: int
    peak_method: str
    comparison: Comparison | None = None
    rewriting: Rewriting | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProcessResult:
        raw: dict[str, Any] = json.loads(text)
        raw["model"] = ModelFacts(**raw["model"])
        raw["prefill_seconds"] = tuple(raw["prefill_seconds"])
        raw["tokens"] = tuple(tuple(row) for row in raw["tokens"])
        raw["comparison"] = raw["comparison"] and Comparison(**raw["comparison"])
        raw["rewriting"] = raw["rewriting"] and Rewriting(**raw["rewriting"])
        return cls(**raw)
