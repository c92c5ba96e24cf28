"""What becomes of a random case: rewritten and equal to one device, refused, or left alone. Anything else is an error.

A rank may be as far from the exact result (float64) as one device is, times FACTOR, or a few roundings of the largest
value where one device happens to be closer than that.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import LocalSource
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.config import CPConfig
from cppass.report import REFUSED, REWRITTEN
from cppass.simulator import lowered, run_in_lockstep

FACTOR = 8
LEAST = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest value of an output


class Wrong(AssertionError):
    """A rewritten graph gave another result than one device."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of tensors (it may write to them) with its inputs.

    Attributes:
        run: returns a tensor or several.
        inputs: float tensors have the dtype under test.
        exact: (outputs, inputs after the run) in float64; None takes one device's own.
        cp_size, options: for the pass.
        symbolic: trace with symbolic sizes; `other` are inputs of other sizes, for the same graph.
    """

    run: Callable[..., Any]
    inputs: Sequence[Tensor]
    exact: tuple[list[Tensor], list[Tensor]] | None
    cp_size: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    symbolic: bool = False
    other: Case | None = None


def outcome(case: Case) -> str:
    """ "rewritten", "refused CP201", "left alone".

    Raises:
        Wrong: a result differs.
        Exception: whatever the pass raises that is no refusal.
    """
    gm = traced(case)
    canonical = copy.deepcopy(gm)
    options = {"cp_size": case.cp_size, "on_refusal": "fallback", **case.options}
    try:
        report = cppass.run_pass(canonical, case.inputs, lower=False, **options)
    except cppass.Unsupported as error:
        return f"refused {error.code}"
    if report.status == REFUSED:
        return f"refused {report.refusals[0].code}"
    if report.status != REWRITTEN:
        return report.status
    try:
        graphs = [lowered(canonical, CPConfig(**options, rank=rank)) for rank in range(case.cp_size)]
    except cppass.Unsupported as error:
        return f"refused {error.code}"
    for fits in [case, *([case.other] if case.other is not None and _fits(canonical, case.other.inputs) else [])]:
        compare(fits, [canonical] * case.cp_size, "meanings")
        compare(fits, graphs, "lowered")
    return "rewritten"


def traced(case: Case) -> fx.GraphModule:
    """The graph as AOT hands it over: writes to inputs are copies at its end."""
    run = torch.func.functionalize(case.run, remove="mutations")
    with torch.no_grad():
        return make_fx(run, tracing_mode="symbolic" if case.symbolic else "fake")(*cloned(case.inputs))


def _fits(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether a graph of symbolic sizes was made for these, too: no guard speaks against it."""
    values = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    env = next(v.fake_mode.shape_env for v in values if isinstance(v, torch._subclasses.FakeTensor))
    names = [LocalSource(f"t{i}") for i in range(len(values))]  # as evaluate_guards_expression calls them
    guards = env.produce_guards(values, names, ignore_static=False)
    return all(env.evaluate_guards_expression(guard, list(inputs)) for guard in guards)  # torch joins "a or b" by "and"


def compare(case: Case, graphs: Sequence[fx.GraphModule], what: str) -> None:
    """Run the graphs of all ranks and compare what they return and write with one device; raises Wrong."""
    given = [cloned(case.inputs) for _ in graphs]
    with torch.no_grad():
        outputs = run_in_lockstep(graphs, given)
    agree(case, [as_list(seen) + after for seen, after in zip(outputs, given, strict=True)], what)


def agree(case: Case, ranks: Sequence[list[Tensor]], what: str) -> None:
    """Compare the outputs of each rank, and its inputs after the run, with one device.

    Raises:
        Wrong: a value is off, or not the same on every rank to the bit.
    """
    plain = alone(case)
    expected = plain[0] + plain[1]
    exact = expected if case.exact is None else case.exact[0] + case.exact[1]
    for rank, values in enumerate(ranks):
        for i, (x, one, true) in enumerate(zip(values, expected, exact, strict=True)):
            name = f"{what}, rank {rank}, " + (f"output {i}" if i < len(plain[0]) else f"input {i - len(plain[0])}")
            _compare_one(name, x, one, true)
            if one.is_contiguous() and not x.is_contiguous():
                raise Wrong(f"{name}: strides {x.stride()}, on one device {one.stride()}")
            if not torch.equal(x.nan_to_num(), ranks[0][i].nan_to_num()):
                raise Wrong(f"{name}: other bits than rank 0")


def _compare_one(name: str, x: Tensor, one: Tensor, true: Tensor) -> None:
    if x.shape != one.shape or x.dtype != one.dtype:
        raise Wrong(f"{name}: {x.dtype} {list(x.shape)}, on one device {one.dtype} {list(one.shape)}")
    if not x.is_floating_point():
        if not torch.equal(x, one):
            raise Wrong(f"{name}: other numbers")
        return
    if not (torch.equal(x.isnan(), one.isnan()) and torch.equal(x.isinf(), one.isinf())):
        raise Wrong(f"{name}: NaN or infinity elsewhere")
    if x.numel() == 0:
        return
    least = LEAST[x.dtype]
    x, one, true = (y.double().nan_to_num(posinf=0, neginf=0) for y in (x, one, true))
    largest = true.abs().max().item()
    allowed = max(FACTOR * (one - true).abs().max().item(), least * max(largest, 1e-3))
    off = (x - true).abs().max().item()
    if off > allowed:
        raise Wrong(f"{name}: off by {off:.2e} of {largest:.2e}, {allowed:.2e} are allowed")


def alone(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, inputs after the run) of one device."""
    own = cloned(case.inputs)
    with torch.no_grad():
        outputs = as_list(case.run(*own))
    return outputs, own


def cloned(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in inputs]


def as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
