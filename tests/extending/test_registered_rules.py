"""Rules from outside: what they change, what is refused, and what is found to be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from extending import own_ops as own
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.extend import Axes, axes, given, pointwise, reduction, row_wise, shape_of

X = torch.empty(8, 12, 16)
NORM, FOLD = "owntest::norm", "owntest::fold"


def run_pass(function: Callable[..., Any], inputs: Any, **options: Any) -> tuple[cppass.Report, fx.GraphModule]:
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    return cppass.run_pass(gm, inputs, cp_size=2, **options), gm


# -- what a rule changes -----------------------------------------------------------------------------------------------


def test_without_rules_inputs_are_gathered() -> None:
    """The norm in front of the attention is where tokens enter; fold and the other norm take gathered rows."""
    report, gm = run_pass(own.layer, own.layer_inputs())
    assert report.notes == (
        "gathered getitem_3: owntest.fold.default has no rule (node fold)",
        "owntest.norm.default has no rule (node norm): it runs whole on every rank, with 1 matrix product before it",
    )
    assert [shape_of(n)[1] for n in gm.graph.nodes if n.target is torch.ops.owntest.norm.default] == [16, 16]
    with pytest.raises(cppass.RefusedError, match=r"CP202.*owntest.fold.default has no rule"):
        run_pass(own.layer, own.layer_inputs(), strict=True)


def test_with_rules_ops_run_on_local_rows() -> None:
    cppass.rule(NORM, row_wise("x"))
    cppass.rule(FOLD, axes("bs.", x="b.s.", weight="."))
    report, gm = run_pass(own.layer, own.layer_inputs(), strict=True)
    assert (report.status, report.notes) == ("rewritten", ())
    assert [g.why for g in report.gathers] == ["K and V of a site", "1 selected rows"]
    norms = [n for n in gm.graph.nodes if n.target is torch.ops.owntest.norm.default]
    assert [shape_of(n)[1] for n in norms] == [8, 8]  # half the tokens, by the same op


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize("tokens", [16, 13])
def test_results_equal_one_device(tokens: int, lower: bool) -> None:
    cppass.rule(NORM, row_wise("x"))
    cppass.rule(FOLD, axes("bs.", x="b.s."))
    inputs = own.layer_inputs(tokens)
    expected = own.layer(*inputs)
    for seen, _ in cppass.simulate(own.layer, inputs, 3 if tokens == 16 else 2, lower=lower, strict=True):
        torch.testing.assert_close(seen, expected)


def test_in_a_compiled_model() -> None:
    cppass.rule(NORM, row_wise("x"))
    cppass.rule(FOLD, axes("bs.", x="b.s."))
    report = cppass.explain(own.layer, *own.layer_inputs(), cp_size=2, dynamic=True, options={"strict": True})
    assert (report.status, report.notes) == ("rewritten", ())


def test_a_rule_goes_before_a_name_like_attention() -> None:
    """An op called flash_gate is refused as attention, until a rule says what it is."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return own.flash_gate(out, q, v)

    inputs = (own.rand(1, 4, 16, 8), own.rand(1, 4, 16, 8), own.rand(1, 4, 16, 8))
    with pytest.raises(cppass.RefusedError, match=r"CP101"):
        run_pass(run, inputs)
    cppass.rule("owntest::flash_gate", pointwise)
    assert run_pass(run, inputs, strict=True)[0].status == "rewritten"


def test_as_a_decorator_and_by_any_name_of_the_op() -> None:
    @cppass.rule(own.norm)
    def by_definition(node: fx.Node) -> Axes | None:
        return row_wise("x")(node) if len(shape_of(node)) == 3 else None

    assert callable(by_definition)
    assert "rule owntest::norm" in cppass.registered()[0]
    cppass.unregister(torch.ops.owntest.norm)
    cppass.rule(torch.ops.owntest.norm.default, by_definition)
    cppass.unregister("owntest::norm")
    assert cppass.registered() == ()


# -- the check ---------------------------------------------------------------------------------------------------------

