"""Models whose inputs arrive sharded, on real ranks, beside the same model on one device. Runs in spawned processes.

Caches start as noise and are those of one device before every step: so a step shows what it writes, and what it leaves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from runner.batches import Batch, batch_of
from torch import Tensor, nn

import cppass
from cppass.demo.npu.attention import fused_attention
from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.forward_metadata import causal_mask, metadata_of
from cppass.demo.npu.moe import Qwen3Moe
from cppass.demo.presets import PRESETS
from cppass.runner import Bucket, StepPlan

Lengths = tuple[list[int], list[int] | None]  # new and cached tokens of each sequence
PAGES, BLOCK = 13, 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled model and the steps it is given.

    Attributes:
        natural: control: slots as one device would be given them.
        broken: it does not compile (yet), on any rank; how it fails is in `Seen.failure`.
    """

    model: str
    inner: str
    steps: tuple[Lengths, ...]
    bucket: Bucket | None = None
    remainder: str = "balanced"
    natural: bool = False
    broken: bool = False


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a rank saw, a list entry a step.

    Attributes:
        errors: of the outputs.
        cache_errors: of all pages but the one of padding.
        touched: pages that differ, by a bit, from before the step, beside those that the step's slots name.
        caches: digests of all pages but the one of padding.
        statuses, collectives: of all graphs.
        failure: of a broken case.
    """

    errors: list[float]
    cache_errors: list[float]
    touched: list[list[int]]
    caches: list[str]
    statuses: list[str]
    collectives: list[int]
    failure: str = ""


def run(rank: int, cp_size: int, cases: list[Case]) -> list[Seen]:
    logging.disable(logging.WARNING)  # the compilers say at length that they run eagerly
    warnings.simplefilter("ignore")
    with torch.no_grad():
        return [_run(rank, cp_size, case) for case in cases]


def _run(rank: int, cp_size: int, case: Case) -> Seen:
    cppass.clear_reports()
    torch._dynamo.reset()
    harness = HARNESSES[case.model]
    model, alone = harness.model(), harness.model()
    options = {"inputs": "sharded", "remainder": case.remainder, "inner": case.inner, **harness.options}
    compiled = torch.compile(model, backend="npu_cp", dynamic=True, options=options)
    seen = Seen([], [], [], [], [], [])
    for number, (lengths, prefixes) in enumerate(case.steps):
        batch = batch_of(lengths, prefixes, BLOCK, seed=number)
        pad_slot = harness.pad_slot(batch)
        plan = batch.plan(cp_size, rank, bucket=case.bucket, remainder=case.remainder, pad_slot=pad_slot)
        assert plan.sharded, plan.reason
        if case.natural:
            plan = dataclasses.replace(plan, slot_mapping=batch.slots)
        before = [x.clone() for x in harness.caches(alone)]
        expected = harness.whole(alone, batch)
        try:
            seen.errors.append(_distance(harness.sharded(compiled, batch, plan), expected))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not case.broken:  # the other ranks may be waiting in a collective: end this one
                raise
            return dataclasses.replace(seen, failure=str(cppass.unwrap(error)))
        _look_at_caches(harness, model, alone, before, batch, seen)
    reports = cppass.reports()
    return dataclasses.replace(seen, statuses=[r.status for r in reports], collectives=[r.collectives for r in reports])


def _look_at_caches(harness: Any, model: Any, alone: Any, before: list[Tensor], batch: Batch, seen: Seen) -> None:
    padding = harness.pad_slot(batch) // BLOCK
    written = {slot // BLOCK for slot in batch.slots.tolist()}
    pages = [page for page in range(PAGES) if page != padding]
    pairs = list(zip(harness.caches(model), harness.caches(alone), strict=True))
    seen.cache_errors.append(max(_distance(x[pages], y[pages]) for x, y in pairs))
    others = [page for page in pages if page not in written]
    old = zip(harness.caches(model), before, strict=True)
    changed = {page for x, y in old for page in others if not torch.equal(x[page], y[page])}
    seen.touched.append(sorted(changed))
    digest = hashlib.sha256(b"".join(x[pages].numpy().tobytes() for x, _ in pairs))
    seen.caches.append(digest.hexdigest())
    for x, y in pairs:
        x.copy_(y)


def _distance(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape and bool(x.isfinite().all())
    return float((x - y).abs().max())


# -- what is compiled --------------------------------------------------------------------------------------------------


class Qwen:
    """The demo models: ids and positions arrive sharded, logits [sequences, vocab] leave whole."""

    options = {"sharded_inputs": {"input_ids": 0, "position_ids": 0}}  # noqa: RUF012

    def __init__(self, kind: Any, preset: str) -> None:
        self.kind, self.preset = kind, preset

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.kind(PRESETS[self.preset], blocks=PAGES, block_size=BLOCK).requires_grad_(False)
        for x in self.caches(model):
            x.normal_()
        return model

    @staticmethod
    def caches(model: Any) -> list[Tensor]:
        return [x for cache in model.caches() for x in (cache.k, cache.v)]

    @staticmethod
    def pad_slot(batch: Batch) -> int:
        return batch.pad_slot

    def whole(self, model: Any, batch: Batch) -> Tensor:
        ids, positions = _inputs(batch)
        plan = batch.plan(1)
        assert not plan.sharded
        return model(ids, positions, metadata_of(plan, causal_mask()))  # type: ignore[no-any-return]

    def sharded(self, compiled: Any, batch: Batch, plan: StepPlan) -> Tensor:
        ids, positions = (plan.shard(x) for x in _inputs(batch))
        return compiled(ids, positions, metadata_of(plan, causal_mask()))[: len(batch.lengths)]  # type: ignore[no-any-return]


class Paged(nn.Module):
    """One attention whose cache is written by npu_scatter_pa_kv_cache, which skips slot -1: [m, 32] -> [m, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, heads * 16, bias=False) for heads in (4, 2, 2))
        for name in ("kc", "vc"):
            self.register_buffer(name, torch.randn(PAGES, BLOCK, 2, 16))

    def forward(
        self, hidden: Tensor, slots: Tensor, table: Tensor, mask: Tensor, cu_q: list[int], kv_lens: list[int]
    ) -> Tensor:
        q, k, v = (layer(hidden).view(hidden.shape[0], -1, 16) for layer in (self.q, self.k, self.v))
        torch.ops.npu.npu_scatter_pa_kv_cache(k, v, self.kc, self.vc, slots, cache_mode="Norm")
        pages = self.kc.flatten(2), self.vc.flatten(2)
        out = fused_attention(
            "v2", q, *pages, cu_q, kv_lens, mask=mask, heads=4, kv_heads=2, block_table=table, block_size=BLOCK
        )
        return out.flatten(1)


