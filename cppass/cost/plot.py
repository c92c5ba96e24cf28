"""TTFT against prompt length, a curve for each number of ranks; matplotlib is imported when a plot is drawn."""

from __future__ import annotations

from pathlib import Path

from cppass.cost.answer import Answer
from cppass.cost.predict import ttft
from cppass.environment import why_not_writable
from cppass.errors import OptionError

FORMATS = (".svg", ".png", ".pdf")
SHORTEST, LONGEST = 2**7, 2**20


def check(path: Path) -> None:
    """Raises OptionError (CP050) where nothing can be drawn to this path."""
    if path.suffix not in FORMATS:
        raise OptionError("CP050", f"--plot {str(path)!r} is not allowed", f"end it with one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OptionError("CP050", f"--plot: there is no directory {str(path.parent)!r}", "make it first")
    if why := "it is a directory" if path.is_dir() else why_not_writable(path.parent):
        raise OptionError("CP050", f"--plot: {str(path)!r} cannot be written: {why}", "name a file elsewhere")


def draw(answer: Answer, path: Path) -> None:
    """Write the plot: log axes, a dotted line where each number of ranks begins to beat one device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for ranks in (1, *(row.ranks for row in answer.rows if row.ranks > 1)):
        lengths = [n for k in range(4 * (LONGEST // SHORTEST).bit_length()) if (n := _length(k, ranks)) <= LONGEST]
        times = [ttft(answer.shape, answer.hardware, n, ranks) for n in lengths]
        label = "one device" if ranks == 1 else f"{ranks} ranks"
        (curve,) = axes.plot(lengths, times, label=label, color="black" if ranks == 1 else None, linewidth=1.4)
        for row in answer.rows:
            if row.ranks == ranks and row.break_even is not None:
                axes.axvline(row.break_even, color=curve.get_color(), linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="TTFT (s)")
    axes.set_xscale("log", base=2)
    how = "rates measured" if answer.measured else "published figures, not measured"
    axes.set_title(f"{answer.shape.name} on {answer.hardware.name} ({how}); dotted: CP pays from here", fontsize=9)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _length(quarter: int, ranks: int) -> int:
    """Of a quarter-octave grid, a multiple of 2P."""
    return max(1, round(SHORTEST * 2 ** (quarter / 4) / (2 * ranks))) * 2 * ranks
