"""Wrong options, calls, installations, steps and commands: one trigger a code. A process group of one rank stands."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from errors.bad import Bad
from errors.graph_triggers import Q, causal, run_pass
from errors.tiny_model import Tiny, token_ids
from runner.batches import batch_of
from torch import Tensor, fx
from typer.testing import CliRunner

import cppass
from cppass import cli
from cppass.cost import host
from cppass.demo import group, prefill
from cppass.demo.job import Job, phases
from cppass.demo.launch import run_phase
from cppass.errors import CPError
from cppass.runner import Bucket
from cppass.step_tag import check_steps

REFUSED_BY_TORCH = 2


def compiled(function: Callable[..., Any], *inputs: Any, **options: Any) -> Callable[[], Any]:
    """torch.compile in a world of one rank: whatever is wrong with options and group is seen there, too."""

    def act() -> Any:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(function, backend="npu_cp", options=options)(*inputs)

    return act


def double(x: Tensor) -> Tensor:
    return x * 2


ONES = torch.ones(4)


def with_gradients() -> None:
    torch._dynamo.reset()
    torch.compile(Tiny(), backend="npu_cp")(token_ids(1, 16))


def with_suppressed_errors() -> None:
    with torch._dynamo.config.patch(suppress_errors=True):
        compiled(double, ONES)()


def torch_level_trace() -> None:
    cppass.run_pass(fx.symbolic_trace(torch.nn.Linear(4, 4)), (ONES,), cp_size=2)


def one_input_too_few() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (a, b)))
    cppass.run_pass(fx.GraphModule({}, graph), (ONES,), cp_size=2)


OPTIONS = {
    "an option that is misspelt": Bad(
        "CP001", compiled(double, ONES, cpsize=2), ("'cpsize'",), "did you mean 'cp_size'?"
    ),
    "sharded inputs on the host": Bad(
        "CP002", compiled(double, ONES, inputs="sharded", sharded_inputs={"x": 0}, target="host"), ("target='host'",)
    ),
    "no ranks": Bad("CP003", compiled(double, ONES, cp_size=0), ("cp_size=0",), "1 or more"),
    "no number of ranks and no group": Bad(
        "CP004", lambda: _without_group(run_pass(causal, Q, Q, Q, cp_size=None)), ("cp_size",), "cp_size=2"
    ),
    "a group of no such name": Bad("CP005", compiled(double, ONES, group="nobody"), ("'nobody'",), "the group itself"),
    "another size than the group has": Bad(
        "CP006", compiled(double, ONES, cp_size=4), ("cp_size=4", "1 ranks"), "leave"
    ),
    "gradients": Bad("CP007", with_gradients, ("gradients",), "torch.no_grad()"),
    "suppressed errors": Bad("CP008", with_suppressed_errors, ("suppress_errors",), "False"),
    "a Torch-level trace": Bad("CP009", torch_level_trace, ("call_function", "linear"), "make_fx"),
    "one example input too few": Bad("CP010", one_input_too_few, ("1 example inputs for 2", "(a, b)"), "in order"),
}


def _without_group(act: Callable[[], Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        act()


# -- what is installed -------------------------------------------------------------------------------------------------


def missing(module: str, act: Callable[[], Any]) -> Callable[[], Any]:
    """`act` where a module cannot be imported."""

    def without() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            act()

    return without


def a_torch_npu_of_another_version() -> None:
    importlib.import_module("torch_npu")
    importlib.import_module("lowering.cann_host.kernels.library").kernel("npu_of_tomorrow")


def a_stream_of_an_npu() -> None:
    importlib.import_module("torch_npu").npu.current_stream()


def inductor_without_a_compiler() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False}):
        compiled(double, ONES, inner="inductor")()


INSTALLED = {
    "a target that is not installed": Bad(
        "CP501", missing("lowering.host", run_pass(causal, Q, Q, Q)), ("'host'", "cannot be imported"), "reinstall"
    ),
    "an inner compiler that is not installed": Bad(
        "CP502", missing("torchair", compiled(double, ONES, inner="torchair")), ("torchair",), 'inner="eager"'
    ),
    "a graph that is elsewhere": Bad("CP503", compiled(double, ONES.to("meta")), ("meta", "node"), "to the CPU"),
    "an op that torch_npu does not have": Bad("CP504", a_torch_npu_of_another_version, ("npu_of_tomorrow",), "2.13.0"),
    "an NPU where there is none": Bad("CP602", a_stream_of_an_npu, ("needs an NPU",), "force_eager"),
    "a failure below cppass": Bad("CP901", inductor_without_a_compiler, ("g++",), "report"),
}


# -- model runners -----------------------------------------------------------------------------------------------------

BATCH = batch_of([13, 50, 1], [0, 20, 30])


def tensors_of_two_steps() -> None:
    plans = [BATCH.plan(2) for _ in range(2)]
    check_steps(lambda *given: given, (2, 0, "balanced"))(*(plan.slot_mapping for plan in plans))


STEPS = {
    "lengths of another batch": Bad(
        "CP610",
        lambda: batch_of([13, 50]).plan(2, slot_mapping=BATCH.slots),
        ("add up to 63", "[64]"),
        "every new token",
    ),
    "a slot below 0": Bad(
        "CP611", lambda: BATCH.plan(2, slot_mapping=BATCH.slots - 200), ("slots from -",), "0 to slots - 1"
    ),
    "a block table too short": Bad(
        "CP612", lambda: BATCH.plan(2, block_table=BATCH.table[:, :4]), ("70 tokens", "hold 64"), "as many columns"
    ),
    "a step above its bucket": Bad(
        "CP613", lambda: BATCH.plan(2, bucket=Bucket(30, 3)), ("needs 32 rows",), "larger bucket"
    ),
    "rows of another step": Bad(
        "CP614", lambda: BATCH.plan(2).shard(torch.ones(40)), ("[40]", "64 tokens"), "the plan of"
    ),
    "a rank that is none": Bad("CP615", lambda: BATCH.plan(2, 2), ("rank 2 of 2",), "below it"),
    "tensors of two steps": Bad("CP616", tensors_of_two_steps, ("different steps",), "one plan"),
}


# -- commands ----------------------------------------------------------------------------------------------------------


def command(*words: str, **environment: str) -> Callable[[], Any]:
    """A command line that is refused as wrong usage: one message on standard error, and status 2."""

    def act() -> None:
        result = CliRunner(env=environment).invoke(cli.app, list(words))
        assert (result.exit_code, result.stdout) == (REFUSED_BY_TORCH, ""), result
        raise error_of(result.stderr)

    return act


def error_of(text: str) -> CPError:
    """The error that was shown, taken apart again."""
    code, _, rest = text.partition("error [")[2].partition("] ")
    message, _, hint = rest.strip().partition("\n  way out: ")
    return CPError(code, message, hint)


def not_installed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        command("run")()


def no_gloo() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_gloo_available", lambda: False)
        group.check_gloo()


TINY = Job(preset="qwen3-tiny", layers=1, tokens=32, decode=1, repeat=1, timeout=0.5)


def process(program: str, folder: Path) -> Callable[[], Any]:
    """A phase whose process is a small program instead of a rank."""

    def act() -> None:
        worker = folder / "worker"
        worker.write_text(f"#!{sys.executable}\n{program}")
        worker.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(worker))
            run_phase(TINY, phases(TINY)[0], folder, lambda text: None)

    return act


FAILING = """
import json
failure = {"kind": "ValueError", "message": "no", "hint": "--traceback shows where it was raised"}
print(json.dumps({"failure": json.dumps(failure)}))
"""


def caches_of_other_shapes(folder: Path) -> None:
    torch.save([torch.ones(1, 8), torch.ones(1, 2, 3, 4)], folder / "one_device.pt")
    prefill.compare([torch.ones(1, 8), torch.ones(1, 2, 5, 4)], folder / "one_device.pt")


def nothing_compiled() -> None:
    cppass.clear_reports()
    prefill.reported(TINY)


def a_link_that_is_not_there() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/true")
        host.measure_link(0.1)


def commands(folder: Path) -> dict[str, Bad]:
    """Rows whose files are in a folder of the test."""
    torchrun = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    return {
        "no tokens": Bad("CP050", command("run", "--tokens", "0"), ("--tokens 0",), "1 or more"),
        "a model that is not there": Bad("CP051", command("run", "--model", "/nowhere"), ("'/nowhere'",), "checkpoint"),
        "no ranks for a run": Bad("CP052", command("run", "--cp", "0"), ("--cp 0",), "1 to 64"),
        "a torch without gloo": Bad("CP053", no_gloo, ("without gloo",), "install a torch"),
        "ranks on two hosts": Bad(
            "CP054", command("run", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", **torchrun), ("several hosts",), "--nnodes 1"
        ),
        "an extra that is not installed": Bad("CP055", not_installed, ("transformers",), 'pip install "cppass[host]"'),
        "a rank that raises": Bad("CP650", process(FAILING, folder), ("raised ValueError: no",), "--traceback"),
        "a rank that ends": Bad(
            "CP651", process("raise SystemExit(3)", folder), ("ended with status 3",), "--traceback"
        ),
        "caches of other shapes": Bad(
            "CP652", lambda: caches_of_other_shapes(folder), ("(1, 2, 5, 4)",), "bug of cppass"
        ),
        "nothing that was compiled": Bad("CP653", nothing_compiled, ("reported nothing",), "compiled"),
        "a rank that says nothing": Bad(
            "CP654", process("import time; time.sleep(9)", folder), ("0.5 s",), "--timeout"
        ),
    }


@functools.cache
def one_rank() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


CALLS = {**OPTIONS, **INSTALLED, **STEPS}
