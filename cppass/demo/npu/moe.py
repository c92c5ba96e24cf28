"""Qwen3-MoE for Ascend's graph mode. T tokens, K experts per token, E experts, F hidden size, W expert width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.layers import linear
from cppass.demo.presets import Preset

__all__ = ["Experts", "Qwen3Moe"]


class Experts(nn.Module):
    """Softmax routing to K of E experts: rows sorted by expert, two grouped matmuls, weighted sum.

    Routing weights are those of the chosen experts, normalised to sum to one (as in Qwen3-MoE).
    """

    def __init__(self, preset: Preset, dtype: torch.dtype) -> None:
        super().__init__()
        E, F, W = preset.experts, preset.hidden, preset.expert_width
        self.experts, self.top_k = E, preset.experts_per_token
        self.gate = linear(F, E, dtype)
        self.gate_up = nn.Parameter(torch.randn(E, F, 2 * W).div(F**0.5).to(dtype))
        self.down = nn.Parameter(torch.randn(E, W, F).div(W**0.5).to(dtype))

    def forward(self, x_TF: Tensor) -> Tensor:
        weights_TK, experts_TK, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(self.gate(x_TF), None, self.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        rows, places, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
            x_TF, experts_TK, active_num=x_TF.shape[0] * self.top_k, expert_num=self.experts, expert_tokens_num_type=1,
            expert_tokens_num_flag=True, active_expert_range=[0, self.experts], quant_mode=-1,
        )  # fmt: skip
        rows = torch.ops.npu.npu_swiglu(_grouped_matmul(rows, self.gate_up, counts))
        rows = _grouped_matmul(rows, self.down, counts)
        return torch.ops.npu.npu_moe_finalize_routing(  # type: ignore[no-any-return]
            rows, None, None, None, weights_TK, places, None, drop_pad_mode=2
        )


def _grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.ops.npu.npu_grouped_matmul(  # type: ignore[no-any-return]
        [rows], [weight], group_list=counts, group_list_type=1, group_type=0, split_item=3
    )[0]


class Qwen3Moe(Qwen3):
    """Prefill attends to its fresh keys and writes the cache after; decode and chunks write first and read pages.

    Args: as ``dense.Qwen3``; the preset must have experts.

    Raises:
        CPError: CP055, torch_npu cannot be imported.
    """

    fresh_prefill = True

    @staticmethod
    def mlp(preset: Preset, dtype: torch.dtype) -> nn.Module:
        return Experts(preset, dtype)
