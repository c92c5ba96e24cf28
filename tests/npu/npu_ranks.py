"""Qwen3 of torch_npu's ops, compiled on real ranks, against the same model on one device. Runs in spawned processes."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from typing import Any

import torch

import cppass
from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.forward_metadata import plan_step
from cppass.demo.npu.moe import Qwen3Moe
from cppass.demo.presets import PRESETS

Batch = tuple[list[int], list[int] | None]  # new tokens and cached tokens of each sequence


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled model and the steps it is given, the caches kept from step to step where there is a prefix."""

    kind: str
    inner: str
    batches: tuple[Batch, ...]
    dynamic: bool = False
    op: str = "v2"
    dtype: torch.dtype = torch.float32
    shuffle: int | None = 3
    hook: str = ""  # a backend of one's own with cppass.npu_pass, instead of npu_cp
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    errors: list[float]
    cache_errors: list[float]
    caches: str
    statuses: list[str]
    collectives: list[int]
    failure: str = ""


def model_of(case: Case) -> Any:
    torch.manual_seed(0)
    kind = {"dense": Qwen3, "moe": Qwen3Moe}[case.kind]
    preset = PRESETS["qwen3-tiny" if case.kind == "dense" else "qwen3-moe-tiny"]
    return kind(preset, blocks=12, dtype=case.dtype, op=case.op).requires_grad_(False)  # type: ignore[arg-type]


def compiled(case: Case, model: Any) -> Any:
    torch._dynamo.reset()
    if not case.hook:
        return torch.compile(model, backend="npu_cp", dynamic=case.dynamic, options={"inner": case.inner})
    import torch_npu  # noqa: F401
    import torchair

    if case.hook == "npugraph_ex":
        options = {"post_grad_custom_pre_pass": cppass.npu_pass(), "force_eager": True}
        return torch.compile(model, backend="npugraph_ex", dynamic=case.dynamic, options=options)
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    config.post_grad_custom_pre_pass = cppass.npu_pass()
    return torch.compile(model, backend=torchair.get_npu_backend(compiler_config=config), dynamic=case.dynamic)


def run(rank: int, cases: list[Case]) -> list[Seen]:
    logging.disable(logging.WARNING)  # the compilers say at length that they run eagerly
    warnings.simplefilter("ignore")
    return [_run(case) for case in cases]


def _run(case: Case) -> Seen:
    cppass.clear_reports()
    model, alone = model_of(case), model_of(case)
    seen = Seen([], [], "", [], [])
    try:
        step = compiled(case, model)
        for lengths, prefixes in case.batches:
            ids = torch.randint(0, 512, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
            blocks = {"block_size": 128, "blocks": 12, "capacity": 256, "shuffle": case.shuffle}
            plan = plan_step(lengths, prefixes, **blocks)
            expected = alone(ids, plan.position_ids, plan.metadata)
            logits = step(ids, plan.position_ids, plan.metadata)
            seen.errors.append(float((logits - expected).abs().max()))
            pairs = zip(_cached(model), _cached(alone), strict=True)
            seen.cache_errors.append(max(float((a - b).abs().max()) for a, b in pairs))
    except Exception as error:
        if not case.refused:  # the other ranks may be waiting in a collective: end this one
            raise
        return dataclasses.replace(seen, failure=f"{type(cppass.unwrap(error)).__name__}: {cppass.unwrap(error)}")
    reports = cppass.reports()
    digest = hashlib.sha256(b"".join(x.view(torch.uint8).numpy().tobytes() for x in _cached(model))).hexdigest()
    return dataclasses.replace(
        seen, caches=digest, statuses=[r.status for r in reports], collectives=[r.collectives for r in reports]
    )


def _cached(model: Any) -> list[torch.Tensor]:
    return [x for cache in model.caches() for x in (cache.k, cache.v)]
