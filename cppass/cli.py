"""The command `cppass`. Commands parse, call what does the work, and print what it returns.

Nothing here imports torch before a command runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cppass import CPError, OptionError, __version__
from cppass.bench.sections import SECTIONS
from cppass.cost import HARDWARE, MODELS
from cppass.demo.job import DIALECTS, DTYPES, Job, check_timeout
from cppass.demo.presets import PRESETS
from cppass.errors import InternalError

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit(f'cppass: the command line needs {missing.name}; pip install "cppass[host]"') from missing

from cppass.cli_explain import explain
from cppass.usage import INSTALL_PLOT, NEEDS, fail, need, tell

if TYPE_CHECKING:
    from cppass.demo.outcome import Outcome

DEFAULTS = Job(decode=0)
DECODE = 8
HF, NPU = DIALECTS["hf"], DIALECTS["npu"]

app = typer.Typer(
    help='Prefill context parallelism as a torch.compile pass: torch.compile(model, backend="npu_cp").',
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console entry point. What nobody foresaw is told in one message, too."""
    try:
        app(prog_name="cppass")
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        text = f"{type(error).__name__}: {error}"
        tell(
            InternalError("CP901", text, "please report it, with what cppass --traceback ... shows"),
            "--json" in sys.argv,
        )
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cppass {__version__}")
        raise typer.Exit


