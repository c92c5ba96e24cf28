"""What the plan refuses, what it gathers and reports, and how often rows travel.

Shape suffixes: B batch, H query heads, G key/value heads, S tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from core.attention_forms import (
    REPEATS,
    B,
    D,
    Function,
    G,
    H,
    S,
    causal,
    qkv,
    rand,
    repeat_kv,
    soft_capped,
    traced,
    with_sink,
)
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention, silu

import cppass

aten = torch.ops.aten


# -- refused or reported -----------------------------------------------------------------------------------------------


def passed(function: Function, *inputs: Any, **options: Any) -> cppass.Report:
    return cppass.run_pass(traced(function, *inputs), inputs, cp_size=2, lower=False, on_refusal="fallback", **options)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v) + silu(q) @ (k.transpose(2, 3) @ v)


def normalised_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(silu(causal(q, k, v)) @ silu(causal(k, k, v)).transpose(2, 3))
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("function", [linear_attention, normalised_by_hand], ids=lambda f: f.__name__)
def test_products_that_mix_tokens_are_refused(function: Function) -> None:
    """k.T @ v sums over tokens; q @ k.T meets every pair of them. Beside a known attention that is no mlp."""
    report = passed(function, *qkv())
    assert (report.status, report.refusals[0].code) == ("refused", "CP201")


def test_a_product_with_weights_is_no_attention() -> None:
    """Control: the same shapes with weights in place of k and v pass."""
    weights = (rand(D, D), rand(D, D))

    def step(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return causal(q, k, v) + silu(q) @ (a @ b)

    assert passed(step, *qkv(), *weights).status == "rewritten"


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v).sum(2)


def test_a_sum_over_tokens_is_gathered_and_reported() -> None:
    report = passed(summed, *qkv())
    assert report.status == "rewritten"
    assert [g.why for g in report.gathers] == ["K and V of a site", "aten.sum.dim_IntList mixes tokens (node sum_1)"]
    assert report.notes == ("gathered getitem: aten.sum.dim_IntList mixes tokens (node sum_1)",)


def test_strict_refuses_such_a_gather() -> None:
    report = passed(summed, *qkv(), strict=True)
    assert [r.code for r in report.refusals] == ["CP202"]
    assert "strict=False" in report.refusals[0].hint


def test_strict_gathers_outputs() -> None:
    assert passed(causal, *qkv(), strict=True).status == "rewritten"


# -- in front of the first attention nothing has to travel, but work may run whole on every rank ----------------------

WEIGHT = rand(H * D, H * D)


Mix: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def behind(mix: Mix) -> Function:
    """x [B, S, H * D] through a matrix product and `mix`, then attention."""

    def step(x: Tensor, weight: Tensor) -> Tensor:
        y = mix(x @ weight, weight).unflatten(-1, (H, D)).transpose(1, 2)
        return causal(y, y, y)

    return step


WHOLE: dict[str, tuple[Mix, str]] = {
    "no rule": (lambda x, w: x.cummax(1)[0], "aten.cummax.default has no rule (node cummax)"),
    "tokens mixed": (lambda x, w: x.cumsum(1), "aten.cumsum.default mixes tokens (node cumsum)"),
    "two products": (lambda x, w: (x @ w).flip(1), "aten.flip.default mixes tokens (node flip)"),
}


@pytest.mark.parametrize(("mix", "what"), WHOLE.values(), ids=WHOLE.keys())
def test_work_of_every_rank_is_reported(mix: Mix, what: str) -> None:
    inputs = (rand(B, S, H * D), WEIGHT)
    (note,) = passed(behind(mix), *inputs).notes
    assert note.startswith(f"{what}: it runs whole on every rank, with ")
    report = passed(behind(mix), *inputs, strict=True)
    assert [r.code for r in report.refusals] == ["CP202"]
    assert "strict=False" in report.refusals[0].hint


@pytest.mark.parametrize(
    "mix", [lambda x, w: x, lambda x, w: silu(x), lambda x, w: x @ w], ids=["nothing", "silu", "product"]
)
def test_shared_work_is_not(mix: Mix) -> None:
    report = passed(behind(mix), rand(B, S, H * D), WEIGHT, strict=True)
    assert (report.status, report.notes) == ("rewritten", ())


def test_an_op_without_a_rule_on_an_input() -> None:
    """No product is before it, yet it may be dear: nothing says what it does."""

    def step(x: Tensor) -> Tensor:
        y = x.cummax(1)[0].unflatten(-1, (H, D)).transpose(1, 2)
        return causal(y, y, y)

    (note,) = passed(step, rand(B, S, H * D)).notes
    assert note == "aten.cummax.default has no rule (node cummax): it runs whole on every rank"
    assert [r.code for r in passed(step, rand(B, S, H * D), strict=True).refusals] == ["CP202"]


def test_positions_are_cheap() -> None:
    """Integers say where rows are: an op without a rule on them is no work to share."""

    def step(x: Tensor, steps: Tensor) -> Tensor:
        y = (x * steps.cummax(0)[0][:, None]).unflatten(-1, (H, D)).transpose(1, 2)
        return causal(y, y, y)

    inputs = (rand(B, S, H * D), torch.arange(S))
    assert passed(step, *inputs, strict=True).notes == ()


RANDOM: dict[str, Function] = {
    "dropout": lambda q, k, v: dropout(causal(q, k, v), 0.5, True),
    "noise of the same shape": lambda q, k, v: causal(q, k, v) + torch.rand_like(q),
    "noise for everyone": lambda q, k, v: causal(q, k, v) + torch.rand(D),
    "sampling": lambda q, k, v: torch.multinomial(torch.softmax(causal(q, k, v)[0, 0], -1), 1),
}


@pytest.mark.parametrize("function", RANDOM.values(), ids=RANDOM.keys())
def test_random_ops_are_refused(function: Function) -> None:
    report = passed(function, *qkv())
    assert (report.status, report.refusals[0].code) == ("refused", "CP203")


def test_two_token_counts_are_refused() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v)[:, :, :6] + causal(q[:, :, :6], k[:, :, :6], v[:, :, :6])

    report = passed(step, *qkv())
    assert [r.code for r in report.refusals] == ["CP105"]


def test_refusals_raise_by_default() -> None:
    with pytest.raises(cppass.RefusedError, match="CP203") as caught:
        cppass.run_pass(traced(RANDOM["dropout"], *qkv()), qkv(), cp_size=2)
    assert caught.value.refusals[0].node


# -- how often rows travel ---------------------------------------------------------------------------------------------


def projected(attend: Function) -> Function:
    """Keys and values made from local rows, so that they have to travel; G heads of them."""

    def step(x: Tensor, w: Tensor) -> Tensor:
        heads = (x @ w).view(B, S, H + 2 * G, D).transpose(1, 2)
        out = attend(heads[:, :H], heads[:, H : H + G], heads[:, H + G :])
        return out.transpose(1, 2).reshape(B, S, H * D) @ w[:, : H * D]

    return step


TRAVELS: dict[str, Function] = {
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "sdpa, repeated": REPEATS["repeat_kv"],
    "written out": REPEATS["written out"],
    "soft cap": lambda q, k, v: soft_capped(q, repeat_kv(k, H // G), repeat_kv(v, H // G)),
    "sink": lambda q, k, v: with_sink(q, repeat_kv(k, H // G), repeat_kv(v, H // G)),
    "grown cache": lambda q, k, v: scaled_dot_product_attention(
        q, torch.cat([k * 0, k], 2).repeat_interleave(H // G, 1), torch.cat([v * 0, v], 2).repeat_interleave(H // G, 1)
    ),
}


LAST: dict[str, Callable[[Tensor], Tensor]] = {
    "a row": lambda x: x[:, -1],
    "a row, from the start": lambda x: x[:, S - 1],
    "rows": lambda x: x[:, -2:],
    "in two steps": lambda x: x[0][-1:][0],
    "the second of the last three": lambda x: x[0, S - 3 :][1],
}


@pytest.mark.parametrize("last", LAST.values(), ids=LAST.keys())
def test_only_the_last_rows_travel(last: Callable[[Tensor], Tensor]) -> None:
    """Two equal picks that are written in other ways are one value to verification, too."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return last(causal(q, k, v).transpose(1, 2).flatten(2))

    report = passed(step, *qkv())
    assert report.status == "rewritten"
    assert report.gathers[-1].why.endswith("selected rows")


