"""find_sites on snippets: attention that is refused where it is found, and what is no attention at all."""

from __future__ import annotations

import pytest
import torch
from core.attention_forms import B, D, Function, S, causal, found, qkv, rand, traced
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

import cppass
from cppass.match import Found

aten = torch.ops.aten


# -- attention that is refused, by code --------------------------------------------------------------------------------


def _unknown(name: str) -> Function:
    """An op of another library whose name sounds like attention."""

    @torch.library.custom_op(f"cppass_core_tests::{name}", mutates_args=())
    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.clone()

    op.register_fake(lambda q, k, v: torch.empty_like(q))
    return op


UNKNOWN = [_unknown(n) for n in ("my_flash_forward", "ring_attn", "selective_scan", "gated_delta_rule", "wkv6")]


@pytest.mark.parametrize("op", UNKNOWN, ids=lambda op: op._name)
def test_unknown_attention_is_refused_by_name(op: Function) -> None:
    refusals = found(lambda q, k, v: op(q, k, v), *qkv()).refusals
    assert [(r.code, r.op.split(".")[1]) for r in refusals] == [("CP101", op._name)]  # type: ignore[attr-defined]
    assert "sdpa" in refusals[0].hint


REFUSED_WHERE_FOUND: dict[str, tuple[Function, bool, tuple[Tensor, ...], str, str]] = {
    "dropout": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        True,
        qkv(),
        "CP102",
        "dropout_p=0.5",
    ),
    "dropout in flash": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.25, True)[0],
        False,
        qkv(),
        "CP102",
        "dropout_p=0.25",
    ),
    "dropout, written out": (
        lambda q, k, v: torch.native_dropout(torch.softmax(q @ k.transpose(2, 3), -1), 0.5, True)[0] @ v,
        False,
        qkv(),
        "CP102",
        "attention with dropout",
    ),
    "three dimensions": (causal, True, tuple(x[0] for x in qkv()), "CP103", "[4, 8, 6]"),
    "log-sum-exp": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True),
        False,
        qkv(),
        "CP104",
        "log-sum-exp",
    ),
}


@pytest.mark.parametrize(
    ("function", "pre_dispatch", "inputs", "code", "says"), REFUSED_WHERE_FOUND.values(), ids=REFUSED_WHERE_FOUND.keys()
)
def test_attention_that_is_refused(
    function: Function, pre_dispatch: bool, inputs: tuple[Tensor, ...], code: str, says: str
) -> None:
    seen = found(function, *inputs, pre_dispatch=pre_dispatch)
    assert [r.code for r in seen.refusals] == [code]
    assert says in seen.refusals[0].why
    assert seen.refusals[0].hint
    assert not seen.sites


def test_attention_in_a_branch_is_refused() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(q.sum() > 0, causal, lambda q, k, v: q.clone(), (q, k, v))

    (refusal,) = found(step, *qkv()).refusals
    assert refusal.code == "CP107"


def test_a_branch_without_attention_is_none() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.cond(q.sum() > 0, lambda q: q + 1, lambda q: q.clone(), (q,))
        return causal(q, k, v)

    seen = found(step, *qkv())
    assert (len(seen.sites), seen.refusals) == (1, ())


# -- what is no attention ----------------------------------------------------------------------------------------------

NO_ATTENTION: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "router": (lambda x, w, e: torch.softmax(x @ w, -1) @ e, (rand(S, D), rand(D, 4), rand(4, D))),
    "top-k router": (lambda x, w: torch.softmax(x @ w, -1).topk(2), (rand(S, D), rand(D, 4))),
    "vocabulary": (lambda x, w: torch.softmax(x @ w, -1), (rand(B, S, D), rand(D, 30))),
    "softmax over tokens": (lambda x: torch.softmax(x, 1), (rand(B, S, D),)),
    "gated mlp": (lambda x, w, u: silu(x @ w) * (x @ w) @ u, (rand(S, D), rand(D, 4), rand(4, D))),
}


@pytest.mark.parametrize(("function", "inputs"), NO_ATTENTION.values(), ids=NO_ATTENTION.keys())
def test_what_is_no_attention(function: Function, inputs: tuple[Tensor, ...]) -> None:
    assert found(function, *inputs) == Found((), ())


OVERLOOKED: dict[str, Function] = {
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1), v
    ),
    "heads behind tokens": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)), -1),
        v.transpose(1, 2),
    ),
}


@pytest.mark.parametrize("function", OVERLOOKED.values(), ids=OVERLOOKED.keys())
def test_softmax_attention_is_not_overlooked(function: Function) -> None:
    """Alone in a graph, attention of an unknown form is a site or a refusal, never "no attention in this graph"."""
    seen = found(function, *qkv())
    assert seen.sites or seen.refusals


# -- products without a softmax: the graph is left alone, and the report says which -----------------------------------

WITHOUT_SOFTMAX: dict[str, Function] = {
    "retention": lambda q, k, v: (q @ k.transpose(2, 3) * torch.ones(S, S).tril()) @ v,
    "sigmoid": lambda q, k, v: torch.sigmoid(q @ k.transpose(2, 3)).tril() @ v,
    "linear": lambda q, k, v: silu(q) @ (silu(k).transpose(2, 3) @ v),
}
OTHER_PRODUCTS: dict[str, Function] = {
    "one matrix": lambda q, k, v: q.flatten(0, 2) @ torch.ones(D, D),
    "angles": lambda q, k, v: torch.ones(1, D, 1) @ torch.arange(S).float()[None, None],
    "none": lambda q, k, v: q + k * v,
}


def notes(function: Function) -> tuple[str, ...]:
    report = cppass.run_pass(traced(function, *qkv()), qkv(), cp_size=2, lower=False)
    assert report.reason == "no attention in this graph"
    return report.notes


@pytest.mark.parametrize("function", WITHOUT_SOFTMAX.values(), ids=WITHOUT_SOFTMAX.keys())
def test_products_that_may_be_attention_are_named(function: Function) -> None:
    (note,) = notes(function)
    assert note.startswith("aten.bmm.default (node bmm")
    assert "docs/extending.md" in note


@pytest.mark.parametrize("function", OTHER_PRODUCTS.values(), ids=OTHER_PRODUCTS.keys())
def test_other_products_are_not(function: Function) -> None:
    assert notes(function) == ()
