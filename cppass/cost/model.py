"""Shapes of models. Numbers are those of the published config.json of Qwen/Qwen3-*."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder of the Qwen3 family: what the closed forms need of it.

    Attributes:
        name: what --preset takes.
        layers, hidden, intermediate: decoder layers, width of the residual stream, width of a dense MLP.
        heads, kv_heads, head_dim: query heads, key/value heads, width of one head.
        vocab: rows of the embedding and of the LM head.
        experts, experts_per_token, expert_width: a mixture of experts in every layer; 0 experts is a dense model.
        tied: the LM head is the embedding (tie_word_embeddings).
        weight_bytes, activation_bytes: bytes of one element; K and V travel and are cached as activations.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 151_936
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    tied: bool = False
    weight_bytes: int = 2
    activation_bytes: int = 2

    @property
    def active_width(self) -> int:
        """MLP width that one token passes through."""
        return self.experts_per_token * self.expert_width if self.experts else self.intermediate

    @property
    def stored_width(self) -> int:
        """MLP width of a layer's weights."""
        return self.experts * self.expert_width if self.experts else self.intermediate

    def splits_heads(self, ranks: int) -> bool:
        """Whether heads can be dealt out to so many ranks (TP, Ulysses); too few K/V heads are repeated."""
        fits = self.kv_heads % ranks == 0 or ranks % self.kv_heads == 0
        return self.heads % ranks == 0 and fits


MODELS: dict[str, ModelShape] = {
    m.name: m
    for m in (
        ModelShape("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, tied=True),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128),
        ModelShape("qwen3-32b", 64, 5120, 25600, 64, 8, 128),
        ModelShape("qwen3-30b-a3b", 48, 2048, 6144, 32, 4, 128, experts=128, experts_per_token=8, expert_width=768),
        ModelShape("qwen3-235b-a22b", 94, 4096, 12288, 64, 4, 128, experts=128, experts_per_token=8, expert_width=1536),
    )
}
