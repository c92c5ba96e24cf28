"""The demo's NPU models, cut over one group for attention and one for the MLP or experts, weights and all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from composition.parallel_layers import (
    ExchangedExperts,
    Gathered,
    OwnExperts,
    Part,
    ScatteredSum,
    Summed,
    VocabEmbedding,
    VocabHead,
)
from torch import Tensor, nn

from cppass.demo.npu.dense import Decoder, Qwen3
from cppass.demo.npu.layers import linear
from cppass.demo.npu.moe import Experts, Qwen3Moe
from cppass.demo.presets import PRESETS

BLOCKS, BLOCK_SIZE = 13, 128  # the last block belongs to no sequence: it takes the rows of padding
MOE = {"own experts": OwnExperts, "exchange": ExchangedExperts}


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a model is cut. Attributes:

    attention, mlp: the mesh dimensions that heads and the MLP are cut over, "" for none.
    experts: "" (a dense model), "width" (each expert is cut), or a key of MOE (each rank has some experts).
    vocab: embedding and LM head are cut over `attention`, too.
    sums: how partial results are summed, as layers.Summed has it, or "scattered" (sequence parallelism; dense models).
    """

    attention: str = ""
    mlp: str = ""
    experts: str = ""
    vocab: bool = False
    sums: str = "functional"


def whole_model(cut: Cut) -> Decoder:
    """One device's. Norms do something, so that a row in the wrong place shows."""
    torch.manual_seed(0)
    kind, name = (Qwen3Moe, "qwen3-moe-tiny") if cut.experts else (Qwen3, "qwen3-tiny")
    model = kind(PRESETS[name], blocks=BLOCKS, block_size=BLOCK_SIZE).requires_grad_(False)
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def parallel_model(whole: Decoder, cut: Cut, mesh: Mapping[str, Any]) -> Decoder:
    """This rank's part of `whole`, with which it shares the layers that are not cut; caches are its own."""
    heads = Part.of(mesh[cut.attention]) if cut.attention else Part(None, 0, 1)
    preset = whole.preset
    own = dataclasses.replace(preset, heads=preset.heads // heads.size, kv_heads=preset.kv_heads // heads.size)
    model = type(whole)(own, blocks=BLOCKS, block_size=BLOCK_SIZE).requires_grad_(False)  # type: ignore[call-arg,arg-type]
    model.embedding, model.norm, model.lm_head = whole.embedding, whole.norm, whole.lm_head
    if cut.vocab:
        model.embedding = Summed(VocabEmbedding(whole.embedding.weight, heads), heads)  # type: ignore[assignment]
        model.lm_head = VocabHead(whole.lm_head.weight, heads)  # type: ignore[assignment]
    for mine, theirs in zip(model.layers, whole.layers, strict=True):
        mine.input_norm, mine.post_norm = theirs.input_norm, theirs.post_norm
        _attention(mine.attention, theirs.attention, heads, cut)
        mine.mlp = _mlp(theirs.mlp, cut, mesh, preset)
    return _sequence_parallel(model, heads) if cut.sums == "scattered" else model


def own_heads(cache: Tensor, cut: Cut, mesh: Mapping[str, Any]) -> Tensor:
    """Of a whole model's cache [blocks, block_size, H, D]."""
    return Part.of(mesh[cut.attention])(cache, 2) if cut.attention else cache


def _attention(mine: Any, theirs: Any, part: Part, cut: Cut) -> None:
    q, k, v = theirs.qkv_proj.weight.split(theirs.sizes)
    mine.qkv_proj = _linear(torch.cat([part(q), part(k), part(v)]))
    mine.q_norm, mine.k_norm = theirs.q_norm, theirs.k_norm
    mine.o_proj = _summed(_linear(part(theirs.o_proj.weight, 1)), part, cut)


def _mlp(theirs: Any, cut: Cut, mesh: Mapping[str, Any], preset: Any) -> nn.Module:
    if not cut.mlp:
        return theirs  # type: ignore[no-any-return]
    part = Part.of(mesh[cut.mlp])
    if not cut.experts:
        mine = type(theirs)(preset.hidden, preset.intermediate // part.size, torch.float32)
        mine.gate_up_proj = _linear(part(theirs.gate_up_proj.weight, 0, pieces=2))
        mine.down_proj = _summed(_linear(part(theirs.down_proj.weight, 1)), part, cut)
        return mine  # type: ignore[no-any-return]
    if cut.experts != "width":
        experts = MOE[cut.experts](theirs, preset, part)
        return experts if cut.experts == "exchange" else Summed(experts, part, cut.sums)
    narrow = Experts(dataclasses.replace(preset, expert_width=preset.expert_width // part.size), torch.float32)
    narrow.gate = theirs.gate
    narrow.gate_up = nn.Parameter(part(theirs.gate_up, 2, pieces=2), requires_grad=False)
    narrow.down = nn.Parameter(part(theirs.down, 1), requires_grad=False)
    return Summed(narrow, part, cut.sums)


def _summed(layer: nn.Module, part: Part, cut: Cut) -> nn.Module:
    if part.size == 1:
        return layer
    return ScatteredSum(layer, part) if cut.sums == "scattered" else Summed(layer, part, cut.sums)


def _sequence_parallel(model: Decoder, part: Part) -> Decoder:
    """Norms and residuals of T / n rows; projections gather all rows first, and the last norm gathers after."""
    model.embedding = ScatteredSum(VocabEmbedding(model.embedding.weight, part), part)  # type: ignore[assignment]
    model.norm = Gathered(model.norm, part, after=True)  # type: ignore[assignment]
    for layer in model.layers:
        layer.attention.qkv_proj = Gathered(layer.attention.qkv_proj, part)
        layer.mlp.gate_up_proj = Gathered(layer.mlp.gate_up_proj, part)
    return model


def _linear(weight: Tensor) -> nn.Linear:
    layer = linear(weight.shape[1], weight.shape[0], weight.dtype)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return layer
