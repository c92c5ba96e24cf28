"""What people call who do not go through torch.compile: run_pass on a graph, explain on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cppass import torch_private
from cppass.capture import capture, install
from cppass.config import CPConfig
from cppass.cost import HARDWARE, Hardware
from cppass.errors import CPError, OptionError, refused_error
from cppass.inspection import Explanation, Seen, explanation_of
from cppass.pipeline import hardware_of, rewrite_graph, run_stages
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
    hardware: str | Hardware | None = None,
    **kwargs: Any,
) -> Explanation:
    """What the pass would do to a model, without a process group: print it, or see docs/explain.md.

    Runs `model(*args, **kwargs)` once on this process, unsharded, so caches that are passed in are written. With
    inputs="sharded" a graph returns zeros instead: rows of one rank cannot run alone.

    Args:
        model: a module or function, as one would give it to torch.compile.
        cp_size: number of ranks to plan for.
        dynamic: dynamic shapes, as torch.compile takes it.
        options: further options of the backend, such as {"strict": True}.
        hardware: whose figures the cost is told by: a name in cppass.cost.HARDWARE or a cppass.cost.Hardware. None: the
            options' `hardware`, else "ascend-910b" for graphs of NPU ops and "host-core" for others.

    Returns:
        The report of the graph that decides (a refused one, else the one with most attention sites), with all graphs of
        the model, every refusal, the states of all nodes, layout and cost.

    Raises:
        OptionError: wrong options, or no such hardware.
        CPError: CP106, Dynamo captured no graph.
    """
    return explain_call(model, args, kwargs, cp_size, dynamic, options, hardware)[0]


def explain_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cp_size: int,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    hardware: str | Hardware | None = None,
) -> tuple[Explanation, Any]:
    """The same, and what the model returned."""
    config = CPConfig.from_options({**(options or {}), "cp_size": cp_size})
    device = _hardware(hardware)
    found: list[Seen] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        names = torch_private.dynamo_inputs(gm)

        def look(aot_gm: fx.GraphModule, aot_inputs: Sequence[Any]) -> Callable[..., Any]:
            inputs = torch_private.aot_inputs(aot_gm.graph, names)
            stages = run_stages(_copy(aot_gm), config, cp_size, input_names=inputs, every_refusal=True)
            number = torch_private.compile_number()
            report = dataclasses.replace(stages.report, graph=number[0] if number else "")
            stages = dataclasses.replace(stages, report=report)
            found.append(Seen(stages, device or hardware_of(aot_gm, config), inputs))
            return aot_gm.forward if config.inputs == "replicated" else _blank(aot_gm)

        return aot_autograd(fw_compiler=look, keep_inference_input_mutations=True)(gm, example_inputs)

    torch._dynamo.reset()
    broken = torch_private.graph_breaks()
    try:
        with torch.no_grad():
            result = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        ours = unwrap(error)
        if ours is error:
            raise
        raise ours from error
    if not found:
        raise CPError("CP106", "Dynamo captured no graph of this model", "see TORCH_LOGS=graph_breaks")
    breaks = tuple(r for r, times in torch_private.graph_breaks().items() if times > broken.get(r, 0))
    return explanation_of(_title(model), found, breaks), result


def _hardware(given: str | Hardware | None) -> Hardware | None:
    if isinstance(given, str) and given not in HARDWARE:
        raise OptionError("CP003", f"hardware {given!r} is not known", f"choose one of {', '.join(HARDWARE)}")
    return HARDWARE[given] if isinstance(given, str) else given


def _blank(gm: fx.GraphModule) -> Callable[..., Any]:
    """What returns zeros in place of running a graph of local rows: slots of all ranks do not fit the rows of one."""
    (outputs,) = next(node.args for node in gm.graph.nodes if node.op == "output")
    values = [x.meta.get("val") if isinstance(x, fx.Node) else x for x in outputs]

    def run(*args: Any) -> list[Any]:
        return [torch_private.zeros_like(v) if isinstance(v, torch.Tensor) else v for v in values]

    return run


def _title(model: Callable[..., Any]) -> str:
    """ "Qwen3ForCausalLM", or the name of a function."""
    return str(getattr(model, "__name__", "") or type(model).__name__)


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
