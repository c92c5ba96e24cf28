"""find_sites and the plan's refusals, on snippets: what is attention, what only looks like it, what is not rewritten.

Shape suffixes: B batch, H query heads, G key/value heads, S tokens, T keys, D head size, F = H * D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout, scaled_dot_product_attention, silu

import cppass
from cppass.match import Found, find_sites
from cppass.site import Causal, Rewrite

B, H, G, S, T, D = 1, 4, 2, 8, 12, 6
aten = torch.ops.aten
Function = Callable[..., Any]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def qkv(kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return rand(B, H, S, D), rand(B, kv_heads, S, D), rand(B, kv_heads, S, D)


def caches(kv_heads: int = H) -> tuple[Tensor, Tensor]:
    return rand(B, kv_heads, T, D), rand(B, kv_heads, T, D)


def traced(function: Function, *inputs: Any, pre_dispatch: bool = False) -> fx.GraphModule:
    """Placeholders are named after the parameters: q_1, k_1, ..."""
    return make_fx(function, tracing_mode="fake", pre_dispatch=pre_dispatch)(*inputs)


def found(function: Function, *inputs: Any, pre_dispatch: bool = False) -> Found:
    return find_sites(traced(function, *inputs, pre_dispatch=pre_dispatch).graph)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def hidden(queries: int, keys: int) -> Tensor:
    return torch.where(torch.arange(keys)[None] <= torch.arange(queries)[:, None], 0.0, float("-inf"))[None, None]


def repeat_kv(x: Tensor, n: int) -> Tensor:
    """transformers' repeat_kv: [B, G, S, D] -> [B, G * n, S, D]."""
    b, g, s, d = x.shape
    return x[:, :, None].expand(b, g, n, s, d).reshape(b, g * n, s, d)


# -- forms -------------------------------------------------------------------------------------------------------------

SDPA, FLASH = "scaled_dot_product_attention", "scaled_dot_product_attention (CPU flash)"
WRITTEN_OUT, ROW_BY_ROW = "softmax(q @ k.T) @ v", "softmax(q @ k.T, ...) @ v"


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) * 0.5 + hidden(S, S), -1) @ v


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3) / 4 + hidden(S, S).to(q.dtype), -1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.transpose(2, 3)) * 30 + hidden(S, S), -1) @ v


def with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v, weights


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.transpose(2, 3), q[..., :1]], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


FORMS: dict[str, tuple[Function, bool, str, Rewrite, Causal | None, float | None]] = {
    "sdpa": (causal, True, SDPA, Rewrite.ZIGZAG, Causal(), None),
    "sdpa without a mask": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.3),
        True,
        SDPA,
        Rewrite.ZIGZAG,
        None,
        0.3,
    ),
    "flash": (causal, False, FLASH, Rewrite.ZIGZAG, Causal(), None),
    "flash with a mask": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=hidden(S, S), scale=0.3),
        False,
        FLASH,
        Rewrite.ZIGZAG,
        Causal(),
        0.3,
    ),
    "written out": (written_out, False, WRITTEN_OUT, Rewrite.ZIGZAG, Causal(), 0.5),
    "written out in float32": (in_float32, False, WRITTEN_OUT, Rewrite.ZIGZAG, Causal(), 0.25),
    "soft cap": (soft_capped, False, ROW_BY_ROW, Rewrite.ROWWISE, None, None),
    "weights are an output": (with_weights, False, ROW_BY_ROW, Rewrite.ROWWISE, None, None),
    "sink": (with_sink, False, ROW_BY_ROW, Rewrite.ROWWISE, None, None),
}


@pytest.mark.parametrize(
    ("function", "pre_dispatch", "form", "rewrite", "mask", "scale"), FORMS.values(), ids=FORMS.keys()
)
def test_forms(
    function: Function, pre_dispatch: bool, form: str, rewrite: Rewrite, mask: Causal | None, scale: float | None
) -> None:
    seen = found(function, *qkv(), pre_dispatch=pre_dispatch)
    assert not seen.refusals
    (site,) = seen.sites
    assert (site.form, site.rewrite, site.causal, site.scale) == (form, rewrite, mask, scale)
    assert (site.key_fresh.source.name, site.value_fresh.source.name) == ("k_1", "v_1")


# -- KV heads repeated -----------------------------------------------------------------------------------------------

