"""What every command does with wrong usage: one clean message, as JSON where asked for, and the exit status."""

from __future__ import annotations

import importlib.util
import json
from typing import NoReturn

import typer
from rich.console import Console

from cppass.errors import CPError, OptionError

INSTALL = 'pip install "cppass[host]"'
INSTALL_NPU = 'pip install "cppass[npu-host]"'
INSTALL_PLOT = 'pip install "cppass[plot]"'
INSTALL_EXPLAIN = 'pip install "cppass[explain]"'
NEEDS = {"hf": (INSTALL, "transformers", "numpy"), "npu": (INSTALL_NPU, "torch_npu", "numpy")}
"""What the models of a dialect need: the command that installs it, then modules."""


def fail(error: CPError, as_json: bool, trace: bool, status: int) -> NoReturn:
    """Say what went wrong and leave with this status."""
    tell(error, as_json, trace)
    raise typer.Exit(status)


def tell(error: CPError, as_json: bool, trace: bool = False) -> None:
    """One message on standard error, and one JSON object on standard output where that is asked for."""
    from cppass.demo.report import error_dict, render_error

    if as_json:
        typer.echo(json.dumps(error_dict(error)))
    render_error(error, Console(stderr=True), trace)


def need(install: str, *modules: str) -> None:
    """Raises OptionError, CP055, where a module is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise OptionError("CP055", f"this command needs {module}, which is not installed", install)
