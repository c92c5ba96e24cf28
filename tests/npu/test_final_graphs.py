"""What the compilers make of a rewritten graph: the last graph before an NPU would run it. Two layers, P = 2."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from npu.fused_snippets import WRITES, paged, traced
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode

import cppass
from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.forward_metadata import plan_step
from cppass.demo.npu.moe import Qwen3Moe
from cppass.demo.presets import PRESETS
from lowering.npu.compilers import compile_with, register_writes

MODELS = {"dense": (Qwen3, "qwen3-tiny"), "moe": (Qwen3Moe, "qwen3-moe-tiny")}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def group() -> Iterator[None]:
    """A group of two of which this process is one; its collectives do not communicate."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def compiled(kind: str, lengths: list[int], compile_graph: Callable[[Any, Any], Any], dynamic: bool = False) -> None:
    """Compile the model up to the inner compiler, for rank 0 of 2."""
    model_type, preset = MODELS[kind]
    torch.manual_seed(0)
    model = model_type(PRESETS[preset], blocks=8).requires_grad_(False)

    def backend(gm: Any, example_inputs: Any) -> Any:
        def inner(aot_gm: Any, aot_inputs: Any) -> Any:
            run = aot_gm.forward
            copied = torch.fx.GraphModule(aot_gm, torch.fx.Graph())
            copied.graph.output(copied.graph.graph_copy(aot_gm.graph, {}))
            compile_graph(copied, aot_inputs)
            return run

        return aot_autograd(fw_compiler=inner, keep_inference_input_mutations=True)(gm, example_inputs)

    step = plan_step(lengths, block_size=128, blocks=8, capacity=256)
    torch._dynamo.reset()
    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    torch.compile(model, backend=backend, dynamic=dynamic)(ids, step.position_ids, step.metadata)


@pytest.mark.parametrize(("kind", "lengths"), [("dense", [40, 24]), ("dense", [41, 7]), ("moe", [40, 24])])
def test_npugraph_ex_writes_caches_in_place(kind: str, lengths: list[int]) -> None:
    counts: collections.Counter[str] = collections.Counter()

    def compile_graph(gm: Any, inputs: Any) -> None:
        assert cppass.run_pass(gm, inputs, cp_size=2, rank=0).status == "rewritten"
        final = compile_with(gm, inputs, "npugraph_ex").runner.fx_graph  # type: ignore[attr-defined]
        counts.update(str(node.target) for node in final.graph.nodes)

    compiled(kind, lengths, compile_graph)
    assert counts["npu.npu_scatter_nd_update_.default"] == 4  # K and V of two layers
    assert counts["aten.copy_.default"] == counts["npu.npu_scatter_nd_update.default"] == 0
    assert counts["npu.npu_fused_infer_attention_score_v2.out"] == 4
    assert counts["_c10d_functional.all_gather_into_tensor.default"] == 3  # a layer's K and V; the last rows


def test_npugraph_ex_knows_the_paged_write() -> None:
    """npu_scatter_pa_kv_cache_functional is not among the ops it turns back by itself."""
    register_writes()
    known = importlib.import_module("npugraph_ex._acl_concrete_graph.graph_pass").inplaceable_npu_ops
    op = known[torch.ops.npu.npu_scatter_pa_kv_cache_functional.default]
    assert op.inplace_op is torch.ops.npu.npu_scatter_pa_kv_cache.default


def test_npugraph_ex_writes_pages_in_place() -> None:
    snippet = paged([16, 8], write=WRITES["scatter_pa"])
    snippet = dataclasses.replace(snippet, run=lambda *inputs, run=snippet.run: (run(*inputs),))
    gm = traced(snippet)
    cppass.run_pass(gm, snippet.inputs, cp_size=2)
    fakes = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    with detect_fake_mode(fakes) or torch.no_grad():
        final = compile_with(gm, fakes, "npugraph_ex").runner.fx_graph  # type: ignore[attr-defined]
    ops = [str(node.target) for node in final.graph.nodes]
    assert ops.count("npu.npu_scatter_pa_kv_cache.default") == 1
    assert "aten.copy_.default" not in ops


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_torchair_converts_to_one_gather_and_two_attentions_a_layer(kind: str, dynamic: bool, group: None) -> None:
    if kind == "moe" and dynamic:
        pytest.skip("the token count is part of the model's routing: it compiles per count")
    compile_with_torchair = importlib.import_module("lowering.npu.compilers").compile_with
    counts: collections.Counter[str] = collections.Counter()

    def compile_graph(gm: Any, inputs: Any) -> None:
        name = torch.distributed.group.WORLD.group_name  # type: ignore[union-attr]
        assert cppass.run_pass(gm, inputs, cp_size=2, rank=0, group=name).status == "rewritten"
        with _ge_ops(counts):
            compile_with_torchair(gm, inputs, "torchair")

    compiled(kind, [40, 24], compile_graph, dynamic)
    assert counts["FusedInferAttentionScore"] == 4
    assert counts["HcomAllGather"] == 3
    assert counts["ScatterNdUpdate"] == 4


class _ge_ops:  # noqa: N801
    """Count the ops of the GE graphs that are made in this block."""

    def __init__(self, counts: collections.Counter[str]) -> None:
        importlib.import_module("lowering.npu.compilers")._imported("torch_npu", "torchair")
        self.counts = counts
        self.owner = importlib.import_module("torchair._ge_concrete_graph.fx2ge_converter").GeConcreteGraph

    def __enter__(self) -> None:
        original = self.original = self.owner.optimize_graph_without_runtime
        counts = self.counts

        def optimize(graph: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(graph, *args, **kwargs)
            counts.update(op.type for op in graph.graph.op)
            return result

        self.owner.optimize_graph_without_runtime = optimize

    def __exit__(self, *error: Any) -> None:
        self.owner.optimize_graph_without_runtime = self.original


def test_caches_of_compiled_models_tell_hooks_apart() -> None:
    """torchair's cache_compile looks at the hook's code: another option, rank or group is another hook."""
    digest = importlib.import_module("torchair.inference._cache_compiler")._get_code_digest
    hooks = [{"cp_size": 2}, {"cp_size": 4}, {"cp_size": 2, "rank": 1}, {"cp_size": 2, "strict": True}]
    digests = [digest(cppass.npu_pass(**given)) for given in hooks]  # type: ignore[arg-type]
    assert len(set(digests)) == len(hooks)
    assert digest(cppass.npu_pass(cp_size=2)) == digests[0]
