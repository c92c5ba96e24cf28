"""Layers that dense and mixture-of-experts Qwen3 share, on torch_npu's fused ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EPSILON", "ROPE_BASE", "AddRMSNorm", "MLP", "RMSNorm", "linear", "rope_tables"]

EPSILON = 1e-6
ROPE_BASE = 1_000_000.0


def linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=dtype)


def rope_tables(head_dim: int, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim] of rotary embeddings whose halves rotate together."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class RMSNorm(nn.Module):
    """x [.., width] -> x / rms(x) * weight."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.npu.npu_rms_norm(x, self.weight, EPSILON)[0]  # type: ignore[no-any-return]


class AddRMSNorm(RMSNorm):
    """(norm of x + residual, x + residual), both [T, width]."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, _, total = torch.ops.npu.npu_add_rms_norm(residual, x, self.weight, EPSILON)
        return y, total


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = linear(hidden, 2 * width, dtype)
        self.down_proj = linear(width, hidden, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.ops.npu.npu_swiglu(self.gate_up_proj(x)))  # type: ignore[no-any-return]
