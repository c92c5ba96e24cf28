"""One prefill of the acceptance matrix: compiled on every rank against eager on one device."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

import qwen
import torch
from torch.profiler import ProfilerActivity

import cppass

MATRIX = {
    "family": ("dense", "moe"),
    "attention": ("sdpa", "eager"),
    "cache": ("static early", "static lazy", "dynamic", "none"),
    "dynamic": (False, True),
    "batch": (1, 2),
    "cp_size": (2, 3, 4),
    "tokens": (1, 5, 13, 24, 37),  # 24: 2P divides it for every P
}
TOLERANCE = 1e-5  # fp32, logits and caches


@dataclasses.dataclass(frozen=True)
class Case:
    family: str
    attention: str
    cache: str
    dynamic: bool
    batch: int
    cp_size: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one rank saw."""

    case: Case
    logits_error: float
    cache_error: float
    cache_hash: str
    status: str
    sites: int
    collectives: int
    flops: int
    flops_of_one_device: int

    def check(self) -> None:
        case, rewritten = self.case, self.case.tokens >= 2 * self.case.cp_size
        assert self.logits_error <= TOLERANCE, self
        assert self.cache_error <= TOLERANCE, self
        assert self.sites == qwen.LAYERS, self
        assert self.status == ("rewritten" if rewritten else "left alone"), self
        assert self.collectives == (qwen.LAYERS + 1 if rewritten else 0), self
        if not rewritten:
            assert self.flops == self.flops_of_one_device, self
        elif case.tokens % (2 * case.cp_size) == 0:
            assert self.flops * case.cp_size == self.flops_of_one_device, self


@dataclasses.dataclass
class Counts:
    """What ran: collectives, and the FLOPs of linear layers (attention's own products are not in them)."""

    collectives: int = 0
    flops: int = 0


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    counts = Counts()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profile:
        yield counts
    for event in profile.events():
        counts.collectives += event.name == "_c10d_functional::all_gather_into_tensor"
        if event.name in ("aten::mm", "aten::addmm"):
            counts.flops += event.flops or 0


def run_cases(rank: int, cases: list[Case]) -> list[Outcome]:
    return [run_case(case) for case in cases]


def run_case(case: Case) -> Outcome:
    torch._dynamo.reset()
    model = qwen.model(case.family, case.attention)
    ids = qwen.token_ids(case.batch, case.tokens)
    expected_cache = qwen.cache(case.cache, model.config, case.batch)
    cache = qwen.cache(case.cache, model.config, case.batch)
    compiled = torch.compile(model, backend="npu_cp", dynamic=case.dynamic)
    with torch.no_grad():
        compiled(ids, **qwen.handed(qwen.cache(case.cache, model.config, case.batch)))
        report = cppass.reports()[-1]
        with counting() as one_device:
            expected = model(ids, **qwen.handed(expected_cache)).logits
        with counting() as ours:
            logits = compiled(ids, **qwen.handed(cache)).logits
    assert report.collectives == ours.collectives, (report, ours.collectives)
    pairs = list(zip(qwen.rows(expected_cache), qwen.rows(cache), strict=True))
    return Outcome(
        case,
        difference(expected, logits),
        max((difference(a, b) for a, b in pairs), default=0.0),
        hashlib.sha256(b"".join(b.numpy().tobytes() for _, b in pairs)).hexdigest(),
        report.status,
        len(report.sites),
        ours.collectives,
        ours.flops,
        one_device.flops,
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape)
    return float((a - b).abs().max())
