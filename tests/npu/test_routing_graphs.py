"""Experts by routing version 1, as published models write them: each rank routes its own rows, nothing is gathered."""

from __future__ import annotations

import pytest
import torch
from npu.fused_snippets import MASK, npu, rand
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import cppass

S, H, G, D, F, E, K = 32, 4, 2, 16, 64, 8, 2


def experts(x_BSF: Tensor, gate: Tensor, up: Tensor, down: Tensor, cast: bool) -> Tensor:
    """Counts come as int32; npu_grouped_matmul takes int64."""
    x = x_BSF.view(-1, F)
    weights, chosen, rows = npu.npu_moe_gating_top_k_softmax(x @ gate, None, K)
    sorted_x, places, owners = npu.npu_moe_init_routing(x, rows, chosen, x.shape[0])
    counts = npu.npu_moe_compute_expert_tokens(owners, E)
    counts = counts.to(torch.int64) if cast else counts
    options = {"group_list": counts, "group_type": 0, "group_list_type": 0, "split_item": 3}
    hidden = npu.npu_swiglu(npu.npu_grouped_matmul([sorted_x], [up], **options)[0])
    y = npu.npu_grouped_matmul([hidden], [down], **options)[0]
    return npu.npu_moe_finalize_routing(y, None, None, None, weights, places, chosen).view(x_BSF.shape)


def layer(
    mask: Tensor, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    out = npu.npu_fused_infer_attention_score(
        x @ wq, x @ wk, x @ wv, num_heads=H, num_key_value_heads=G, input_layout="BSH", atten_mask=mask,
        sparse_mode=3, scale=D**-0.5,
    )[0]  # fmt: skip
    return experts(out, gate, up, down, cast=True)


def inputs(batch: int) -> tuple[Tensor, ...]:
    weights = [(F, H * D), (F, G * D), (F, G * D), (F, E), (E, F, 2 * F), (E, F, F)]
    return (MASK, rand(batch, S, F), *(rand(*shape) / 8 for shape in weights))


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_ranks_equal_one_device(batch: int, cp_size: int) -> None:
    given = inputs(batch)
    expected = layer(*given)
    for out, _ in cppass.simulate(layer, given, cp_size):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_but_keys_values_and_the_output_travels(batch: int) -> None:
    given = inputs(batch)
    with torch.no_grad():
        gm = make_fx(layer, tracing_mode="fake")(*given)
    report = cppass.run_pass(gm, given, cp_size=2, lower=False)
    assert (report.status, report.collectives, report.notes) == ("rewritten", 2, ())


def test_counts_of_one_rank_do_not_get_out() -> None:
    """Negative control: tokens per expert, as an output, are counted over whole rows."""

    def counted(mask: Tensor, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, gate: Tensor) -> Tensor:
        out = npu.npu_fused_infer_attention_score(
            x @ wq, x @ wk, x @ wv, num_heads=H, num_key_value_heads=G, input_layout="BSH", atten_mask=mask,
            sparse_mode=3, scale=D**-0.5,
        )[0].view(-1, F)  # fmt: skip
        _, chosen, rows = npu.npu_moe_gating_top_k_softmax(out @ gate, None, K)
        _, _, owners = npu.npu_moe_init_routing(out, rows, chosen, out.shape[0])
        return npu.npu_moe_compute_expert_tokens(owners, E).to(torch.int64)

    given = inputs(1)[:6]
    for out, _ in cppass.simulate(counted, given, 2):
        assert torch.equal(out, counted(*given))
