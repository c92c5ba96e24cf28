"""Rules and site forms of other libraries that are wrong: one trigger a code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from errors.bad import Bad
from errors.graph_triggers import run_pass
from extending import own_ops as own
from extending.own_ops import rand
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass import registry
from cppass.extend import pointwise, refusal


def registering(register: Callable[[], object], then: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
    """Register, try, and leave nothing registered."""

    def act() -> Any:
        kept = dict(registry._registrations)
        try:
            register()
            return then()
        finally:
            registry._registrations.clear()
            registry._registrations.update(kept)

    return act


X, Q = rand(1, 16, own.F), rand(1, own.H, 16, own.D)


def centred_attention(x: Tensor) -> Tensor:
    q = own.centred(x).unflatten(2, (own.H, own.D)).transpose(1, 2)
    return scaled_dot_product_attention(q, q, q, is_causal=True)


def own_attention(q: Tensor) -> Tensor:
    return own.attend(q, q, q, None, True, 0.5)


EXTENSIONS = {
    "a rule for an op that has one": Bad(
        "CP020", registering(lambda: cppass.rule("aten::relu", pointwise)), ("aten::relu", "built-in rule"), "leave"
    ),
    "a rule for no op": Bad(
        "CP021", registering(lambda: cppass.rule("owntest::nothing", pointwise)), ("owntest::nothing",), "define the op"
    ),
    "a rule that is a number": Bad(
        "CP022", registering(lambda: cppass.rule(own.centred, 3)), ("owntest::centred is 3",), "pass a function"
    ),
    "a rule that returns nonsense": Bad(
        "CP204",
        registering(lambda: cppass.rule(own.centred, lambda node: "bs."), run_pass(centred_attention, X)),
        ("the rule of owntest::centred", "'bs.'"),
    ),
    "a rule that is wrong": Bad(
        "CP205",
        registering(lambda: cppass.rule(own.centred, pointwise), lambda: cppass.check_rule(own.centred, (X,))),
        ("the rule of owntest::centred is wrong", "rank 0"),
        "where the op mixes rows",
    ),
    "a rule of which nothing can be seen": Bad(
        "CP206",
        registering(lambda: cppass.rule(own.zero, pointwise), lambda: cppass.check_rule(own.zero, (X,))),
        ("nothing is proven of the rule of owntest::zero",),
    ),
    "a site form that returns nonsense": Bad(
        "CP115",
        registering(lambda: cppass.site_form(own.attend, lambda node: 3), run_pass(own_attention, Q)),
        ("the site form of owntest::attend returned int",),
    ),
    "a site form that refuses": Bad(
        "CP116",
        registering(
            lambda: cppass.site_form(own.attend, lambda node: refusal(node, "no such scale", "scale=1")),
            run_pass(own_attention, Q),
        ),
        ("no such scale",),
        "scale=1",
    ),
}
