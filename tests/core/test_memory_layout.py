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


def grown(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and keys [B, H, S, D] that are dense in memory."""
    y = x.unflatten(-1, (H, D)).transpose(1, 2).contiguous()
    k = y + 1
    return causal(y, k, y), k


def twice(x: Tensor) -> Tensor:
    return torch.ops.densetest.twice(x)  # type: ignore[no-any-return]


Step = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
STEPS: dict[str, Step] = {
    "an output": attended,
    "an output of all tokens' sums": lambda x: attended(x).cumsum(1),
    "transposed, then an op of torch that asks": lambda x: group_norm(attended(x).transpose(1, 2), 2),
    "an op of another library": lambda x: twice(attended(x)),
    "before attention, too": lambda x: attended(twice(x)),
    "keys, as a growing cache returns them": grown,
    "heads apart": lambda x: twice(causal(*[x.unflatten(-1, (H, D)).transpose(1, 2)] * 3).contiguous()),
}


DENSE_ANYWAY = ("an output of all tokens' sums", "before attention, too", "heads apart")


def run(step: Step) -> None:
    plain = as_tuple(step(X))
    for lower in (False, True):
        for seen, _ in cppass.simulate(trace(step, (X,)), (X,), 2, lower=lower):
            for ours, meant in zip(as_tuple(seen), plain, strict=True):
                torch.testing.assert_close(ours, meant, rtol=1e-5, atol=1e-5)
                assert ours.stride() == meant.stride()


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_dense_where_it_was(step: Step) -> None:
    run(step)


def test_on_local_rows() -> None:
    cppass.rule("densetest::twice", axes.pointwise)
    try:
        run(STEPS["heads apart"])
    finally:
        registry.remove("densetest::twice")


@pytest.mark.parametrize("name", [name for name in STEPS if name not in DENSE_ANYWAY])
def test_as_gathered_it_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite._Rewriter, "_as_dense", lambda self, old, new: new)
    with pytest.raises((AssertionError, RuntimeError)):
        run(STEPS[name])
