"""The NPU-style demo models against plain torch with the same weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cppass  # isort: skip  before torch_npu: it makes that importable
import pytest
import torch
import torch_npu  # noqa: F401  registers the ops
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import lowering.cann_host.kernels  # noqa: F401  registers their CPU kernels
from cppass.demo.npu import load_npu_ops
from cppass.demo.npu.dense import Decoder, Qwen3
from cppass.demo.npu.forward_metadata import causal_mask, plan_step
from cppass.demo.npu.moe import Qwen3Moe
from cppass.demo.npu.reference import last_logits
from cppass.demo.presets import PRESETS

BLOCKS, BLOCK_SIZE, CAPACITY = 12, 128, 256
MODELS: dict[str, Callable[[Any], Decoder]] = {
    "dense v1": lambda options: Qwen3(PRESETS["qwen3-tiny"], op="v1", **options),
    "dense v2": lambda options: Qwen3(PRESETS["qwen3-tiny"], op="v2", **options),
    "moe v1": lambda options: Qwen3Moe(PRESETS["qwen3-moe-tiny"], op="v1", **options),
    "moe v2": lambda options: Qwen3Moe(PRESETS["qwen3-moe-tiny"], op="v2", **options),
}
EACH = pytest.mark.parametrize("name", MODELS)
MASK = causal_mask()


def build(name: str, layers: int | None = None) -> Decoder:
    torch.manual_seed(0)
    model = MODELS[name]({"blocks": BLOCKS, "block_size": BLOCK_SIZE, "positions": 512, "layers": layers})
    for module in model.modules():  # norms that do something
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and module.weight.dim() == 1:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.requires_grad_(False)


def token_ids(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 512, (n,), generator=generator) for n in lengths]


def step(
    model: Callable[..., torch.Tensor],
    sequences: list[torch.Tensor],
    prefixes: list[int],
    lengths: list[int],
    padded_to: int | None = None,
) -> torch.Tensor:
    plan = plan_step(
        lengths,
        prefixes,
        block_size=BLOCK_SIZE,
        blocks=BLOCKS,
        capacity=CAPACITY,
        shuffle=7,
        padded_to=padded_to,
        mask=MASK,
    )
    new = torch.cat([s[p : p + n] for s, p, n in zip(sequences, prefixes, lengths, strict=True)])
    if padded_to is not None:
        new = torch.cat([new, new.new_zeros(padded_to - new.numel())])
    return model(new, plan.position_ids, plan.metadata)


def check(model: Decoder, got: torch.Tensor, sequences: list[torch.Tensor]) -> None:
    torch.testing.assert_close(got, last_logits(model, sequences), rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize("lengths", [[9], [150], [13, 1, 140]])
def test_prefill(name: str, lengths: list[int]) -> None:
    model, sequences = build(name), token_ids(*lengths)
    check(model, step(model, sequences, [0] * len(lengths), lengths), sequences)


@EACH
def test_chunks_then_decode(name: str) -> None:
    model, sequences = build(name), token_ids(160, 30)
    step(model, sequences, [0, 0], [120, 7])
    check(model, step(model, sequences, [120, 7], [37, 20]), [sequences[0][:157], sequences[1][:27]])
    for i in range(3):
        got = step(model, sequences, [157 + i, 27 + i], [1, 1])
        check(model, got, [sequences[0][: 158 + i], sequences[1][: 28 + i]])


@EACH
def test_padded_rows_change_nothing(name: str) -> None:
    model, sequences = build(name), token_ids(13, 5)
    check(model, step(model, sequences, [0, 0], [13, 5], padded_to=24), sequences)


class OpsOfGraphs:
    """A torch.compile backend that runs AOT graphs as they are and keeps the names of their npu ops."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []
        self.backend = aot_autograd(fw_compiler=self._keep)

    def _keep(self, gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        targets = [node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        self.graphs.append([t._schema.name.removeprefix("npu::") for t in targets if t.namespace == "npu"])
        return make_boxed_func(gm.forward)


@pytest.mark.parametrize("name", ["dense v1", "moe v2"])
def test_compiles_with_static_shapes(name: str) -> None:
    torch._dynamo.reset()
    model, seen, sequences = build(name, layers=1), OpsOfGraphs(), token_ids(22, 13)
    compiled = torch.compile(model, backend=seen.backend, fullgraph=True, dynamic=False)
    check(model, step(compiled, sequences, [0, 0], [21, 12]), [s[:-1] for s in sequences])
    check(model, step(compiled, sequences, [21, 12], [1, 1]), sequences)
    assert len(seen.graphs) == 2


def test_dense_compiles_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    model, seen = build("dense v2", layers=1), OpsOfGraphs()
    compiled = torch.compile(model, backend=seen.backend, fullgraph=True, dynamic=True)
    for lengths in ([21, 12], [50, 17], [17, 50]):
        sequences = token_ids(*lengths)
        check(model, step(compiled, sequences, [0, 0], lengths), sequences)
    assert [op for op in seen.graphs[0] if "scatter" in op or "attention" in op] == [
        "npu_scatter_nd_update", "npu_scatter_nd_update", "npu_fused_infer_attention_score_v2"
    ]  # fmt: skip
    assert len(seen.graphs) == 1


def test_moe_compiles_once_per_number_of_tokens() -> None:
    """``active_num`` is a plain int of the routing op."""
    torch._dynamo.reset()
    model, seen = build("moe v2", layers=1), OpsOfGraphs()
    compiled = torch.compile(model, backend=seen.backend, fullgraph=True, dynamic=True)
    for lengths in ([21, 12], [50, 17], [17, 50]):
        sequences = token_ids(*lengths)
        check(model, step(compiled, sequences, [0, 0], lengths), sequences)
    assert [op for op in seen.graphs[0] if "scatter" in op or "attention" in op] == [
        "npu_fused_infer_attention_score_v2", "npu_scatter_nd_update", "npu_scatter_nd_update"
    ]  # fmt: skip
    assert len(seen.graphs) == 2


@pytest.mark.parametrize("name", ["dense v1", "moe v2"])
def test_compiles_with_the_eager_backend(name: str) -> None:
    torch._dynamo.reset()
    model, sequences = build(name, layers=1), token_ids(21, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check(model, step(compiled, sequences, [0, 0], [21, 12]), sequences)


def test_a_plan() -> None:
    plan = plan_step([3, 2], [4, 0], block_size=4, mask=MASK)
    m = plan.metadata
    assert plan.position_ids.tolist() == [4, 5, 6, 0, 1]
    assert (m.cu_q, m.kv_lens, m.cu_kv, m.cu_q_tensor.tolist()) == ([3, 5], [7, 2], [3, 5], [3, 5])
    assert m.block_table.tolist() == [[0, 1], [2, 0]]
    assert m.slot_mapping.tolist() == [4, 5, 6, 8, 9]
    assert (m.is_prefill, m.on_prefix, m.prompt_tokens) == (True, True, None)


def test_a_shuffled_plan_owns_the_same_blocks_at_every_step() -> None:
    options: dict[str, Any] = {"block_size": 4, "blocks": 8, "capacity": 16, "shuffle": 3, "mask": MASK}
    first, last = plan_step([16, 16], **options).metadata, plan_step([1, 1], [3, 14], **options).metadata
    table = first.block_table
    assert sorted(table.flatten().tolist()) == list(range(8)) and table.flatten().tolist() != list(range(8))
    assert torch.equal(last.block_table[1], table[1])
    assert last.block_table[0].tolist() == [int(table[0, 0]), 0, 0, 0]
    assert last.slot_mapping.tolist() == [int(first.slot_mapping[3]), int(first.slot_mapping[16 + 14])]


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([], {}),
        ([0], {}),
        ([3], {"prefixes": [1, 2]}),
        ([3], {"prefixes": [-1]}),
        ([9], {"blocks": 2}),
        ([9], {"padded_to": 8}),
    ],
)
def test_plans_that_do_not_fit(lengths: list[int], options: dict[str, Any]) -> None:
    with pytest.raises(cppass.OptionError, match="CP050"):
        plan_step(lengths, block_size=4, mask=MASK, **options)


def test_importing_the_package_imports_no_torch_npu() -> None:
    code = "import sys, cppass.demo.npu.moe, cppass.demo.npu.reference; print('torch_npu' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    assert out == "False\n"


def test_without_torch_npu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(cppass.CPError, match=r"CP055.*\n.*cppass\[npu-host\]"):
        load_npu_ops()
