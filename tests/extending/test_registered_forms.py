"""Site forms from outside: attention of an op of one's own is rewritten, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from extending import own_ops as own
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.extend import AttentionSite, Causal, Fresh, attention_site, given, refusal
from cppass.rules import name_of

ATTEND = "owntest::attend"
S, T = 12, 20


def form(node: fx.Node) -> AttentionSite | cppass.Refusal:
    """All of what owntest::attend can be called with, but for a causal flag over a cache."""
    q, k, v, mask = (given(node, name) for name in ("q", "k", "v", "mask"))
    causal = Causal() if given(node, "causal") else None
    return attention_site(node, query=q, key=k, value=v, mask=mask, causal=causal, scale=given(node, "scale"))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return own.attend(q, k, v, None, True, 0.3)


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return own.attend(q, k, v, None, False, 0.3)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return own.attend(q, k, v, seen[None, None], False, 0.3)


def cached(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(S) + 4
    kc, vc = kc.index_copy(2, rows, k), vc.index_copy(2, rows, v)
    seen = torch.arange(T) <= (torch.arange(S) + 4)[:, None]
    return own.attend(q, kc, vc, seen[None, None], False, 0.3), kc, vc


def qkv(heads: int = 4) -> tuple[Tensor, ...]:
    return own.rand(1, 4, S, 8), own.rand(1, heads, S, 8, seed=1), own.rand(1, heads, S, 8, seed=2)


def caches() -> tuple[Tensor, Tensor]:
    return torch.empty(1, 2, T, 8), torch.empty(1, 2, T, 8)


SEEN = torch.rand(S, S, generator=torch.Generator().manual_seed(0)) < 0.7
SEEN.fill_diagonal_(True)
CALLS: dict[str, tuple[Any, tuple[Tensor, ...], str, str]] = {
    "causal": (causal, qkv(), "no cache", "causal"),
    "fewer KV heads": (causal, qkv(2), "no cache", "causal"),
    "no mask": (unmasked, qkv(), "no cache", "no mask"),
    "a mask of its own": (masked, (*qkv(), SEEN), "no cache", "its own mask, local rows of it"),
    "a cache": (cached, (*qkv(2), *caches()), "KV write index_copy", "causal on a filled cache"),
}


@pytest.mark.parametrize(("function", "args", "write", "mask"), CALLS.values(), ids=CALLS.keys())
def test_a_call_is_rewritten(function: Any, args: tuple[Tensor, ...], write: str, mask: str) -> None:
    cppass.site_form(ATTEND, form)
    checked = cppass.check_site_form(function, args)
    assert [(s.form, s.kv_write, s.mask) for s in checked.report.sites] == [("owntest.attend.default", write, mask)]
    assert "equal to one device" in str(checked)


def test_the_op_is_gone_and_cppass_attends() -> None:
    cppass.site_form(ATTEND, form)
    gm = make_fx(causal, tracing_mode="fake")(*qkv())
    cppass.run_pass(gm, qkv(), cp_size=2)
    names = [name_of(n) for n in gm.graph.nodes]
    assert "cppass_host::attention" in names
    assert "owntest::attend" not in names


def test_without_a_form_it_is_refused() -> None:
    """q, k and v of an op nobody described: never quietly run on gathered rows."""

    def layer(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (4, 8)).transpose(1, 2) for p in (x @ w).chunk(3, -1))
        causal_part = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return own.attend(causal_part, k, v, None, True, 0.3)

    inputs = (own.rand(1, S, 32), own.rand(32, 96))
    with pytest.raises(cppass.RefusedError, match=r"CP201"):
        cppass.run_pass(make_fx(layer, tracing_mode="fake")(*inputs), inputs, cp_size=2)


def test_in_a_compiled_model_with_symbolic_sizes() -> None:
    cppass.site_form(ATTEND, form)
    report = cppass.explain(causal, *qkv(), cp_size=2, dynamic=True)
    assert (report.status, len(report.sites)) == ("rewritten", 1)


def test_a_refusal_of_a_form_reaches_the_user() -> None:
    cppass.site_form(ATTEND, lambda node: refusal(node, "owntest::attend with a scale", "scale the queries"))
    with pytest.raises(cppass.RefusedError, match=r"(?s)CP116.*with a scale.*way out: scale the queries"):
        cppass.check_site_form(causal, qkv())


# -- what is wrong is found ------------------------------------------------------------------------------------------


def changed(**fields: Any) -> Any:
    def read(node: fx.Node) -> AttentionSite:
        site = form(node)
        assert isinstance(site, AttentionSite)
        values = {name: value(node) if callable(value) else value for name, value in fields.items()}
        return dataclasses.replace(site, **values)

    return read


WRONG: dict[str, Any] = {
    "another scale": changed(scale=0.31),
    "not causal": changed(causal=None),
    "a window that is not there": changed(causal=Causal(window=3)),
    "keys for values": changed(value=lambda n: n.args[1], value_fresh=lambda n: Fresh(n.args[1], 2)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_form_that_misreads_its_op_is_found(wrong: Any) -> None:
    cppass.site_form(ATTEND, wrong)
    with pytest.raises(cppass.ExtensionError, match=r"(?s)CP205.*differs from one device"):
        cppass.check_site_form(causal, qkv())


NONSENSE: dict[str, tuple[Any, str]] = {
    "nothing": (lambda node: None, r"attention_site\(...\), or cppass.extend.refusal"),
    "raises": (lambda node: given(node, "query"), "raised KeyError"),
    "another node": (changed(node=lambda n: n.args[0]), "not the one it was asked about"),
    "no query": (changed(query=None), "its query is None"),
    "a key from elsewhere": (changed(key=lambda n: n), "its key is attend.* no tensor that the call depends on"),
    "layout": (changed(query_dim=1), "has 12 rows where the query has 4 tokens"),
    "a dimension that is none": (changed(query_dim=3), "query_dim=3"),
    "no rows": (changed(key_fresh=None), "not a Fresh"),
    "rows of something else": (changed(key_fresh=lambda n: Fresh(n.args[0], 2)), "does not depend on"),
    "rows elsewhere": (changed(key_fresh=lambda n: Fresh(n.args[1], 1)), "has 4 rows where the query has 12 tokens"),
    "rows in no dimension": (changed(key_fresh=lambda n: Fresh(n.args[1], 4)), "tokens in dim 4"),
    "a flag for causal": (changed(causal=True), "its causal is True"),
    "no node in causal": (changed(causal=Causal(terms=(3,))), "adds 3, which is no node"),  # type: ignore[arg-type]
    "no number": (changed(causal=Causal(constant="4")), "the constant '4'"),  # type: ignore[arg-type]
    "no mask": (changed(mask=3), "its mask is 3"),
    "a scale that is none": (changed(scale="0.3"), "its scale is '0.3'"),
}


@pytest.mark.parametrize(("wrong", "text"), NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_named(wrong: Any, text: str) -> None:
    cppass.site_form(ATTEND, wrong)
    with pytest.raises(cppass.ExtensionError, match=rf"(?s)CP115.*{ATTEND}.*{text}"):
        cppass.run_pass(make_fx(causal, tracing_mode="fake")(*qkv()), qkv(), cp_size=2)


def test_shapes_that_do_not_fit_are_named() -> None:
    cppass.site_form(ATTEND, changed(value=lambda n: n.args[3]))
    inputs = (*qkv(), SEEN)
    with pytest.raises(cppass.ExtensionError, match=r"CP115.*value \[1, 1, 12, 12\].*meant are \[B, Hq, S, D\]"):
        cppass.run_pass(make_fx(masked, tracing_mode="fake")(*inputs), inputs, cp_size=2)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda q, k, v: q + k, "no attention"),
        (lambda q, k, v: causal(q[:, :, :2], k[:, :, :2], v[:, :, :2]), "2 tokens"),
    ],
    ids=["no call", "too few tokens"],
)
def test_a_check_that_rewrites_nothing_fails(function: Any, text: str) -> None:
    cppass.site_form(ATTEND, form)
    with pytest.raises(cppass.ExtensionError, match=rf"CP206.*{text}"):
        cppass.check_site_form(function, qkv())


def test_what_cannot_be_registered() -> None:
    with pytest.raises(cppass.OptionError, match=r"CP020.*attention that cppass knows"):
        cppass.site_form("aten::scaled_dot_product_attention", form)
    with pytest.raises(cppass.OptionError, match=r"CP020.*built-in rule"):
        cppass.site_form("aten::mm", form)
    cppass.site_form(ATTEND, form)
    with pytest.raises(cppass.OptionError, match=r"CP020.*has a site form already"):
        cppass.rule(ATTEND, lambda node: None)
