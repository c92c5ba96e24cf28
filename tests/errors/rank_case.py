"""A model, compiled on real ranks, beside the same model as it is: called alike, what comes of it?

What comes out is a text: "equal", the code of a CPError, or the type of what both raise.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from errors.tiny_model import Tiny, token_ids
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cppass

TOLERANCE = 1e-5
Call = Callable[[Callable[..., Any]], Any]
"""Calls a model, compiled or not, with inputs of its own each time."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is called, and how it is compiled."""

    model: Callable[..., Any]
    call: Call
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    compile: dict[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = TOLERANCE
    gradients: bool = False


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__.replace("_", " ")] = make
    return make


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a rank saw: "equal", a CP code, "both raise X" or what is wrong; the error's text; reports and warnings."""

    outcome: str
    text: str = ""
    statuses: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def seen(made: Case) -> Seen:
    torch._dynamo.reset()
    cppass.clear_reports()
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(made.gradients):
        warnings.simplefilter("always")
        outcome, text = _compared(made)
    said = tuple(str(w.message) for w in caught if issubclass(w.category, cppass.CPWarning))
    return Seen(outcome, text, tuple(r.status for r in cppass.reports()), said)


def _compared(made: Case) -> tuple[str, str]:
    expected = _result(made.call, made.model)
    options = {"options": made.options} if "mode" not in made.compile else {}
    run = torch.compile(made.model, backend="npu_cp", **options, **made.compile)
    got = _result(made.call, run)
    if isinstance(got, BaseException):
        ours = cppass.unwrap(got)
        if isinstance(ours, cppass.CPError):
            return ours.code, str(ours)
        if isinstance(expected, BaseException):
            return f"both raise {type(expected).__name__}", str(ours)
        torch._dynamo.reset()
        plain = _result(made.call, torch.compile(made.model, backend="eager", **made.compile))
        same = type(plain) is type(got)
        return f"torch.compile raises {type(got).__name__}" if same else f"raises {type(got).__name__}", str(got)
    if isinstance(expected, BaseException):
        return f"the plain model raises {type(expected).__name__}", str(expected)
    return ("equal", "") if _equal(expected, got, made.tolerance) else (f"differs by {_error(expected, got):.1e}", "")


def _result(call: Call, model: Callable[..., Any]) -> Any:
    try:
        return call(model)
    except Exception as error:
        return error


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _equal(expected: Any, got: Any, tolerance: float) -> bool:
    pairs = list(zip(_tensors(expected), _tensors(got), strict=True))
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in pairs
    )


def _error(expected: Any, got: Any) -> float:
    pairs = zip(_tensors(expected), _tensors(got), strict=True)
    return max((float((a.float() - b.float()).abs().max()) for a, b in pairs if a.shape == b.shape), default=torch.inf)


def on(*inputs: Any, **named: Any) -> Call:
    """Call with copies of these inputs; what is written in place is a result, too."""

    def call(model: Callable[..., Any]) -> Any:
        given, keywords = copy.deepcopy((inputs, named))
        return model(*given, **keywords), given, keywords

    return call


def after(act: Callable[[Tensor, Tensor], Any]) -> Case:
    """Something that is done with the logits and the token ids of a model."""
    model = Tiny()
    return Case(lambda ids: act(model(ids), ids), on(token_ids(1, 16)))
