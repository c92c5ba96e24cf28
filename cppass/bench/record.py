"""A result as files: DIR/<section>.md and, with matplotlib, DIR/<section>.svg."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cppass.bench.machine import Machine
from cppass.bench.sections import Result
from cppass.bench.table import Bars
from cppass.environment import why_not_writable
from cppass.errors import OptionError

PLOT_MISSING = 'plots are left out: they need matplotlib; pip install "cppass[plot]"'


def make_folder(folder: Path) -> None:
    """Make the folder, before anything is measured for it.

    Raises:
        OptionError: CP050, no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = why_not_writable(folder)
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise OptionError("CP050", f"--out: {str(folder)!r} cannot be written: {why}", "name another directory")


def write(folder: Path, name: str, result: Result, machine: Machine, command: str) -> list[str]:
    """Write the files of a section and return their names."""
    bars = result.bars() if can_plot() else None
    picture = f"{name}.svg" if bars else ""
    (folder / f"{name}.md").write_text(markdown(name, result, machine, command, picture), encoding="utf-8")
    if bars:
        draw(bars, folder / picture)
    return [f"{name}.md", *([picture] if picture else [])]


def markdown(name: str, result: Result, machine: Machine, command: str, picture: str = "") -> str:
    table = result.table()
    facts = "\n".join(f"- {key}: {value}" for key, value in (("command", f"`{command}`"), *machine.lines()))
    plot = f"\n![{table.title}]({picture})\n" if picture else ""
    return f"# {name}: {table.title}\n\n{facts}\n\n{table.markdown()}{plot}"


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(bars: Bars, path: Path) -> None:
    """An SVG of grouped bars, the same bytes for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.9 * len(bars.labels) + 2), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(bars.series)
    for i, (name, values) in enumerate(bars.series):
        places = [label + (i - (len(bars.series) - 1) / 2) * width for label in range(len(bars.labels))]
        axes.bar(places, values, width, label=name)
        if bars.spreads:
            least = [value - low for value, (low, _) in zip(values, bars.spreads[i], strict=True)]
            most = [high - value for value, (_, high) in zip(values, bars.spreads[i], strict=True)]
            axes.errorbar(places, values, [least, most], fmt="none", ecolor="black", elinewidth=1, capsize=2)
    if bars.ideal:
        name, values = bars.ideal
        left, right = ([label + side for label in range(len(bars.labels))] for side in (-0.4, 0.4))
        axes.hlines(values, left, right, colors="black", linestyles="dashed", linewidth=1, label=name)
    axes.set_xticks(range(len(bars.labels)), bars.labels)
    axes.set_ylabel(bars.axis)
    axes.set_title(bars.title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "cppass", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
