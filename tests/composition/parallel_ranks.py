"""Models cut over meshes of 2 x 2 ranks, one dimension of which shares the sequence. Runs in spawned processes."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from composition.parallel_models import BLOCK_SIZE, BLOCKS, Cut, own_heads, parallel_model, whole_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import cppass
from cppass.demo.npu.forward_metadata import Step, plan_step
from cppass.runner import plan_step as plan_sharded

Batch = tuple[list[int], list[int] | None]  # new tokens and cached tokens of each sequence
Names = tuple[str, str]  # dimensions of a mesh; ranks 0 and 1 differ in the second

PAGES = BLOCKS - 1  # what sequences may own


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled model and the steps it is given, the caches kept from step to step. Attributes:

    meshes: over the same four ranks; the first one has the dimension that shares the sequence.
    group: the dimension that is passed as the group; "" passes none, which means the world; "twin of tp": another
        group of the ranks of "tp".
    refused: compiling is expected to fail, on every rank.
    """

    cut: Cut
    batches: tuple[Batch, ...]
    meshes: tuple[Names, ...] = (("cp", "tp"),)
    group: str = "cp"
    cp_size: int | None = None
    inputs: str = "replicated"
    dynamic: bool = False
    inner: str = "eager"
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one rank saw. Attributes:

    peers: the same number on all ranks that share a sequence.
    ran: the collectives in graphs of one forward of the first step: "all_reduce [32, 64]" (of this shape, per rank).
    """

    peers: int
    errors: list[float]
    cache_errors: list[float]
    caches: str = ""
    statuses: list[str] = dataclasses.field(default_factory=list)
    ran: list[str] = dataclasses.field(default_factory=list)
    failure: str = ""


def run(rank: int, cases: list[Case]) -> list[Seen]:
    logging.disable(logging.WARNING)  # the compilers say at length that they run eagerly
    warnings.simplefilter("ignore")
    names = dict.fromkeys(names for case in cases for names in case.meshes)
    meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=both) for both in names]
    dims = {both: {name: mesh[name] for name in both} for both, mesh in zip(names, meshes, strict=True)}
    with torch.no_grad():
        return [_run(case, {k: v for both in case.meshes for k, v in dims[both].items()}) for case in cases]


def _run(case: Case, mesh: dict[str, Any]) -> Seen:
    torch._dynamo.reset()
    cppass.clear_reports()
    whole = whole_model(case.cut)
    model = parallel_model(whole, case.cut, mesh)
    cp, other = sorted(case.meshes[0], key=lambda name: "cp" not in name)
    seen = Seen(mesh[other].get_local_rank(), [], [])
    rank = mesh[cp].get_local_rank()
    try:
        step = torch.compile(model, backend="npu_cp", dynamic=case.dynamic, options=_options(case, mesh))
        for batch in case.batches:
            ids, plan = _planned(batch)
            expected = whole(ids, plan.position_ids, plan.metadata)
            seen.errors.append(_error(_forward(step, case, batch, rank), expected))
            pairs = zip(_cached(model), _cached(whole), strict=True)
            seen.cache_errors.append(max(_error(a, own_heads(b, case.cut, mesh)) for a, b in pairs))
    except Exception as error:
        if not case.refused:  # the other ranks may be waiting in a collective: end this one
            raise
        return dataclasses.replace(seen, failure=f"{type(cppass.unwrap(error)).__name__}: {cppass.unwrap(error)}")
    return dataclasses.replace(
        seen,
        caches=hashlib.sha256(b"".join(x.numpy().tobytes() for x in _cached(model))).hexdigest(),
        statuses=[report.status for report in cppass.reports()],
        ran=_collectives(step, case, rank),
    )


def _options(case: Case, mesh: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"inner": case.inner, "inputs": case.inputs}
    if case.group == "twin of tp":
        options["group"] = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][dist.get_rank() // 2]
    elif case.group:
        options["group"] = mesh[case.group]
    if case.cp_size is not None:
        options["cp_size"] = case.cp_size
    if case.inputs == "sharded":
        options["sharded_inputs"] = {"input_ids": 0, "position_ids": 0}
    return options


def _planned(batch: Batch) -> tuple[Tensor, Step]:
    lengths, prefixes = batch
    ids = torch.randint(0, 512, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
    return ids, plan_step(lengths, prefixes, block_size=BLOCK_SIZE, blocks=PAGES, capacity=2 * BLOCK_SIZE, shuffle=3)


def _forward(step: Any, case: Case, batch: Batch, rank: int) -> Tensor:
    """Logits of every sequence. `rank`: of those that share them."""
    ids, plan = _planned(batch)
    metadata = plan.metadata
    if case.inputs == "replicated":
        return step(ids, plan.position_ids, metadata)  # type: ignore[no-any-return]
    own = plan_sharded(
        *batch, slot_mapping=metadata.slot_mapping, block_table=metadata.block_table, block_size=BLOCK_SIZE,
        cp_size=2, rank=rank, pad_slot=PAGES * BLOCK_SIZE,
    )  # fmt: skip
    names = ("slot_mapping", "block_table", "cu_q", "kv_lens", "cu_kv", "cu_q_tensor")
    local = dataclasses.replace(metadata, **{name: getattr(own, name) for name in names})
    return step(own.shard(ids), own.shard(plan.position_ids), local)  # type: ignore[no-any-return]


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _cached(model: Any) -> list[Tensor]:
    return [x[:PAGES] for cache in model.caches() for x in (cache.k, cache.v)]


def _collectives(step: Any, case: Case, rank: int) -> list[str]:
    """By torch's profiler, in one more forward of the first step: it writes the same rows again."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        _forward(step, case, case.batches[0], rank)
    prefix = "_c10d_functional::"
    events = [e for e in profile.events() if e.name.startswith(prefix) and "wait" not in e.name]
    return [f"{e.name.removeprefix(prefix)} {e.input_shapes[0]}" for e in events]
