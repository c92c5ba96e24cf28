"""A paged key/value cache of one layer, as buffers of the module that uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PagedCache"]


class PagedCache(nn.Module):
    """k and v [blocks, block_size, H, D]: token row ``slot`` lies in block slot // block_size."""

    k: Tensor
    v: Tensor

    def __init__(self, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (blocks, block_size, heads, head_dim)
        self.register_buffer("k", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype), persistent=False)

    def write(self, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
        """In place, one row per slot."""
        for cache, rows in ((self.k, k_THD), (self.v, v_THD)):
            torch.ops.npu.npu_scatter_nd_update_(cache.view(-1, *cache.shape[2:]), slots_T.view(-1, 1), rows)

    def pages(self) -> tuple[Tensor, Tensor]:
        """k and v as attention reads them: [blocks, block_size, H * D]."""
        return self.k.flatten(2), self.v.flatten(2)

    def clear(self) -> None:
        self.k.zero_()
        self.v.zero_()
