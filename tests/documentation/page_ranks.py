"""Pages whose blocks are programs of several ranks, run on two real ones. Runs in spawned processes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from documentation.code_blocks import ROOT, Outcome, run_page

import cppass

RANKS = 2
PageResult = tuple[dict[int, Outcome], list[str]]  # outcomes by line; statuses of the graphs that were compiled


def of_transformers() -> dict[str, Any]:
    return {"input_ids": torch.arange(300)[None] % 128}


def of_npu_ops() -> dict[str, Any]:
    """A model of torch_npu's ops, and a step of two prompts."""
    from cppass.demo.npu.dense import Qwen3
    from cppass.demo.npu.forward_metadata import plan_step
    from cppass.demo.presets import PRESETS

    torch.manual_seed(0)
    model = Qwen3(PRESETS["qwen3-tiny"], blocks=8).requires_grad_(False)
    step = plan_step([61, 40], block_size=128, blocks=8)
    ids = torch.arange(101)
    return {"model": model, "ids": ids, "positions": step.position_ids, "metadata": step.metadata, "my_pass": len}


def of_a_runner() -> dict[str, Any]:
    """What a runner has: a mesh, a model, and the tokens of the step that the page plans."""
    from cppass.demo.npu.forward_metadata import causal_mask, metadata_of

    mask = causal_mask()
    return of_npu_ops() | {
        "mesh": dist.init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",)),
        "rank": dist.get_rank(),
        "ids": torch.arange(15),
        "positions": torch.tensor([*range(5), 130, *range(9)]),
        "your_metadata": lambda plan: metadata_of(plan, mask),
    }


def of_one_process() -> dict[str, Any]:
    import qwen

    model = qwen.model("dense", "sdpa")
    return of_transformers() | {"cppass": cppass, "torch": torch, "model": model, "rank": 0}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": of_transformers,
    "docs/transformers.md": dict,
    "docs/npu.md": of_npu_ops,
    "docs/runner.md": of_a_runner,
    "docs/own-backend.md": of_npu_ops,
}
"""Pages that are run on ranks -> the names that their blocks take for granted."""

ALONE: dict[str, Callable[[], dict[str, Any]]] = dict.fromkeys(("docs/explain.md", "docs/logs.md"), of_one_process)
"""The same of pages that need no ranks; a page that is in neither table takes nothing for granted."""


def run_pages(rank: int, folder: str, ports: dict[str, int]) -> dict[str, PageResult]:
    """Every page in turn, each with the environment that torchrun gives a script and a group of its own."""
    os.chdir(folder)  # where path/to/Qwen3-0.6B is
    logging.disable(logging.WARNING)  # npugraph_ex and torchair say at length that they run eagerly
    found: dict[str, PageResult] = {}
    for page, port in ports.items():
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
        if "init_process_group(" not in (ROOT / page).read_text(encoding="utf-8"):
            dist.init_process_group("gloo")
        cppass.clear_reports()
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", cppass.CPWarning)
            outcomes = run_page(page, NAMES[page]())
        found[page] = outcomes, [report.status for report in cppass.reports()]
        if dist.is_initialized():
            dist.destroy_process_group()
    return found
