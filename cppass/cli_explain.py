"""The command `cppass explain`: its options, and what it prints."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cppass.cost import HARDWARE
from cppass.demo.job import DIALECTS, Job
from cppass.demo.presets import PRESETS
from cppass.errors import CPError, OptionError
from cppass.usage import INSTALL_EXPLAIN, NEEDS, fail, need

if TYPE_CHECKING:
    from cppass.inspection import Explanation

EXIT_STATUS = {"rewritten": 0, "left alone": 3, "refused": 4}
"""1 is a failure and 2 wrong usage, as with the other commands."""

TOKENS = 1024
HF = DIALECTS["hf"]
OF_MODELS = ("preset", "model", "layers", "vocab", "tokens", "batch", "cache", "attention", "dialect")


def explain(
    context: typer.Context,
    script: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Your model: the function returns (model, args, kwargs)."),
    ] = None,
    dialect: Annotated[
        str, typer.Option(metavar="KIND", help="How the model is written: hf (transformers), npu (torch_npu's ops).")
    ] = "hf",
    preset: Annotated[str, typer.Option(metavar="NAME", help=f"Random weights: {', '.join(PRESETS)}.")] = "qwen3-0.6b",
    model: Annotated[str | None, typer.Option(metavar="DIR", help="A local checkpoint, instead of a preset.")] = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Build so many layers.")] = None,
    vocab: Annotated[int | None, typer.Option(metavar="N", help="Size of a preset's vocabulary.")] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Prompt length, of each sequence.")] = TOKENS,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences.")] = 1,
    cache: Annotated[
        str, typer.Option(metavar="KIND", help=f"K/V cache, with hf: {', '.join(HF.caches)}. Default: the first.")
    ] = "",
    attention: Annotated[
        str, typer.Option(metavar="KIND", help=f"attn_implementation: {', '.join(HF.attentions)}. Default: the first.")
    ] = "",
    cp: Annotated[int, typer.Option(metavar="P", help="Ranks to plan for; none is started.")] = 2,
    dynamic: Annotated[
        bool | None, typer.Option("--dynamic/--static", help="torch.compile's dynamic. Default: torch decides.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse ops without a rule, as strict=True does.")] = False,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Whose figures the cost is told by: {', '.join(HARDWARE)}.")
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the graph before and after.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    trace: Annotated[bool, typer.Option("--traceback", help="With an error, show where it was raised.")] = False,
) -> None:
    """Say what the pass does to a model: what is rewritten and why, what is not, what travels and what that costs.

    Runs the model once, on one process; no ranks are started. Exit status: 0 rewritten, 3 left alone, 4 refused,
    1 something failed, 2 wrong usage.
    """
    try:
        if html is not None:
            need(INSTALL_EXPLAIN, "jinja2")
            if not html.parent.is_dir():
                raise OptionError("CP050", f"--html: there is no directory {str(html.parent)!r}", "make it first")
        options = {"strict": True} if strict else {}
        if script is not None:
            _refuse_model_options(context)
            found = _of_script(script, cp, dynamic, options, hardware)
        else:
            need(*NEEDS.get(dialect, NEEDS["hf"]))
            job = Job(
                dialect=dialect,
                preset=preset,
                model=model,
                layers=layers,
                vocab=vocab,
                tokens=tokens,
                ranks=cp,
                decode=0,
                batch=batch,
                cache=cache,
                attention=attention,
                dynamic=dynamic,
            )
            found = _of_job(job, options, hardware)
    except CPError as error:
        if trace:
            traceback.print_exc()
        fail(error, as_json, False, status=2 if isinstance(error, OptionError) else 1)
    if html is not None:
        found.save_html(html)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        from cppass.inspection.terminal import show

        show(found, Console(), graph)
    if html is not None:
        typer.echo(f"page: {html}", err=True)
    raise typer.Exit(EXIT_STATUS[found.status])


def _of_job(job: Job, options: dict[str, bool], hardware: str | None) -> Explanation:
    from cppass.demo.explained import explain_job

    return explain_job(job, options, hardware)


def _of_script(
    script: str, cp: int, dynamic: bool | None, options: dict[str, bool], hardware: str | None
) -> Explanation:
    from cppass.demo.explained import explain_script

    if cp < 1:
        raise OptionError("CP052", f"--cp {cp} ranks is not allowed", "give 1 or more")
    return explain_script(script, cp, dynamic, options, hardware)


def _refuse_model_options(context: typer.Context) -> None:
    """Options that choose or size a model of ours mean nothing to one of the user's."""
    for name in OF_MODELS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise OptionError("CP050", f"--{name} does not go with --script", "the function says what its model is")
