"""From whatever FX graph a caller has to the one form the pass reads: functional aten, with metadata.

before:  kc.index_copy_(2, pos, k)                after:  new = index_copy(kc, 2, pos, k); kc.copy_(new)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from cppass.errors import OptionError
from cppass.explain_node import op_of

COPY = torch.ops.aten.copy_.default


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """A functional module with metadata that computes what `gm` does: `gm` itself where it already is one.

    Raises:
        OptionError: CP009, a Torch-level trace (modules, methods, torch functions instead of aten ops) or a graph that
            was rewritten before, or CP010, example inputs that do not fit the placeholders or that the graph fails on.
    """
    _refuse_torch_level(gm)
    _refuse_rewritten(gm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    check_inputs(example_inputs)
    described = all("val" in n.meta for n in gm.graph.nodes if n.op not in ("get_attr", "output"))
    if _functional(gm.graph) and described:
        return gm
    if len(example_inputs) != len(placeholders):
        names = ", ".join(str(n.target) for n in placeholders)
        raise OptionError(
            "CP010",
            f"{len(example_inputs)} example inputs for {len(placeholders)} placeholders ({names})",
            "pass one example input per placeholder, in order",
        )
    traced = _functional_trace(gm, example_inputs)
    targets = iter(str(n.target) for n in placeholders)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.target = next(targets)
    traced.recompile()
    return traced


def install(source: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Give `gm` the graph of `source`, and under new names the attributes that it reads."""
    for node in source.graph.nodes:
        if node.op == "get_attr":
            value = getattr(source, str(node.target))
            node.target = _new_name(gm, str(node.target))
            setattr(gm, node.target, torch.nn.Buffer(value) if type(value) is torch.Tensor else value)
    gm.graph = source.graph
    gm.recompile()


def _new_name(gm: fx.GraphModule, name: str) -> str:
    number = 0
    while hasattr(gm, f"captured_{name}_{number}"):
        number += 1
    return f"captured_{name}_{number}"


def check_inputs(example_inputs: Any) -> None:
    """Raises OptionError (CP010) where they are not a list, such as one tensor alone."""
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str):
        raise OptionError(
            "CP010",
            f"example inputs are a {type(example_inputs).__name__}",
            "pass a list or tuple, one per placeholder",
        )


def trace(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """The aten ops of a function, with metadata; sizes become numbers.

    Raises:
        OptionError: CP010, the function fails on these inputs, or decides by their values.
    """
    fake = any(isinstance(x, torch._subclasses.FakeTensor) for x in inputs)
    try:
        with torch.no_grad():
            return make_fx(function, tracing_mode="real" if fake else "fake", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise OptionError(
            "CP010",
            f"it cannot be traced with these inputs: {type(error).__name__}: {error}",
            "pass inputs that it runs on; a branch or a size that depends on values cannot be traced",
        ) from error


def _functional_trace(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    def run(*args: Any) -> Any:
        return fx.Interpreter(gm).run(*args)

    return trace(run if _functional(gm.graph) else torch.func.functionalize(run, remove="mutations"), inputs)


def _functional(graph: fx.Graph) -> bool:
    """No op writes in place, but for an epilogue of copy_ into inputs."""
    epilogue = False
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            target = node.args[0] if node.args else None
            if node.target is not COPY or not isinstance(target, fx.Node) or target.op != "placeholder" or node.users:
                return False
            epilogue = True
        elif epilogue and node.op != "output":
            return False
    return True


def _refuse_torch_level(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        nested = node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), fx.GraphModule)
        if nested:
            _refuse_torch_level(gm.get_submodule(str(node.target)))  # type: ignore[arg-type]
        elif node.op in ("call_module", "call_method") or (node.op == "call_function" and not _is_aten(node.target)):
            raise OptionError(
                "CP009",
                f"a Torch-level trace: {node.op} {op_of(node)} (node {node.name}) is not an aten op",
                "trace with torch.fx.experimental.proxy_tensor.make_fx(fn)(*inputs), or compile with backend='npu_cp'",
            )


def _refuse_rewritten(gm: fx.GraphModule) -> None:
    own = next((n for n in gm.graph.nodes if getattr(n.target, "namespace", "") in ("cppass", "cppass_host")), None)
    if own is not None:
        raise OptionError(
            "CP009", f"the pass has been applied to this graph before ({op_of(own)}, node {own.name})", "trace it anew"
        )


def _is_aten(target: Any) -> bool:
    """Ops of the dispatcher, and Python arithmetic on sizes."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return True
    return getattr(target, "__module__", "") in ("_operator", "math", "builtins") or target in (
        operator.getitem,
        torch.sym_max,
        torch.sym_min,
        torch.sym_float,
        torch.sym_int,
        torch.sym_not,
    )
