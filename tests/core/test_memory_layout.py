"""How values lie in memory: dense where the model's were, so that views of outputs and ops that ask for it work.

Shape suffixes: B batch, S tokens, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from core.attention_forms import causal, rand
from torch import Tensor
from torch.nn.functional import group_norm

import cppass
from cppass import axes, registry, rewrite
from cppass.capture import trace

B, S, H, D = 2, 12, 2, 4
F = H * D
X = rand(B, S, F)


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    """An op whose kernel takes dense memory alone, as many kernels outside of torch do."""
    own = torch.library.Library("densetest", "DEF")  # type: ignore[no-untyped-call]

    def twice(x: Tensor) -> Tensor:
        if not x.is_contiguous():
            raise RuntimeError("this kernel reads dense memory")
        return 2 * x

    own.define("twice(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    own.impl("twice", twice, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake("densetest::twice", torch.empty_like, lib=own)
    yield
    own._destroy()  # type: ignore[no-untyped-call]


def attended(x: Tensor) -> Tensor:
    y = x.unflatten(-1, (H, D)).transpose(1, 2)
    return causal(y, y, y).transpose(1, 2).flatten(2)


def twice(x: Tensor) -> Tensor:
    return torch.ops.densetest.twice(x)  # type: ignore[no-any-return]


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "an output": attended,
    "an output of all tokens' sums": lambda x: attended(x).cumsum(1),
    "transposed, then an op of torch that asks": lambda x: group_norm(attended(x).transpose(1, 2), 2),
    "an op of another library": lambda x: twice(attended(x)),
    "before attention, too": lambda x: attended(twice(x)),
    "heads apart": lambda x: twice(causal(*[x.unflatten(-1, (H, D)).transpose(1, 2)] * 3).contiguous()),
}


def run(step: Callable[[Tensor], Tensor]) -> None:
    plain = step(X)
    for lower in (False, True):
        for seen, _ in cppass.simulate(trace(step, (X,)), (X,), 2, lower=lower):
            torch.testing.assert_close(seen, plain, rtol=1e-5, atol=1e-5)
            assert seen.stride() == plain.stride()


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_dense_where_it_was(step: Callable[[Tensor], Tensor]) -> None:
    run(step)


def test_on_local_rows() -> None:
    cppass.rule("densetest::twice", axes.pointwise)
    try:
        run(STEPS["heads apart"])
    finally:
        registry.remove("densetest::twice")


@pytest.mark.parametrize("name", ["an output", "an op of another library", "transposed, then an op of torch that asks"])
def test_as_gathered_it_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite._Rewriter, "_as_dense", lambda self, old, new: new)
    with pytest.raises((AssertionError, RuntimeError)):
        run(STEPS[name])