RIGHT: dict[str, tuple[str, Any, tuple[Any, ...], list[str]]] = {
    "row_wise": (NORM, row_wise("x"), (X, X[0, 0]), ["x 0 0", "x 1 1"]),
    "pointwise": (
        "owntest::flash_gate",
        pointwise,
        (X, X[:, :, :1], X[0, 0]),
        ["x 0 0", "x 1 1", "x 2 2", "y 0 0", "y 1 1", "z 0 2"],
    ),
    "reduction": ("owntest::total", reduction("x", dim="dim"), (X, -1), ["x 0 0", "x 1 1"]),
    "reduction, kept": ("owntest::total", reduction("x", dim="dim"), (X, 0, True), ["x 1 1", "x 2 2"]),
    "reduction, by number": ("owntest::total", reduction("x", dim=0), (X, 0), ["x 1 0", "x 2 1"]),
    "letters": (FOLD, axes("bs.", x="b.s."), (torch.empty(6, 3, 12, 2),), ["x 0 0", "x 2 1"]),
}
"""Kind -> the op, the rule, a call, and what it lets through: argument, dimension, dimension of the output."""


@pytest.mark.parametrize(("op", "kind", "args", "carried"), RIGHT.values(), ids=RIGHT.keys())
def test_a_right_rule_passes(op: str, kind: Any, args: tuple[Any, ...], carried: list[str]) -> None:
    cppass.rule(op, kind)
    checked = cppass.check_rule(op, args)
    assert [place.replace("dim ", "").replace("-> output ", "") for place in checked.carried] == carried
    assert "local rows give the rows of the whole" in str(checked)


def test_built_in_rules_can_be_checked() -> None:
    checked = cppass.check_rule("aten::mm", (torch.empty(12, 8), torch.empty(8, 6)))
    assert checked.carried == ("self dim 0 -> output dim 0", "mat2 dim 1 -> output dim 1")
    assert checked.mixed == ("self dim 1", "mat2 dim 0")


def test_padded_rows_and_bfloat16() -> None:
    cppass.rule(NORM, row_wise("x"))
    cppass.check_rule(NORM, (torch.empty(1, 13, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)))


WRONG: dict[str, tuple[str, Any, tuple[Any, ...], str]] = {
    "token-wise, but mixes": ("owntest::centred", pointwise, (X,), "tokens in x dim 1.*rank 0: values differ"),
    "whole rows, but normed over them": (NORM, pointwise, (X, X[0, 0]), "tokens in x dim 2.*values differ"),
    "an operand left out": ("owntest::flash_gate", row_wise("x", "y"), (X, X, X), "raised RuntimeError on local rows"),
    "another axis": (FOLD, axes("sb.", x="b.s."), (torch.empty(6, 2, 6, 3),), r"\[3, 6, 6\].*instead of"),
}


