"""A profile of two real ranks: queries are computed between the start of the all-gather and its wait, while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import on_ranks
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass.extend import pointwise

LATE = 0.5  # seconds that rank 1 keeps rank 0 waiting for its keys
Events = list[dict[str, Any]]


@torch.library.custom_op("tracetest::late", mutates_args=())
def late(x: Tensor) -> Tensor:
    """A copy; rank 1 takes its time, so that on rank 0 the collective lasts that long."""
    time.sleep(LATE * dist.get_rank())
    return x.clone()


@late.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def attend(x_BSF: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """Queries first, as models write it; the whole output is wanted."""
    q, k, v = ((x_BSF @ w).unflatten(2, (-1, 16)).transpose(1, 2) for w in (wq, wk, wv))
    k = late(k)
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def profiles(rank: int, folder: str) -> dict[bool, str]:
    """With overlap and without."""
    cppass.rule("tracetest::late", pointwise)
    return {overlap: profile(rank, folder, overlap) for overlap in (True, False)}


def profile(rank: int, folder: str, overlap: bool) -> str:
    """One step, traced; in it, rank 1 is late."""
    torch.manual_seed(0)
    inputs = (torch.randn(1, 64, 64), *(torch.randn(64, 64) / 8 for _ in range(3)))
    torch._dynamo.reset()
    model = torch.compile(attend, backend="npu_cp", options={"overlap": overlap})
    path = Path(folder, f"rank{rank}_{overlap}.json")
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), attend(*inputs))  # compiled, and right
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            model(*inputs)  # a profiler's first step is slow
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(*inputs)
    profiler.export_chrome_trace(str(path))
    return path.read_text()


def events(trace: str) -> Events:
    """Complete events in the order in which they began; times in microseconds."""
    return sorted((e for e in json.loads(trace)["traceEvents"] if e.get("ph") == "X"), key=lambda e: e["ts"])


def named(found: Events, part: str) -> Events:
    return [e for e in found if part in e["name"]]


def under_way(found: Events) -> Events:
    """What began after the first all-gather was launched and before its rows were waited for, in the same thread."""
    launch, wait = (named(found, f"_c10d_functional::{op}")[0] for op in ("all_gather_into_tensor", "wait_tensor"))
    start, end = launch["ts"] + launch["dur"], wait["ts"]
    return [e for e in found if start <= e["ts"] < end and e["tid"] == launch["tid"]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Events]]:
    """Overlap or not -> events by rank."""
    by_rank = on_ranks(2, profiles, str(tmp_path_factory.mktemp("traces")))
    return {overlap: [events(traces[overlap]) for traces in by_rank] for overlap in (True, False)}


@pytest.mark.parametrize("rank", [0, 1])
def test_queries_are_computed_between_launch_and_wait(traces: dict[bool, list[Events]], rank: int) -> None:
    assert [e["name"] for e in named(under_way(traces[True][rank]), "aten::mm")] == ["aten::mm"]


@pytest.mark.parametrize("rank", [0, 1])
def test_without_overlap_the_wait_follows_at_once(traces: dict[bool, list[Events]], rank: int) -> None:
    """Control: the same step, as it is written."""
    found = traces[False][rank]
    assert len(named(found, "aten::mm")) == len(named(traces[True][rank], "aten::mm"))
    assert named(under_way(found), "aten::mm") == []


def test_the_collective_is_running_meanwhile(traces: dict[bool, list[Events]]) -> None:
    """Rank 0 has its queries long before rank 1 has sent anything."""
    found = traces[True][0]
    collective = named(found, "gloo:all_gather")[0]
    (product,) = named(under_way(found), "aten::mm")
    assert collective["dur"] > LATE / 2 * 1e6
    assert product["ts"] + product["dur"] <= collective["ts"] + collective["dur"]  # gloo's thread may take it up late


@pytest.mark.parametrize("rank", [0, 1])
def test_halves_have_their_names(traces: dict[bool, list[Events]], rank: int) -> None:
    halves = [e["name"] for e in named(traces[True][rank], "cppass half")]
    assert halves == [f"cppass half 0: 16 rows from {16 * rank} on", f"cppass half 1: 16 rows from {48 - 16 * rank} on"]
