"""Qwen3 (dense) for Ascend's graph mode. T tokens of all sequences, B sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cppass.demo.npu import load_npu_ops
from cppass.demo.npu.attention import Attention, Op
from cppass.demo.npu.forward_metadata import ForwardMetadata
from cppass.demo.npu.layers import MLP, AddRMSNorm, RMSNorm, linear, rope_tables
from cppass.demo.npu.paged_cache import PagedCache
from cppass.demo.presets import Preset

__all__ = ["Decoder", "Layer", "Qwen3"]


class Layer(nn.Module):
    """Attention and ``mlp``, each after a norm that also adds the residual."""

    def __init__(self, preset: Preset, dtype: torch.dtype, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.input_norm = AddRMSNorm(preset.hidden, dtype)
        self.attention = attention
        self.post_norm = AddRMSNorm(preset.hidden, dtype)
        self.mlp = mlp

    def forward(
        self, hidden: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, metadata: ForwardMetadata
    ) -> tuple[Tensor, Tensor]:
        if residual is None:  # the first layer has nothing to add
            residual = hidden
            hidden = RMSNorm.forward(self.input_norm, hidden)
        else:
            hidden, residual = self.input_norm(hidden, residual)
        hidden, residual = self.post_norm(self.attention(hidden, cos, sin, metadata), residual)
        return self.mlp(hidden), residual


class Decoder(nn.Module):
    """Embedding, layers, final norm, the last row of each sequence, LM head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, preset: Preset, layers: list[Layer], positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.preset = preset
        self.embedding = nn.Embedding(preset.vocab, preset.hidden, dtype=dtype)
        self.layers = nn.ModuleList(layers)
        self.norm = AddRMSNorm(preset.hidden, dtype)
        self.lm_head = linear(preset.hidden, preset.vocab, dtype)
        cos, sin = rope_tables(preset.head_dim, positions, dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, metadata: ForwardMetadata) -> Tensor:
        """Logits [B, vocab] of the last token of each sequence.

        Args:
            input_ids, position_ids: int64 [T].
            metadata: of ``plan_step``; the caches are written at its slots.
        """
        if metadata.prompt_tokens is not None:
            position_ids = position_ids[: metadata.prompt_tokens]
        cos = self.cos.index_select(0, position_ids).unsqueeze(1)
        sin = self.sin.index_select(0, position_ids).unsqueeze(1)
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, cos, sin, metadata)
        hidden, _ = self.norm(hidden, residual)
        last = torch.index_select(hidden, 0, metadata.cu_q_tensor - 1)
        return self.lm_head(last)  # type: ignore[no-any-return]

    def caches(self) -> list[PagedCache]:
        return [module for module in self.modules() if isinstance(module, PagedCache)]

    def clear_caches(self) -> None:
        for cache in self.caches():
            cache.clear()


class Qwen3(Decoder):
    """Writes the cache first and attends to its pages in every step, prefill too.

    Args:
        preset: sizes; random weights by torch's generator.
        blocks, block_size: of each layer's cache; ``block_size`` is a multiple of 128 up to 512 on an NPU.
        positions: of the rope tables.
        op: which version of npu_fused_infer_attention_score.
        layers: the preset's own if left out.

    Raises:
        CPError: CP055, torch_npu cannot be imported.
    """

    fresh_prefill = False  # whether prefill attends to its fresh keys, the write after

    def __init__(
        self,
        preset: Preset,
        *,
        blocks: int,
        block_size: int = 128,
        positions: int = 4096,
        dtype: torch.dtype = torch.float32,
        op: Op = "v2",
        layers: int | None = None,
    ) -> None:
        load_npu_ops()

        def layer() -> Layer:
            cache = PagedCache(blocks, block_size, preset.kv_heads, preset.head_dim, dtype)
            attention = Attention(preset, dtype, cache, op, fresh_prefill=self.fresh_prefill)
            return Layer(preset, dtype, attention, self.mlp(preset, dtype))

        super().__init__(preset, [layer() for _ in range(layers or preset.layers)], positions, dtype)

    @staticmethod
    def mlp(preset: Preset, dtype: torch.dtype) -> nn.Module:
        """What a layer has behind its attention."""
        return MLP(preset.hidden, preset.intermediate, dtype)