@pytest.mark.parametrize("attend", TRAVELS.values(), ids=TRAVELS.keys())
def test_one_collective_for_keys_and_values_and_one_for_the_output(attend: Function) -> None:
    inputs = (rand(B, S, H * D), rand(H * D, (H + 2 * G) * D))
    report = passed(projected(attend), *inputs)
    assert report.status == "rewritten"
    assert report.gathers[0].received_bytes == 2 * G * S * D * 4 // 2  # G heads of keys and values, half of the rows
    assert report.collectives == 2


# -- sizes that coincide -----------------------------------------------------------------------------------------------

COINCIDENCES = {
    "head size == tokens": (B, H, S, S),
    "heads == tokens": (B, S, S, D),
    "batch == tokens": (S, H, S, D),
    "all the same": (S, S, S, S),
}


@pytest.mark.parametrize("shape", COINCIDENCES.values(), ids=COINCIDENCES.keys())
def test_tokens_are_found_by_provenance(shape: tuple[int, ...]) -> None:
    """The shards and gathers name dim 2 of [B, H, S, D], whatever else has the size of the tokens."""
    q, k, v = rand(*shape), rand(*shape), rand(*shape)
    gm = traced(lambda q, k, v: causal(silu(q), k * 2, v * 2), q, k, v)
    cppass.run_pass(gm, (q, k, v), cp_size=2, lower=False)
    canonical = torch.ops.cppass
    assert {n.args[1] for n in gm.graph.nodes if n.target is canonical.shard.default} == {2}
    assert [n.args[1] for n in gm.graph.nodes if n.target is canonical.gather.default] == [[2, 2], [2]]


def test_hidden_size_equal_to_tokens_through_a_projection() -> None:
    """x [S, F] with F == S == D: rows carry tokens, columns do not, and the view [1, S, H, D] keeps them in dim 1."""
    inputs = (rand(1, S, S), *(rand(S, H * S, seed=i) for i in (1, 2, 3)))

    def step(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        q, k, v = ((x @ w).view(1, S, H, S).transpose(1, 2) for w in (wq, wk, wv))
        return causal(q, k, v).transpose(1, 2).reshape(1, S, H * S)

    plain = step(*inputs)
    for outputs, _ in cppass.simulate(step, inputs, 2):
        torch.testing.assert_close(outputs, plain, rtol=1e-4, atol=1e-5)
