"""An Explanation on a terminal, in colour and as wide as it is."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cppass.inspection.text import KEY_WIDTH, graphs_as_text, lines
from cppass.inspection.views import Explanation

STYLES = {
    "plain": "",
    "title": "bold",
    "head": "bold cyan",
    "good": "green",
    "bad": "red",
    "way out": "bold green",
    "code": "dim",
    "dim": "dim",
}


def show(explanation: Explanation, console: Console, graphs: bool = False) -> None:
    """Print it; with `graphs`, the graph before and after as well."""
    for line in lines(explanation):
        if line.style == "head":
            console.print()
        text = Text(line.text, style=STYLES[line.style])
        if line.key:
            row = Table.grid()
            row.add_column(width=2 * line.indent + KEY_WIDTH)
            row.add_column(overflow="fold")
            row.add_row(Padding(Text(line.key, style="dim"), (0, 0, 0, 2 * line.indent)), text)
            console.print(row)
        else:
            console.print(Padding(text, (0, 0, 0, 2 * line.indent), expand=False))
    if graphs:
        console.print(Rule(style="dim"))
        console.print(graphs_as_text(explanation.graph_view), markup=False, highlight=False, soft_wrap=True, end="")
