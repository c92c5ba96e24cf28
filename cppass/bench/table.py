"""What a section shows: a table for the terminal and Markdown, and the numbers of its plot."""

from __future__ import annotations

import dataclasses

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table; the first column names the row, the others are right-aligned.

    Attributes:
        notes: how it was measured and how to read it, a sentence or two each.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, cells in enumerate(zip(self.columns, *self.rows, strict=True)):
            widest = max(len(word) for cell in cells for word in ("", *cell.split()))
            table.add_column(cells[0], justify="right" if i else "left", min_width=widest)
        for row in self.rows:
            table.add_row(*row)
        console.print(table, highlight=False, markup=False)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)

    def markdown(self) -> str:
        """The table and its notes; the title is the caller's."""
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
        return "\n".join(lines) + "".join(f"\n\n{note}" for note in self.notes) + "\n"


@dataclasses.dataclass(frozen=True)
class Bars:
    """Grouped bars: one group per label, one bar of each series in it.

    Attributes:
        series: (name, one value per label).
        spreads: per series the (least, most) of each value; () where values are exact.
        ideal: (name, one value per label), drawn as a mark over the group; None where there is none.
    """

    title: str
    axis: str
    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[float, ...]], ...]
    spreads: tuple[tuple[tuple[float, float], ...], ...] = ()
    ideal: tuple[str, tuple[float, ...]] | None = None
