"""Nodes that the pass makes say where they come from: the user's line and module, so that tools can point there."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core import toy_transformer as toy
from torch import fx
from torch._dynamo.backends.common import aot_autograd

import cppass
from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.forward_metadata import plan_step
from cppass.demo.presets import PRESETS
from cppass.match import find_sites
from cppass.prepare import prepare
from cppass.rules import name_of

COPY = torch.ops.aten.copy_.default
Place = tuple[str, str]  # stack trace and modules


def compiled(model: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[list[Place], set[Place], fx.Graph]:
    """Where the sites are in the graph that AOT hands over, and all its nodes; and what rank 0 of two would run."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        def inner(aot: fx.GraphModule, given: Any) -> Any:
            copied = fx.GraphModule(aot, fx.Graph())
            copied.graph.output(copied.graph.graph_copy(aot.graph, {}))
            found.append([place(site.node) for site in find_sites(prepare(aot)).sites])
            found.append({place(n) for n in aot.graph.nodes if n.op == "call_function"})
            assert cppass.run_pass(copied, given, cp_size=2, rank=0).status == "rewritten"
            found.append(copied.graph)
            return aot.forward

        return aot_autograd(fw_compiler=inner, keep_inference_input_mutations=True)(gm, example_inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    sites, places, graph = found
    return sites, places, graph


def place(node: fx.Node) -> Place:
    return str(node.meta.get("stack_trace")), str(node.meta.get("nn_module_stack"))


def made_at(graph: fx.Graph, where: Place) -> collections.Counter[str]:
    return collections.Counter(name_of(n).split("::")[-1] for n in graph.nodes if place(n) == where)


def npu_model() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    torch.manual_seed(0)
    model = Qwen3(PRESETS["qwen3-tiny"], blocks=8).requires_grad_(False)
    step = plan_step([40, 24], block_size=128, blocks=8, capacity=256)
    return model, (torch.zeros(64, dtype=torch.int64), step.position_ids, step.metadata)


MODELS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "host": lambda: (toy.Toy(), toy.inputs(16)),
    "npu": npu_model,
}
MADE = {
    "host": {"pack": 1, "all_gather_into_tensor": 1, "wait_tensor": 1, "attention": 1},
    "npu": {"all_gather_into_tensor": 1, "wait_tensor": 1, "npu_fused_infer_attention_score_v2": 2},
}
"""Target -> what every site becomes."""


@pytest.mark.parametrize("target", ["host", "npu"])
def test_what_is_made_for_a_site_has_its_place(target: str) -> None:
    sites, _, graph = compiled(*MODELS[target]())
    assert len(sites) == len(set(sites)) == 2
    for stack, modules in sites:
        assert "attention" in stack
        assert "layers" in modules
        seen = made_at(graph, (stack, modules))
        assert {op: seen[op] for op in MADE[target]} == MADE[target]
    everywhere = collections.Counter(name_of(n).split("::")[-1] for n in graph.nodes)
    for op, count in MADE[target].items():
        others = 1 if op in ("all_gather_into_tensor", "wait_tensor") else 0  # the last rows, at the end of the model
        assert everywhere[op] == len(sites) * count + others


@pytest.mark.parametrize("target", ["host", "npu"])
def test_no_node_comes_from_nowhere(target: str) -> None:
    """Every place is one of the graph before, stack and modules together; cache epilogues of AOT have none."""
    _, places, graph = compiled(*MODELS[target]())
    nodes = [n for n in graph.nodes if n.op in ("call_function", "get_attr") and n.target is not COPY]
    assert [n.name for n in nodes if not n.stack_trace] == []
    assert {place(n) for n in nodes} <= places


def test_ops_keep_their_names() -> None:
    """The rewritten graph can be read beside the one before it."""
    gm = toy.traced(16)
    before = {n.name: n.target for n in prepare(gm).nodes if name_of(n).startswith("aten::mm")}
    cppass.run_pass(gm, toy.inputs(16), cp_size=2, lower=False)
    after = {n.name: n.target for n in gm.graph.nodes if name_of(n).startswith("aten::mm")}
    assert before == after
