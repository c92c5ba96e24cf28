"""A small model behind npu_cp with caches that are kept between steps, and faults put into its kernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from core import toy_transformer as toy
from torch import Tensor

import cppass  # noqa: F401
import lowering.host.ops as kernels


class Served:
    """A model with its caches: `step` feeds tokens and compares with one device, which keeps caches of its own."""

    def __init__(self, dynamic: bool = False, **options: Any) -> None:
        self.model = toy.Toy()
        self.compiled = torch.compile(self.model, backend="npu_cp", dynamic=dynamic, options=options)
        self.caches = [torch.zeros(toy.B, toy.H, toy.ROWS, toy.D) for _ in range(2 * toy.LAYERS)]
        self.filled = 0

    def step(self, tokens: int, shift: int = 0) -> float:
        """Largest error of logits and caches against one device; `shift` makes other token ids."""
        expected = copy.deepcopy(self.caches)
        ids = (torch.arange(tokens)[None] * 7 + shift) % toy.VOCABULARY
        at = torch.tensor(self.filled)
        with torch.no_grad():
            wanted = self.model(ids, at, *expected)
            got = self.compiled(ids, at, *self.caches)
        self.filled += tokens
        return max(difference(a, b) for a, b in zip([wanted, *expected], [got, *self.caches], strict=True))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@contextlib.contextmanager
def at_attention(number: int, fault: Callable[[], None]) -> Iterator[None]:
    """Have something happen in this process before the attention kernel's call of that number (0 is the next)."""
    real, calls = kernels.zigzag_attention, iter(range(1000))

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == number:
            fault()
        return real(*args, **kwargs)

    kernels.zigzag_attention = attention
    try:
        yield
    finally:
        kernels.zigzag_attention = real
