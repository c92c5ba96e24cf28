"""Tiny Qwen3 and Qwen3-MoE models of transformers with random weights, and the caches they take."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
)

from cppass.demo.model import cache_argument

LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY, CACHE_ROWS = 2, 2, 16, 128, 96


@functools.cache
def model(family: str, attention: str) -> Any:
    """family: "dense", "moe" (grouped_mm experts) or "moe-batched" (batched_mm experts)."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    if family == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config._experts_implementation = "batched_mm" if family == "moe-batched" else "grouped_mm"
    return Qwen3MoeForCausalLM(config).eval()


def cache(kind: str, config: Any, batch: int) -> Cache | None:
    """kind: "none", "dynamic", "static early" or "static lazy"."""
    if kind == "none":
        return None
    if kind == "dynamic":
        return DynamicCache(config=config)
    static = StaticCache(config=config, max_cache_len=CACHE_ROWS)
    if kind == "static early":
        static.early_initialization(batch, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    return static


def handed(cache: Cache | None) -> dict[str, Any]:
    """A cache as an argument of a model, under the name that the installed transformers has for it."""
    return {cache_argument(Qwen3ForCausalLM.forward): cache, "use_cache": cache is not None}


def rows(cache: Cache | None) -> list[torch.Tensor]:
    """Keys and values of every layer [B, H, T, D]."""
    return [t for layer in cache.layers for t in (layer.keys, layer.values)] if cache is not None else []


def token_ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
