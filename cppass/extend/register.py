"""Registering a rule or a site form for an op of another library. Fails closed: nothing is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import fx

from cppass import registry, torch_private
from cppass.axes import AxesOf
from cppass.errors import OptionError, Refusal
from cppass.extend.sane import SaneAxes, SaneForm
from cppass.match import matcher_of
from cppass.op_rules import rule_of
from cppass.registry import RULE, SITE_FORM, Registration
from cppass.rules import AxisRule
from cppass.site import AttentionSite

Form = Callable[[fx.Node], "AttentionSite | Refusal"]
R = TypeVar("R", bound=AxesOf)
F = TypeVar("F", bound=Form)


@overload
def rule(op: Any, axes: None = None) -> Callable[[R], R]: ...
@overload
def rule(op: Any, axes: R) -> R: ...
def rule(op: Any, axes: Any = None) -> Any:
    """Say what an op does to the token axis: how it runs on a rank's rows alone.

    cppass.rule("mylib::gate", pointwise)                  # a kind of cppass.extend
    cppass.rule("mylib::mix", axes("bsf", x="bs."))        # axes by letters


    @cppass.rule("mylib::norm")                            # or a function of the call
    def norm(node: fx.Node) -> Axes | None: ...

    Args:
        op: "mylib::gate", torch.ops.mylib.gate, or what torch.library.custom_op returned. Functional, not random.
        axes: called with each call of the op, as an fx.Node; returns which axes of the operands are which axes of the
            output (Axes), None where the call mixes tokens. Left out, this is a decorator.

    Returns:
        What was registered, unchanged.

    Raises:
        OptionError: CP020, the op has a rule or is attention; CP021, there is no such op, or none that can have a rule;
            CP022, not something that can be registered.
    """
    if axes is None:
        return lambda function: rule(op, function)
    target = _functional(op, RULE)
    _check_reader(target, axes, RULE)
    read = AxisRule(SaneAxes(target.name(), axes))
    registry.add(Registration(RULE, target.name(), read, registry.identity_of(axes)))
    return axes


@overload
def site_form(op: Any, form: None = None) -> Callable[[F], F]: ...
@overload
def site_form(op: Any, form: F) -> F: ...
def site_form(op: Any, form: Any = None) -> Any:
    """Say how calls of an op are attention, so that they are rewritten as scaled_dot_product_attention is.

    @cppass.site_form("mylib::attend")
    def attend(node: fx.Node) -> AttentionSite | Refusal:
        q, k, v = (given(node, name) for name in ("q", "k", "v"))
        return attention_site(node, query=q, key=k, value=v, causal=Causal())

    Args:
        op: as for rule.
        form: called with each call of the op; returns its AttentionSite (see cppass.extend.attention_site), or a
            Refusal where the call is not supported (cppass.extend.refusal). Left out, this is a decorator.

    Raises:
        OptionError: as rule does.
    """
    if form is None:
        return lambda function: site_form(op, function)
    target = _functional(op, SITE_FORM)
    _check_reader(target, form, SITE_FORM)
    read = SaneForm(target.name(), form)
    registry.add(Registration(SITE_FORM, target.name(), read, registry.identity_of(form)))
    return form


def unregister(op: Any) -> None:
    """Take back a rule or site form, to register another. Graphs that are compiled already stay as they are.

    Raises:
        OptionError: CP021, nothing is registered for the op.
    """
    target = overload_of(op)
    if not registry.remove(target.name()):
        raise OptionError("CP021", f"nothing is registered for {target.name()}", "see cppass.registered()")


def overload_of(op: Any) -> Any:
    """The overload that is meant; CP021 where there is none."""
    try:
        return torch_private.overload_of(op)
    except LookupError as error:
        raise OptionError("CP021", f"{op}: {error}", "import or define the op first (torch.library)") from error


def _functional(op: Any, kind: str) -> Any:
    """An op that a rule or site form may be registered for."""
    target = overload_of(op)
    node = fx.Graph().call_function(target)
    name = target.name()
    taken = registry.find(name)
    if taken is not None:
        raise OptionError("CP020", f"{name} has a {taken.kind} already: {taken.identity}", "cppass.unregister it first")
    if matcher_of(node) is not None:
        raise OptionError("CP020", f"{name} is attention that cppass knows", "leave the registration out")
    if rule_of(node) is not None:
        tagged = " by its tag 'pointwise'" if torch.Tag.pointwise in target.tags else ""
        raise OptionError("CP020", f"{name} has a built-in rule{tagged}", "leave the registration out")
    if target._schema.is_mutable:
        why = f"{name} writes its arguments; a {kind} is for an op that returns what it makes"
        raise OptionError("CP021", why, "define a functional form of the op, and register that")
    if torch.Tag.nondeterministic_seeded in target.tags:
        why = f"{name} draws random numbers: ranks would draw different ones than one device"
        raise OptionError("CP021", why, "take the op out of the compiled model")
    return target


def _check_reader(target: Any, reader: Any, kind: str) -> None:
    if not callable(reader) or isinstance(reader, type):
        raise OptionError(
            "CP022",
            f"the {kind} of {target.name()} is {reader!r}, which is no function of a node",
            "pass a function, or a kind such as cppass.extend.pointwise",
        )
    arguments = [a.name for a in target._schema.arguments]
    wrong = [name for name in getattr(reader, "names", ()) if name not in arguments]
    if wrong:
        raise OptionError(
            "CP022",
            f"{reader!r} names {', '.join(map(repr, wrong))}, but {target.name()} has {', '.join(arguments)}",
            "name arguments as the op's schema does",
        )
