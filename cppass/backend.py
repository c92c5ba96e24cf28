"""npu_cp: the backend of torch.compile. Dynamo graph -> AOT -> the pass -> a target -> what runs.

torch.compile(model, backend="npu_cp", options={"inner": "eager"})
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from cppass import torch_private
from cppass.config import CPConfig
from cppass.contents import contents_of
from cppass.errors import CPError, CPWarning, InternalError, OptionError, PeerError, Unsupported, refused_error
from cppass.fingerprint import fingerprint
from cppass.guard import agreed, agreed_once, varying_inputs
from cppass.logs import log_graph
from cppass.party import Party, party_of
from cppass.pipeline import rewrite_graph
from cppass.ranks import ranks_of
from cppass.report import LEFT_ALONE, REFUSED, REWRITTEN, Report, record
from cppass.step_tag import check_steps
from cppass.target import Ranks, load, target_of

Compiled = Callable[..., Any]


def npu_cp(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend: called by Dynamo once per graph. Options are the fields of CPConfig.

    Raises:
        CPError: wrong options, gradients, a graph that cannot be rewritten (wrapped by Dynamo as the `inner_exception`
            of BackendCompilerFailed). Under `suppress_errors` Dynamo would run the model silently unsharded instead, so
            then the error is raised by the compiled graph when it is called.
    """
    try:
        config = CPConfig.from_options(options, mode)
        _refuse_suppressed_errors()
        _warn_of_recompile_limit()
        ranks = ranks_of(config)
        party_of(ranks, config.agreement_timeout)  # from here on the others can tell if this process ends
        return _through_aot(gm, example_inputs, config, ranks)
    except torch_private.RESTARTS:
        raise
    except Exception as error:
        failure = error if isinstance(error, CPError) else _internal(error)
        _tell_the_others(failure, options)
        if torch._dynamo.config.suppress_errors:
            return _raising(failure)
        if failure is error:
            raise
        raise failure from error


def _through_aot(gm: fx.GraphModule, example_inputs: Sequence[Any], config: CPConfig, ranks: Ranks) -> Compiled:
    """AOT: functional aten graph, input mutations as a copy_ epilogue. No gradients."""
    from torch._dynamo.backends.common import aot_autograd

    names = torch_private.dynamo_inputs(gm)

    def inference(aot_gm: fx.GraphModule, aot_inputs: Sequence[Any]) -> Compiled:
        return compile_graph(aot_gm, aot_inputs, config, ranks, torch_private.aot_inputs(aot_gm.graph, names))

    compiler = aot_autograd(
        fw_compiler=_refuse_gradients, inference_compiler=inference, keep_inference_input_mutations=True
    )
    return compiler(gm, example_inputs)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: CPConfig,
    ranks: Ranks,
    input_names: Mapping[str, str] | None = None,
) -> Compiled:
    """One functional aten graph -> what runs it on this rank. Boxed or plain, as the target returns it."""
    report = rewrite_graph(gm, config, ranks.cp_size, ranks.group_name, input_names)
    number = torch_private.compile_number()
    report = dataclasses.replace(report, graph=number[0] if number else "")
    if report.status == REWRITTEN:
        report = dataclasses.replace(report, notes=(*report.notes, *_relaxed(config)))
    record(report)
    if report.status == REFUSED:
        _refused(report, config)
    if report.status == LEFT_ALONE and report.notes:
        warnings.warn(f"cppass: {report.notes[0]}", CPWarning, stacklevel=2)
    name, inner = target_of(gm, config)
    _check_devices(gm, name)
    target = load(name)
    party = party_of(ranks, config.agreement_timeout) if report.takes_part else None
    agree = _agreement(gm, report, config, party, input_names) if party else None
    if report.status == REWRITTEN:
        target.lower(gm, ranks, config)
        log_graph("lowered", gm.graph)
    run = target.compile(gm, example_inputs, inner)
    run = agree(run) if agree else run
    if report.status == REWRITTEN and config.inputs == "sharded":
        return check_steps(run, (ranks.cp_size, ranks.rank, config.remainder or "balanced"), party)
    return run


def _agreement(
    gm: fx.GraphModule, report: Report, config: CPConfig, party: Party, input_names: Mapping[str, str] | None
) -> Callable[[Compiled], Compiled]:
    """What puts the agreement in front of what runs this graph, which is not lowered yet: no rank is in it."""
    mark = fingerprint(gm.graph, report.what, config)
    if report.status != REWRITTEN:
        return lambda run: agreed_once(run, party, mark)
    varying, contents = varying_inputs(gm, input_names), contents_of(gm, input_names)
    return lambda run: agreed(run, party, mark, varying, contents, config)


def _relaxed(config: CPConfig) -> Iterator[str]:
    """What ranks do not compare because an option says so."""
    if config.agreement == "graph":
        yield "agreement='graph': ranks compare the first step of this graph alone"
    if config.check_inputs is False:
        yield "check_inputs=False: ranks compare neither token ids nor weights"


def _check_devices(gm: fx.GraphModule, target: str) -> None:
    """The host target is for graphs whose tensors are in host memory."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if target == "host" and isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise Unsupported(
                "CP503",
                f"the graph has tensors on {value.device} (node {node.name}); target 'host' runs on the CPU",
                "move the model and its inputs to the CPU, or use target='npu' on an NPU",
            )


def _refused(report: Report, config: CPConfig) -> None:
    error = refused_error(report.refusals)
    if config.on_refusal == "raise":
        raise error
    warnings.warn(f"cppass: this graph runs unsharded on every rank: {error}", CPWarning, stacklevel=2)


def _refuse_gradients(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    raise OptionError(
        "CP007",
        "gradients are needed for this graph; npu_cp compiles inference only",
        "call the compiled model under torch.no_grad() or torch.inference_mode()",
    )


def _tell_the_others(failure: CPError, options: Mapping[str, Any] | None) -> None:
    """A rank that cannot compile does not come to the step that the others wait in."""
    if isinstance(failure, PeerError) or not (dist.is_available() and dist.is_initialized()):
        return
    with contextlib.suppress(Exception):  # the options may be what is wrong
        party = party_of(ranks_of(CPConfig(group=(options or {}).get("group"))))
        if party:
            party.fail(failure)


def _refuse_suppressed_errors() -> None:
    if torch._dynamo.config.suppress_errors:
        raise OptionError(
            "CP008",
            "torch._dynamo.config.suppress_errors is set: a failure would silently run the model unsharded",
            "set torch._dynamo.config.suppress_errors = False (and unset TORCHDYNAMO_SUPPRESS_ERRORS)",
        )


def _warn_of_recompile_limit() -> None:
    """Past its limit Dynamo runs a function eagerly: right, but on every rank the whole of it."""
    number = torch_private.compile_number()
    limit = torch._dynamo.config.recompile_limit
    if number is None or number[1] + 1 < limit:
        return
    note = (
        f"graph {number[0]} is the last one Dynamo compiles for this function (recompile_limit={limit}): calls that "
        "fit none of its graphs will run eagerly, unsharded, on every rank"
    )
    record(Report(LEFT_ALONE, reason=note, graph=number[0]))
    warnings.warn(f"cppass: {note}; use dynamic=True, or raise the limit", CPWarning, stacklevel=2)


def _internal(error: Exception) -> InternalError:
    return InternalError(
        "CP901",
        f"compilation failed: {type(error).__name__}: {error}",
        "please report this with the traceback; on_refusal does not cover it, backend='eager' runs the model unsharded",
    )


def _raising(error: CPError) -> Compiled:
    def run(*args: Any) -> Any:
        raise error

    return run
