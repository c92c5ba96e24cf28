"""What a random program takes: made by shape and kind in its first run, and handed in after that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Inputs:
    """Hands a program its inputs in the order in which it asks for them.

    Args:
        given: the inputs; None makes them, and `made` has them as they were before the program wrote to them.
        dtype: of the float tensors that are made.
    """

    def __init__(self, given: Sequence[Tensor] | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self._given = None if given is None else iter(given)
        self.made: list[Tensor] = []

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._next(lambda g: torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype) * scale)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self.normal(rows, columns, scale=rows**-0.5)

    def integers(self, high: int, *shape: int) -> Tensor:
        return self._next(lambda g: torch.randint(0, high, shape, generator=g))

    def order(self, n: int) -> Tensor:
        """A permutation of n numbers."""
        return self._next(lambda g: torch.randperm(n, generator=g))

    def flags(self, *shape: int) -> Tensor:
        """Two in three are True."""
        return self._next(lambda g: torch.rand(shape, generator=g) < 0.67)

    def number(self, value: int) -> Tensor:
        return self._next(lambda g: torch.tensor(value))

    def _next(self, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        if self._given is not None:
            return next(self._given)
        tensor = make(torch.Generator().manual_seed(len(self.made)))
        self.made.append(tensor.clone())
        return tensor