@app.callback()
def _cppass(
    trace: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error of cppass itself.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def run(
    dialect: Annotated[
        str, typer.Option(metavar="KIND", help="How the model is written: hf (transformers), npu (torch_npu's ops).")
    ] = DEFAULTS.dialect,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help=f"Random weights: {', '.join(PRESETS)}.")
    ] = DEFAULTS.preset,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="A local checkpoint, instead of a preset.")] = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Build so many layers.")] = None,
    vocab: Annotated[int | None, typer.Option(metavar="N", help="Size of a preset's vocabulary.")] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Prompt length, of each sequence.")] = DEFAULTS.tokens,
    cp: Annotated[
        int | None, typer.Option(metavar="P", help="Ranks of one thread each. Default: 2, or what torchrun started.")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(metavar="N", help="Decode steps after the prefill. Default: 8; 0 without a cache.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences.")] = DEFAULTS.batch,
    cache: Annotated[
        str, typer.Option(metavar="KIND", help=f"K/V cache, with hf: {', '.join(HF.caches)}. Default: the first.")
    ] = "",
    attention: Annotated[
        str, typer.Option(metavar="KIND", help=f"attn_implementation: {', '.join(HF.attentions)}. Default: the first.")
    ] = "",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help=", ".join(DTYPES) + ".")] = DEFAULTS.dtype,
    dynamic: Annotated[
        bool | None, typer.Option("--dynamic/--static", help="torch.compile's dynamic. Default: torch decides.")
    ] = None,
    inner: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Compiles the rewritten graph. Default: the first of "
            + f"{', '.join(HF.inners)} with hf, of {', '.join(NPU.inners)} with npu.",
        ),
    ] = "",
    repeat: Annotated[int, typer.Option(metavar="N", help="Timed prefills; the median counts.")] = DEFAULTS.repeat,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights and prompt.")] = DEFAULTS.seed,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds any one step may take.")] = DEFAULTS.timeout,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    trace: Annotated[bool, typer.Option("--traceback", help="With an error, show where a rank raised it.")] = False,
) -> None:
    """Prefill one prompt on one device and, compiled with npu_cp, on P ranks; compare and time them.

    With --dialect npu, torch_npu's ops run on CPU kernels: no NPU is needed, and none is used; speed is not judged.
    A rank is a process of one thread and stands for a device. Exit status: 0 every rank equals one device, 1 it does
    not or something failed, 2 wrong usage. Under torchrun its processes are the ranks.
    """
    from cppass.demo.torchrun import detect

    try:
        need(*NEEDS.get(dialect, NEEDS["hf"]))
        world = detect()
        if world and cp not in (None, world.size):
            raise OptionError("CP052", f"--cp {cp}, but torchrun started {world.size} ranks", "leave --cp out")
        job = Job(
            dialect=dialect,
            preset=preset,
            model=model,
            layers=layers,
            vocab=vocab,
            tokens=tokens,
            ranks=world.size if world else 2 if cp is None else cp,
            decode=decode if decode is not None else 0 if cache == "none" else DECODE,
            batch=batch,
            cache=cache,
            attention=attention,
            dtype=dtype,
            dynamic=dynamic,
            inner=inner,
            repeat=repeat,
            seed=seed,
            timeout=timeout,
        )
    except OptionError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # every rank of torchrun sees the same arguments; one says so
            raise typer.Exit(2) from None
        fail(error, as_json, trace, status=2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` ends the ranks
    try:
        outcome = _outcome(job)
    except CPError as error:
        fail(error, as_json, trace, status=1)
    except KeyboardInterrupt:
        typer.echo("interrupted; all processes have ended", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if outcome is not None:
        _show(outcome, as_json)


app.command()(explain)


@app.command()
def bench(
    sections: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION]...", help=f"Of {', '.join(SECTIONS)}. Default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: they show that it works.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write DIR/SECTION.md, and .svg plots with matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    trace: Annotated[bool, typer.Option("--traceback", help="With an error, show where a rank raised it.")] = False,
) -> None:
    """Measure what is claimed of the pass: both sides in turns in one run, as ratios. An idle machine is needed.

    Exit status: 0 measured, 1 something failed, 2 wrong usage.
    """
    from cppass.bench.record import make_folder
    from cppass.bench.sections import chosen

    try:
        wanted = chosen(sections or ())
        if any(section.models for section in wanted.values()):
            need(*NEEDS["hf"])
        if out is not None:
            make_folder(out)
    except OptionError as error:
        fail(error, as_json, trace, status=2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` ends the ranks
    from cppass.bench.command import measure_all

    try:
        measured = measure_all(wanted, tuple(sections or ()), quick, out, None if as_json else Console())
    except CPError as error:
        fail(error, as_json, trace, status=1)
    except KeyboardInterrupt:
        typer.echo("interrupted; all processes have ended", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if as_json:
        typer.echo(json.dumps(measured))


@app.command()
def cost(
    preset: Annotated[
        str, typer.Option(metavar="NAME", help=f"The published shape of a model: {', '.join(MODELS)}.")
    ] = "qwen3-8b",
    hardware: Annotated[
        str, typer.Option(metavar="NAME", help=f"{', '.join(HARDWARE)}, or host: measure this one.")
    ] = "ascend-910b",
    tokens: Annotated[int, typer.Option(metavar="N", help="Prompt length, one sequence.")] = 32768,
    ranks: Annotated[str, typer.Option(metavar="P,...", help="Numbers of ranks.")] = "2,4,8,16",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw TTFT against length; .svg, .png or .pdf.")
    ] = None,
) -> None:
    """Predict TTFT, bytes and memory on P ranks: context parallelism against TP, Ulysses, ring and one device.

    Closed forms and a device's figures; no model is built. What is measured and what is not stands below the table.
    """
    from cppass.cost.answer import Question, answer, ranks_of
    from cppass.cost.plot import check, draw

    try:
        question = Question(preset, hardware, tokens, ranks_of(ranks))
        if plot is not None:
            check(plot)
            need(INSTALL_PLOT, "matplotlib")
        found = answer(question)
    except CPError as error:
        fail(error, as_json, False, status=2 if isinstance(error, OptionError) else 1)
    if plot is not None:
        draw(found, plot)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        from cppass.cost.table import render

        render(found, Console())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds each import may take.")] = 120,
) -> None:
    """Say what this machine has, how far each target gets on it, and the way out of what is broken.

    Exit status: 0 the host job can run, 1 something is broken.
    """
    from cppass.doctor import examine, healthy, render, to_dict

    try:
        check_timeout(timeout)
    except OptionError as error:
        fail(error, as_json, False, status=2)
    lines = examine(timeout)
    if as_json:
        typer.echo(json.dumps(to_dict(lines)))
    else:
        render(lines, Console())
    raise typer.Exit(0 if healthy(lines) else 1)


def _outcome(job: Job) -> Outcome | None:
    """The outcome; None on a torchrun rank other than 0."""
    from cppass.demo import run as spawning
    from cppass.demo import torchrun
    from cppass.demo.display import Silent, displayed
    from cppass.demo.streams import private_copy

    world = torchrun.detect()
    if world and world.rank:
        return torchrun.run_as_rank(job, world, Silent())
    with private_copy(2) as stream, displayed(Console(file=stream)) as display:
        return torchrun.run_as_rank(job, world, display) if world else spawning.run(job, display)


def _show(outcome: Outcome, as_json: bool) -> None:
    from cppass.demo.report import render

    if as_json:
        typer.echo(json.dumps(outcome.to_dict()))
    else:
        render(outcome, Console())
    raise typer.Exit(0 if outcome.passed else 1)


if __name__ == "__main__":
    main()