@pytest.mark.parametrize(("op", "kind", "args", "text"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_rule_is_found(op: str, kind: Any, args: tuple[Any, ...], text: str) -> None:
    cppass.rule(op, kind)
    with pytest.raises(cppass.ExtensionError, match=rf"(?s)CP205.*{op}.*{text}"):
        cppass.check_rule(op, args)


UNSEEN: dict[str, tuple[str, Any, tuple[Any, ...], str]] = {
    "nothing passes": (NORM, lambda node: None, (X, X[0, 0]), "lets no tokens through"),
    "too short": (NORM, row_wise("x"), (torch.empty(1, 3, 16), X[0, 0]), "lets no tokens through"),
    "all rows alike": ("owntest::zero", pointwise, (X,), "all rows of the output are alike"),
    "no number": ("owntest::root", pointwise, (X,), "returns NaN"),
}


@pytest.mark.parametrize(("op", "kind", "args", "text"), UNSEEN.values(), ids=UNSEEN.keys())
def test_a_check_that_would_see_nothing_fails(op: str, kind: Any, args: tuple[Any, ...], text: str) -> None:
    cppass.rule(op, kind)
    with pytest.raises(cppass.ExtensionError, match=rf"CP206.*{text}"):
        cppass.check_rule(op, args)


def test_values_may_be_ones_own() -> None:
    cppass.rule("owntest::root", pointwise)
    cppass.check_rule("owntest::root", (torch.rand(8, 12),), keep_values=True)


# -- nonsense ----------------------------------------------------------------------------------------------------------


def _raises(node: fx.Node) -> Axes:
    raise KeyError("hidden")


NONSENSE: dict[str, tuple[Any, str]] = {
    "no axes": (lambda node: ("b", "s", "h"), "a rule returns cppass.extend.Axes"),
    "raises": (_raises, "raised KeyError: 'hidden'"),
    "one operand forgotten": (lambda node: Axes((0, 1, None), ((0, 1, None),)), "labels 1 operands; the call has 2"),
    "too few axes": (axes("bs", x="bs"), r"gives the output the axes \('b', 's'\); that has 3 dimensions"),
    "a label twice": (axes("ss.", x="ss."), "two axes of the output one label"),
    "sizes that differ": (axes("bsh", x="bhs"), r"axis 'h' has \d+ rows in x and \d+ in the output"),
    "labels that are lists": (lambda node: Axes((0, [1], None), ((0, [1], None), (None,))), "labels are texts or"),  # type: ignore[arg-type]
    "labels that are no tuple": (lambda node: Axes([0, 1, None], ((0, 1, None), (None,))), "gives the output the axes"),  # type: ignore[arg-type]
    "an argument that is none": (lambda node: given(node, "y"), "has no argument 'y'"),
}


@pytest.mark.parametrize(("kind", "text"), NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_named(kind: Any, text: str) -> None:
    """While compiling: never a graph that is rewritten by half, nor another error."""
    cppass.rule(NORM, kind)
    with pytest.raises(cppass.ExtensionError, match=rf"(?s)CP204.*owntest::norm.*{text}"):
        run_pass(own.layer, own.layer_inputs())


def test_fallback_does_not_cover_it() -> None:
    cppass.rule(NORM, _raises)
    with pytest.raises(cppass.ExtensionError, match=r"CP204"):
        run_pass(own.layer, own.layer_inputs(), on_refusal="fallback")


# -- what cannot be registered -----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, Any, str]] = {
    "built in": ("aten::mm", pointwise, "CP020.*built-in rule"),
    "built in, another overload": ("aten::sum.dim_IntList", pointwise, "CP020.*built-in rule"),
    "by tag": ("aten::sin", pointwise, "CP020.*by its tag 'pointwise'"),
    "attention": ("aten::scaled_dot_product_attention", pointwise, "CP020.*is attention that cppass knows"),
    "no such op": ("owntest::nrom", pointwise, "CP021.*no such op"),
    "no such library": ("ontest::norm", pointwise, "CP021.*no such op"),
    "no name of an op": ("norm", pointwise, "CP021.*no such op"),
    "no op": (torch.nn.functional.silu, pointwise, "CP021.*no such op"),
    "which overload": ("aten::pow", pointwise, "CP021.*name one of its overloads: Tensor_Tensor"),
    "it writes": ("owntest::scaled_", pointwise, "CP021.*writes its arguments"),
    "it draws": ("aten::multinomial", pointwise, "CP021.*random numbers"),
    "no function": (NORM, "bs.", "CP022.*no function of a node"),
    "no instance": (NORM, Axes, "CP022.*no function of a node"),
    "an argument that is none": (NORM, row_wise("y"), "CP022.*'y', but owntest::norm has x, weight, eps"),
    "a letter for none": (NORM, axes("bs.", z="bs."), "CP022.*'z'"),
}


@pytest.mark.parametrize(("op", "kind", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_registered(op: Any, kind: Any, text: str) -> None:
    with pytest.raises(cppass.OptionError, match=text):
        cppass.rule(op, kind)
    assert cppass.registered() == ()


def test_registering_twice_is_an_error() -> None:
    cppass.rule(NORM, row_wise("x"))
    with pytest.raises(cppass.OptionError, match=r"CP020.*has a rule already: row_wise\('x', used=1\)"):
        cppass.rule(NORM, pointwise)
    assert cppass.registered() == ("rule owntest::norm: row_wise('x', used=1)",)


def test_taking_back_what_is_not_there_is_an_error() -> None:
    with pytest.raises(cppass.OptionError, match=r"CP021.*nothing is registered"):
        cppass.unregister(NORM)


def test_an_op_without_a_rule_cannot_be_checked() -> None:
    with pytest.raises(cppass.OptionError, match=r"CP021.*has no rule"):
        cppass.check_rule(NORM, (X, X[0, 0]))
