"""The dialect "npu" of a run: sequences of one length, packed (TND), each in its own blocks of the paged caches."""

from __future__ import annotations

import torch
from torch import Tensor

from cppass.demo.job import Job
from cppass.demo.npu.dense import Decoder, Qwen3
from cppass.demo.npu.forward_metadata import causal_mask, plan_step
from cppass.demo.npu.moe import Qwen3Moe
from cppass.demo.presets import PRESETS
from cppass.demo.results import ModelFacts
from cppass.demo.subject import Forward

__all__ = ["NpuModel", "PackedSession"]

BLOCK_SIZE = 128


class NpuModel:
    """A Subject: Qwen3 of torch_npu's ops, dense or a mixture of experts, as the preset says. Weights by seed.

    Raises:
        CPError: CP055, torch_npu cannot be imported.
    """

    def __init__(self, job: Job) -> None:
        preset = PRESETS[job.preset].sized(job.layers, job.vocab)
        self.capacity, self.batch = job.tokens + job.decode, job.batch
        torch.manual_seed(job.seed)
        self.module: Decoder = (Qwen3Moe if preset.experts else Qwen3)(
            preset,
            blocks=job.batch * -(-self.capacity // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            positions=self.capacity,
            dtype=getattr(torch, job.dtype),
        )
        self.module.train(False).requires_grad_(False)
        self.mask = causal_mask()
        self.facts = ModelFacts(
            family="qwen3_moe" if preset.experts else "qwen3",
            parameters=sum(p.numel() for p in self.module.parameters()),
            layers=preset.layers,
            hidden=preset.hidden,
            heads=preset.heads,
            kv_heads=preset.kv_heads,
            head_dim=preset.head_dim,
            vocab=preset.vocab,
            experts=preset.experts,
            note=preset.note(preset.layers, preset.vocab),
        )

    def begin(self) -> PackedSession:
        self.module.clear_caches()
        return PackedSession(self)


class PackedSession:
    """A Session: every step is planned as a model runner plans it, and that is part of its time."""

    def __init__(self, model: NpuModel) -> None:
        self._model, self._cached = model, 0

    def step(self, forward: Forward, ids: Tensor) -> Tensor:
        sequences, new = ids.shape
        plan = plan_step(
            [new] * sequences,
            [self._cached] * sequences,
            block_size=BLOCK_SIZE,
            capacity=self._model.capacity,
            mask=self._model.mask,
        )
        self._cached += new
        logits: Tensor = forward(ids.flatten(), plan.position_ids, plan.metadata)
        return logits

    def keys_and_values(self) -> list[Tensor]:
        """[blocks, BLOCK_SIZE, kv_heads, head_dim] each."""
        return [pages for cache in self._model.module.caches() for pages in (cache.k, cache.v)]
