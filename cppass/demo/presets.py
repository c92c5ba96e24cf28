"""Models by name: the widths of published checkpoints with random weights, cut to a size that one host can run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """The shape of a model.

    Attributes:
        name: what --preset takes.
        hidden: width of the residual stream.
        intermediate: width of a dense MLP.
        heads, kv_heads, head_dim: query heads, key/value heads and the width of one head.
        real_layers, real_vocab: what the published model has; 0 for the tiny ones, which were never published.
        layers, vocab: what is built unless --layers and --vocab say otherwise.
        experts, experts_per_token, expert_width: a mixture of experts in every layer; 0 experts is a dense model.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    real_layers: int = 0
    real_vocab: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0

    def sized(self, layers: int | None, vocab: int | None) -> Preset:
        """This preset with another number of layers or another vocabulary; None keeps its own."""
        return dataclasses.replace(self, layers=layers or self.layers, vocab=vocab or self.vocab)

    def note(self, layers: int, vocab: int) -> str:
        """How what was built differs from the published model: "random weights, 3 of 28 layers"."""
        cut = ["random weights"]
        if self.real_layers and layers != self.real_layers:
            cut.append(f"{layers} of {self.real_layers} layers")
        if self.real_vocab and vocab != self.real_vocab:
            cut.append(f"vocabulary {vocab:,} of {self.real_vocab:,}")
        return ", ".join(cut)

    def config(self, layers: int | None, vocab: int | None, positions: int) -> PreTrainedConfig:
        """The transformers config of this preset.

        Args:
            layers, vocab: None takes the preset's own.
            positions: tokens the rotary embedding has to reach.
        """
        from transformers import Qwen3Config, Qwen3MoeConfig

        shape: dict[str, Any] = {
            "vocab_size": vocab or self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": max(40960, positions),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        }
        if not self.experts:
            return Qwen3Config(**shape)
        moe: dict[str, Any] = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.expert_width,
        }
        return Qwen3MoeConfig(**shape, **moe)


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset("qwen3-tiny", 64, 128, 4, 2, 16, layers=2, vocab=512),
        Preset("qwen3-0.6b", 1024, 3072, 16, 8, 128, layers=3, vocab=4096, real_layers=28, real_vocab=151936),
        Preset("qwen3-8b", 4096, 12288, 32, 8, 128, layers=1, vocab=4096, real_layers=36, real_vocab=151936),
        Preset(
            "qwen3-moe-tiny", 64, 128, 4, 2, 16, layers=2, vocab=512, experts=8, experts_per_token=2, expert_width=32
        ),
        Preset(
            "qwen3-30b-a3b", 2048, 6144, 32, 4, 128, layers=1, vocab=4096, real_layers=48, real_vocab=151936,
            experts=128, experts_per_token=8, expert_width=768,
        ),
    )
}  # fmt: skip
