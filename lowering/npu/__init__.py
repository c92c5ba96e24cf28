"""Ascend NPU: one HCCL all-gather and two fused-infer-attention calls a site. `TARGET` is the entry point."""

from lowering.npu.target import TARGET

__all__ = ["TARGET"]