class PagedHarness:
    """`Paged`: local rows leave as they are, and the runner gathers and restores them."""

    options = {"sharded_inputs": {"hidden": 0}}  # noqa: RUF012

    @staticmethod
    def model() -> Any:
        torch.manual_seed(0)
        return Paged().requires_grad_(False)

    @staticmethod
    def caches(model: Any) -> list[Tensor]:
        return [model.kc, model.vc]

    @staticmethod
    def pad_slot(batch: Batch) -> int:
        return -1

    @staticmethod
    def _hidden(batch: Batch) -> Tensor:
        return torch.randn(batch.tokens, 32, generator=torch.Generator().manual_seed(batch.tokens))

    def whole(self, model: Any, batch: Batch) -> Tensor:
        plan = batch.plan(1)
        hidden = self._hidden(batch)
        return model(hidden, batch.slots, batch.table, causal_mask(), plan.cu_q, plan.kv_lens)  # type: ignore[no-any-return]

    def sharded(self, compiled: Any, batch: Batch, plan: StepPlan) -> Tensor:
        hidden = plan.shard(self._hidden(batch), pad=7.0)
        own = compiled(hidden, plan.slot_mapping, plan.block_table, causal_mask(), plan.cu_q, plan.kv_lens)
        gathered = [torch.empty_like(own) for _ in range(plan.cp_size)]
        dist.all_gather(gathered, own)
        return plan.restore(torch.cat(gathered))


HARNESSES: dict[str, Any] = {
    "dense": Qwen(Qwen3, "qwen3-tiny"),
    "moe": Qwen(Qwen3Moe, "qwen3-moe-tiny"),
    "scatter_pa": PagedHarness(),
}


def _inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Token ids and positions of a whole step."""
    ids = torch.randint(0, 512, (batch.tokens,), generator=torch.Generator().manual_seed(batch.tokens))
    return ids, torch.tensor([batch.prefixes[s] + offset for s, offset in batch.rows])
