"""The run of `cppass bench`: section after section, each shown and recorded as soon as it is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cppass.bench import record
from cppass.bench.machine import command_line, this_machine
from cppass.bench.sections import Section
from cppass.demo.display import displayed
from cppass.demo.streams import private_copy

SCHEMA = 1
"""Version of the JSON output; a new number where a key changes its meaning or goes."""


def measure_all(
    wanted: Mapping[str, Section], named: tuple[str, ...], quick: bool, out: Path | None, console: Console | None
) -> dict[str, Any]:
    """Measure the sections in order; the results as JSON-able values.

    Args:
        named: the sections as the user named them, for the record.
        out: where records go; None writes none.
        console: where tables go; None shows none.

    Raises:
        CPError: of whatever failed first.
    """
    machine, command = this_machine(), command_line(named, quick, out)
    found: dict[str, Any] = {}
    with private_copy(2) as stream:
        progress = Console(file=stream)
        for name, section in wanted.items():
            with displayed(progress) as display:
                result = section.measure(quick, display)
            found[name] = result.to_dict()
            if console:
                result.table().show(console)
            if out is not None:
                files = record.write(out, name, result, machine, command)
                progress.print(f"wrote {', '.join(files)}", markup=False, highlight=False)
        if out is not None and not record.can_plot():
            progress.print(record.PLOT_MISSING, markup=False, highlight=False)
    return {"schema": SCHEMA, "command": command, "machine": dict(machine.lines()), "sections": found}
