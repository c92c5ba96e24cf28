"""One attention layer of local rows as a traced graph, for tests that look at what the pass does with it.

Shape suffixes: T rows of the step, m local rows, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
from runner.batches import Batch, batch_of
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.demo.npu.attention import fused_attention
from cppass.demo.npu.forward_metadata import causal_mask
from cppass.runner import StepPlan

CP, BLOCK, F, HEADS, GROUPS, D = 2, 128, 32, 4, 2, 16
NAMED = {"arg0_1": 0}  # what make_fx calls the first argument, where there are variable ones


@dataclasses.dataclass(frozen=True)
class Layer:
    """Tensors of one layer in the order in which runs take them, after the rows."""

    wq: Tensor
    wk: Tensor
    wv: Tensor
    kc: Tensor
    vc: Tensor
    slots: Tensor
    table: Tensor
    mask: Tensor
    last: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


BATCH: Batch = batch_of([13, 50, 1], [0, 20, 130], BLOCK)
PLAN: StepPlan = BATCH.plan(CP)
UNEVEN = batch_of([13, 45, 1], [0, 20, 130], BLOCK)  # 59 tokens: padding on every rank but one


def layer_of(batch: Batch, plan: StepPlan | None) -> Layer:
    """Weights, caches and what the step says: of one device where there is no plan."""
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(F, n * D, generator=random) / F**0.5 for n in (HEADS, GROUPS, GROUPS)]
    caches = [torch.randn(batch.pages, BLOCK, GROUPS, D, generator=random) for _ in range(2)]
    step = plan or batch.plan(1)
    slots = step.slot_mapping if plan is None else plan.slot_mapping.masked_fill(plan.slot_mapping < 0, batch.pad_slot)
    return Layer(*weights, *caches, slots, step.block_table, causal_mask(), step.cu_q_tensor)


def rows_of(batch: Batch) -> Tensor:
    return torch.randn(batch.tokens, F, generator=torch.Generator().manual_seed(1))


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """The cache that attention reads: here it is written in place."""
    torch.ops.npu.npu_scatter_nd_update_(cache.view(-1, *rows.shape[1:]), slots.view(-1, 1), rows)
    return cache


Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(
    x: Tensor,
    layer: Layer,
    plan: StepPlan = PLAN,
    *,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    write: Write = write_rows,
    cu_q: list[int] | None = None,
    packed: bool = False,
    kv_lens: list[int] | None = None,
) -> Tensor:
    """Attention [m, HEADS * D] over pages, or with `packed` over this step's keys.

    Args:
        queries, keys: what they are made of; x if left out.
    """
    q = ((x if queries is None else queries) @ layer.wq).view(-1, HEADS, D)
    k, v = ((x if keys is None else keys) @ w for w in (layer.wk, layer.wv))
    k, v = k.view(-1, GROUPS, D), v.view(-1, GROUPS, D)
    pages = [write(cache, layer.slots, rows) for cache, rows in ((layer.kc, k), (layer.vc, v))]
    lengths = plan.cu_q if cu_q is None else cu_q
    options: dict[str, Any] = {"mask": layer.mask, "heads": HEADS, "kv_heads": GROUPS}
    if packed:
        out = fused_attention("v2", q, k, v, lengths, kv_lens or lengths, **options, block_table=None, block_size=0)
    else:
        options |= {"block_table": layer.table, "block_size": BLOCK}
        out = fused_attention("v2", q, *(x.flatten(2) for x in pages), lengths, plan.kv_lens, **options)
    return out.flatten(1)


def layer_run(x: Tensor, *tensors: Tensor) -> Tensor:
    """The layer and the last row of each sequence: what is rewritten."""
    layer = Layer(*tensors)
    return attend(x, layer).index_select(0, layer.last - 1)


def traced(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(run, tracing_mode="fake")(*inputs)


def refusal(
    run: Callable[..., Any], inputs: tuple[Tensor, ...], named: dict[str, int] | None = None, **options: Any
) -> cppass.RefusedError:
    """The error; the graph must be as it was."""
    gm = traced(run, inputs)
    before = str(gm.graph)
    with pytest.raises(cppass.RefusedError) as caught:
        cppass.run_pass(gm, inputs, cp_size=CP, inputs="sharded", sharded_inputs=named or NAMED, **options)
    assert str(gm.graph) == before
    assert "way out: " in str(caught.value)
    return caught.value
