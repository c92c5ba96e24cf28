"""Ascend's fused-infer-attention op: what its versions call their arguments, and which axes carry tokens."""

from __future__ import annotations

TOKEN_DIM = {"TND": 0, "BSH": 1, "BSND": 1, "BNSD": 2}
"""Per input layout: of query, dense key and value, and output."""

LSE_DIM = {"TND": 0, "BSH": 2, "BSND": 2, "BNSD": 2}
"""Per input layout: of the log-sum-exp, [T, N, 1] or [B, N, S, 1]."""

V1 = {
    "q_lengths": "actual_seq_lengths",
    "kv_lengths": "actual_seq_lengths_kv",
    "num_heads": "num_heads",
    "scale": "scale",
    "lse": "softmax_lse_flag",
}
V2 = {
    "q_lengths": "actual_seq_qlen",
    "kv_lengths": "actual_seq_kvlen",
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "lse": "return_softmax_lse",
    "sink": "learnable_sink",
}

OPS = {
    "npu::npu_fused_infer_attention_score": V1,
    "npu::npu_fused_infer_attention_score_v2": V2,
    "air::npu_fused_infer_attention_score": V1,
    "air::npu_fused_infer_attention_score_v2": V2,
}
"""Op -> its names for what the versions call differently, by the fields of cppass.site.FusedAttention."""
