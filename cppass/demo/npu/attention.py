"""Attention of a Qwen3 layer on npu_fused_infer_attention_score, in the packed TND layout.

Shape suffixes: T tokens of all sequences, H query heads, G key/value heads, D head size, F features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cppass.demo.npu.forward_metadata import ForwardMetadata
from cppass.demo.npu.layers import RMSNorm, linear
from cppass.demo.npu.paged_cache import PagedCache
from cppass.demo.presets import Preset

__all__ = ["Attention", "Op", "fused_attention"]

Op = Literal["v1", "v2"]


class Attention(nn.Module):
    """qkv in one projection, norms per head, rope, the cache write, attention, output projection.

    Two orders of the write:

        write first:   write(cache, k, v); attend(q, pages of the cache)      # every other step
        write after:   attend(q, k, v); write(cache, k, v)                    # fresh_prefill: prompts without a prefix
    """

    def __init__(self, preset: Preset, dtype: torch.dtype, cache: PagedCache, op: Op, *, fresh_prefill: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = preset.heads, preset.kv_heads, preset.head_dim
        self.sizes = [n * preset.head_dim for n in (preset.heads, preset.kv_heads, preset.kv_heads)]
        self.qkv_proj = linear(preset.hidden, sum(self.sizes), dtype)
        self.o_proj = linear(self.sizes[0], preset.hidden, dtype)
        self.q_norm, self.k_norm = RMSNorm(preset.head_dim, dtype), RMSNorm(preset.head_dim, dtype)
        self.cache, self.op, self.fresh_prefill = cache, op, fresh_prefill

    def forward(self, hidden_TF: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, metadata: ForwardMetadata) -> Tensor:
        """[T, F]; with ``prompt_tokens`` the rows after them come out as zeros."""
        rows, padded = metadata.prompt_tokens, hidden_TF.shape[0]
        qkv = self.qkv_proj(hidden_TF)
        if rows is not None:
            qkv = qkv[:rows]
        q, k, v = qkv.split(self.sizes, dim=-1)
        q_THD = self.q_norm(q.reshape(-1, self.heads, self.head_dim))
        k_TGD = self.k_norm(k.reshape(-1, self.kv_heads, self.head_dim))
        v_TGD = v.reshape(-1, self.kv_heads, self.head_dim)
        q_THD, k_TGD = torch.ops.npu.npu_apply_rotary_pos_emb(q_THD, k_TGD, cos_T1D, sin_T1D, "TND")
        if self.fresh_prefill and metadata.is_prefill and not metadata.on_prefix:
            out = self._attend(q_THD, k_TGD, v_TGD, metadata.cu_kv, metadata, None)
            self.cache.write(k_TGD, v_TGD, metadata.slot_mapping)
        else:
            self.cache.write(k_TGD, v_TGD, metadata.slot_mapping)
            pages = self.cache.pages()
            out = self._attend(q_THD, *pages, metadata.kv_lens, metadata, metadata.block_table)
        out_TF = out.reshape(-1, self.sizes[0])
        if rows is not None:
            out_TF = torch.cat([out_TF, out_TF.new_zeros(padded - rows, self.sizes[0])])
        return self.o_proj(out_TF)  # type: ignore[no-any-return]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, kv_lens: list[int], metadata: ForwardMetadata, table: Tensor | None
    ) -> Tensor:
        return fused_attention(
            self.op, q, k, v, metadata.cu_q, kv_lens, mask=metadata.mask, heads=self.heads, kv_heads=self.kv_heads,
            block_table=table, block_size=self.cache.k.shape[1] if table is not None else 0,
        )  # fmt: skip


def fused_attention(
    op: Op,
    q_THD: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: list[int],
    kv_lens: list[int],
    *,
    mask: Tensor,
    heads: int,
    kv_heads: int,
    block_table: Tensor | None,
    block_size: int,
) -> Tensor:
    """Causal attention [T, H, D] by either version of the op (sparse mode 3: causal, aligned at the bottom right).

    Args:
        k, v: packed [T, G, D], or with ``block_table`` pages [blocks, block_size, G * D].
        q_lens: cumulative.
        kv_lens: cumulative for packed keys, per sequence for pages.
    """
    scale = q_THD.shape[-1] ** -0.5
    if op == "v1":
        out = torch.ops.npu.npu_fused_infer_attention_score(
            q_THD, k, v, num_heads=heads, num_key_value_heads=kv_heads, scale=scale, input_layout="TND", sparse_mode=3,
            atten_mask=mask, actual_seq_lengths=q_lens, actual_seq_lengths_kv=kv_lens, block_table=block_table,
            block_size=block_size,
        )  # fmt: skip
    else:
        out = torch.ops.npu.npu_fused_infer_attention_score_v2(
            q_THD, k, v, num_query_heads=heads, num_key_value_heads=kv_heads, softmax_scale=scale, input_layout="TND",
            sparse_mode=3, atten_mask=mask, actual_seq_qlen=q_lens, actual_seq_kvlen=kv_lens, block_table=block_table,
            block_size=block_size,
        )  # fmt: skip
    return out[0]  # type: ignore[no-any-return]