REPEATS: dict[str, Function] = {
    "enable_gqa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "repeat_kv": lambda q, k, v: causal(q, repeat_kv(k, H // G), repeat_kv(v, H // G)),
    "repeat_interleave": lambda q, k, v: causal(q, k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)),
    "written out": lambda q, k, v: torch.softmax(q @ repeat_kv(k, H // G).transpose(2, 3), -1) @ repeat_kv(v, H // G),
}


@pytest.mark.parametrize("function", REPEATS.values(), ids=REPEATS.keys())
def test_repeats_are_peeled(function: Function) -> None:
    """What travels and what attention reads are the G heads, not the H heads they are repeated to."""
    (site,) = found(function, *qkv(G)).sites
    assert (site.key.name, site.value.name) == ("k_1", "v_1")


@pytest.mark.parametrize(
    "tiled",
    [
        lambda k: k.repeat(1, H // G, 1, 1),  # heads 0 1 0 1, not 0 0 1 1
        lambda k: repeat_kv(k, H // G).flip(1),
        lambda k: k[:, None].expand(B, H // G, G, S, D).reshape(B, H, S, D),
    ],
    ids=["tiled", "reordered", "repeated in front"],
)
def test_other_orders_of_heads_are_not_peeled(tiled: Function) -> None:
    (site,) = found(lambda q, k, v: causal(q, tiled(k), tiled(v)), *qkv(G)).sites
    assert site.key.name != "k_1"
    assert site.key.meta["val"].shape[1] == H


# -- KV writes ---------------------------------------------------------------------------------------------------------


def index_put(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    return aten.index_put(cache, [None, None, positions], new)


WRITES: dict[str, tuple[Function, tuple[str, ...]]] = {
    "index_copy": (lambda cache, new, at: cache.index_copy(2, at, new), ("index_copy",)),
    "index_put": (lambda cache, new, at: index_put(cache, at, new), ("index_put",)),
    "slice_scatter": (lambda cache, new, at: torch.slice_scatter(cache, new, 2, 1, 1 + S), ("slice_scatter",)),
    "cat": (lambda cache, new, at: torch.cat([cache, new], 2), ("cat",)),
    "cat, counted from the end": (lambda cache, new, at: torch.cat([cache, new], -2), ("cat",)),
    "cat, part of it read": (lambda cache, new, at: torch.cat([cache, new], 2)[:, :, 2:], ("cat",)),
    "cat, cloned": (lambda cache, new, at: torch.cat([cache, new.clone()], 2).contiguous(), ("cat",)),
    "written twice": (
        lambda cache, new, at: cache.index_copy(2, at, torch.cat([cache[:, :, :0], new], 2)),
        ("index_copy", "cat"),
    ),
}


@pytest.mark.parametrize(("write", "nodes"), WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("repeats", [1, H // G])
def test_write_forms(write: Function, nodes: tuple[str, ...], repeats: int) -> None:
    """The rows of this step are found behind the write (and behind a repeat of what was written)."""

    def step(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, at: Tensor) -> Tensor:
        k, v = write(kc, k, at), write(vc, v, at)
        if repeats > 1:
            k, v = repeat_kv(k, repeats), repeat_kv(v, repeats)
        return scaled_dot_product_attention(q, k, v)

    heads = H // repeats
    (site,) = found(step, *qkv(heads), *caches(heads), torch.arange(S)).sites
    assert (site.key_fresh.source.name, site.value_fresh.source.name) == ("k_1", "v_1")
    assert site.key_fresh.form == nodes[0]
    assert tuple(w.name.rstrip("_0123456789") for w in site.key_fresh.writes) == nodes


def test_repeated_tokens_are_no_repeated_heads() -> None:
    """[B, H, n * S, D]: the same ops as a repeat of heads, but for the view."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(B, H, 2, S, D).reshape(B, H, 2 * S, D) for x in (k, v))
        return scaled_dot_product_attention(q, k, v)

    (site,) = found(step, *qkv()).sites
    assert tuple(site.key.meta["val"].shape) == (B, H, 2 * S, D)


def test_cat_on_another_dimension_is_no_write() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, torch.cat([k, k], 1), torch.cat([v, v], 1))

    (site,) = found(step, *qkv(G)).sites
    assert (site.key_fresh.form, site.key_fresh.source.name) == ("", "cat")


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


# -- what the plan refuses or reports ----------------------------------------------------------------------------------


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
    inputs = (rand(1, S, S), *(rand(S, H * S) for _ in range(3)))

    def step(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        q, k, v = ((x @ w).view(1, S, H, S).transpose(1, 2) for w in (wq, wk, wv))
        return causal(q, k, v).transpose(1, 2).reshape(1, S, H * S)

    plain = step(*inputs)
    for outputs, _ in cppass.simulate(step, inputs, 2):
        torch.testing.assert_close(outputs, plain, rtol=1e-4, atol=1e-5)
