"""Running a host kernel: its outputs must have the shapes and dtypes of torch_npu's own meta function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map


def run(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The op's result, after comparing it with the same call on fake tensors, and checking that no input changed."""
    before = [t.clone() for t in tensors((args, kwargs))]
    result = op(*args, **kwargs)
    for old, new in zip(before, tensors((args, kwargs)), strict=True):
        assert torch.equal(old, new), f"{op} changed an input"
    mode = FakeTensorMode()
    fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
    with mode:
        promised = op(*fake[0], **fake[1])
    got, wanted = tensors(result), tensors(promised)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in wanted], op
    return result


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within a rounding of got's dtype of a formula computed in float64."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[got.dtype]
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2 * tolerance, atol=tolerance)
