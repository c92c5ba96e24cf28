"""What ranks compare by value: which inputs, and what a hash tells apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import cppass  # noqa: F401
from cppass import contents, torch_private
from cppass.contents import Contents, contents_of, differing


def found_in(model: nn.Module, *inputs: Tensor) -> Contents:
    """As the backend sees them: of the AOT graph, by Dynamo's names."""
    seen: list[Contents] = []

    def backend(gm: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        names = torch_private.dynamo_inputs(gm)

        def inner(aot: torch.fx.GraphModule, _: object) -> Callable[..., object]:
            seen.append(contents_of(aot, torch_private.aot_inputs(aot.graph, names)))
            return aot.forward

        return aot_autograd(fw_compiler=inner, keep_inference_input_mutations=True)(gm, examples)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return seen[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("cache", torch.zeros(8, 4))

    def forward(self, ids: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        y = self.inner(x) * self.scale * mask
        self.cache.index_copy_(0, ids, y)  # type: ignore[operator]
        return y


def test_which_inputs() -> None:
    """Not hidden states, which rounding may tell apart, and not a cache, whose free rows are anything."""
    found = found_in(Model(), torch.arange(3), torch.ones(3, 4), torch.ones(3, 1, dtype=torch.bool))
    assert set(found.weights.values()) == {"inner.weight", "inner.bias", "scale"}
    assert set(found.ids.values()) == {"ids", "mask"}


def hashed(x: Tensor, weight: bool) -> dict[str, dict[str, str]]:
    named = {0: "x"}
    return Contents({} if weight else named, named if weight else {}).hashes([x], True, True)


IDS = torch.arange(40).view(4, 10)


@pytest.mark.parametrize(
    "other", [IDS + 1, IDS.flip(0), IDS.view(40), IDS.index_fill(1, torch.tensor([7]), 3)], ids=str
)
def test_ids_that_differ(other: Tensor) -> None:
    assert differing(hashed(IDS, False), hashed(other, False)) == ("ids", ["x"])


DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (5000,), (100, 300), (20, 10, 30)], ids=str)
def test_weights_of_any_kind(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(20).to(dtype)
    assert hashed(x, True) == hashed(x.clone(), True)
    assert differing(hashed(x, True), hashed((x.float() + 1).to(dtype), True)) == ("weights", ["x"])


def test_rows_out_of_place() -> None:
    x = torch.randn(100, 300)
    assert hashed(x.t(), True) == hashed(x.t().contiguous(), True)
    assert hashed(x, True) != hashed(x.flip(0), True)


def test_a_mask_of_every_pair_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "LONGEST", 100)
    monkeypatch.setattr(torch, "arange", None)  # as long as the mask, eight bytes each
    mask = torch.ones(64, 64, dtype=torch.bool)
    assert hashed(mask, False) != hashed(mask.tril(), False)
