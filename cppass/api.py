"""What people call who do not go through torch.compile: run_pass on a graph, explain on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cppass.capture import capture, install
from cppass.config import CPConfig
from cppass.errors import CPError, OptionError, refused_error
from cppass.pipeline import rewrite_graph
from cppass.ranks import ranks_without_group
from cppass.report import REFUSED, REWRITTEN, Report
from cppass.target import load, target_of


def run_pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: CPConfig | None = None,
    *,
    lower: bool = True,
    **options: Any,
) -> Report:
    """Apply the whole pass to an FX GraphModule, in place.

    Args:
        gm: aten ops; a snippet whose placeholders are q, k, v will do. In-place ops are functionalised, missing
            metadata is filled in.
        example_inputs: one per placeholder; their values are not used.
        config: options; or give them as keywords. `cp_size` is needed where there is no process group.
        lower: False keeps the canonical, rank-free `cppass::` ops.

    Returns:
        The report. `gm` is changed only if its status is "rewritten".

    Raises:
        OptionError: wrong options, a Torch-level trace, example inputs that do not fit.
        RefusedError: the graph cannot be rewritten (with on_refusal="raise").
    """
    config = CPConfig.merged(config, options)
    ranks = ranks_without_group(config)
    if not isinstance(gm, fx.GraphModule):
        raise OptionError(
            "CP009", f"run_pass takes an fx.GraphModule, not {type(gm).__name__}", "trace it with make_fx"
        )
    captured = capture(gm, example_inputs)
    report = rewrite_graph(captured, config, ranks.cp_size, ranks.group_name)
    if report.status == REFUSED and config.on_refusal == "raise":
        raise refused_error(report.refusals)
    if report.status == REWRITTEN and lower:
        load(target_of(captured, config)[0]).lower(captured, ranks, config)
    if report.status == REWRITTEN and captured is not gm:
        install(captured, gm)
    return report


def explain(
    model: Callable[..., Any],
    *args: Any,
    cp_size: int,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What the pass would do to a model, without a process group.

    Runs `model(*args, **kwargs)` once on this process, unsharded, so caches that are passed in are written.

    Args:
        model: a module or function, as one would give it to torch.compile.
        cp_size: number of ranks to plan for.
        dynamic: dynamic shapes, as torch.compile takes it.
        options: further options of the backend, such as {"strict": True}.

    Returns:
        The report of the graph with most attention sites; `notes` name the other graphs of the model (graph breaks).

    Raises:
        CPError: wrong options, or CP106, Dynamo captured no graph.
    """
    config = CPConfig.merged(CPConfig.from_options(options), {"cp_size": cp_size})
    if config.cp_size is None:
        raise OptionError("CP003", "cp_size=None is not allowed", "cp_size is an int of 1 or more")
    if not callable(model):
        raise OptionError("CP009", f"explain takes a model or function, not {type(model).__name__}", "pass the model")
    found: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        def look(aot_gm: fx.GraphModule, aot_inputs: Sequence[Any]) -> Callable[..., Any]:
            found.append(rewrite_graph(_copy(aot_gm), config, cp_size))
            return aot_gm.forward

        return aot_autograd(fw_compiler=look, keep_inference_input_mutations=True)(gm, example_inputs)

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    except Exception as error:
        if isinstance(ours := unwrap(error), CPError):
            raise ours from None
        raise
    if not found:
        raise CPError("CP106", "Dynamo captured no graph of this model", "see TORCH_LOGS=graph_breaks")
    best = max(found, key=lambda r: len(r.sites))
    others = tuple(f"another graph: {r.status}, {len(r.sites)} sites {r.reason}" for r in found if r is not best)
    return dataclasses.replace(best, notes=best.notes + others)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    copied = fx.Graph()
    copied.output(copied.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, copied)


def unwrap(error: BaseException) -> BaseException:
    """The CPError inside what torch.compile raised; the error itself where there is none.

    try:
        compiled(ids)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        print(cppass.unwrap(error))
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, CPError):
            return inner
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    return error
