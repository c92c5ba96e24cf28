"""An answer for people: two tables that fit 80 columns, and what of them was measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cppass.cost.answer import Answer, Row
from cppass.cost.predict import SCHEMES, Prediction

TITLES = {"cp": "CP", "tp": "TP", "ulysses": "Ulysses", "ring": "ring"}
NOT_POSSIBLE = "-"


def render(answer: Answer, console: Console) -> None:
    """Print the tables and the notes."""
    console.print(_head(answer), highlight=False, markup=False)
    console.print(_times(answer))
    console.print(_bytes(answer))
    for note in notes(answer):
        console.print(note, highlight=False, markup=False)


def notes(answer: Answer) -> list[str]:
    """What was measured of this and what was not."""
    found = [
        f"* least TTFT of CP. {NOT_POSSIBLE}: heads cannot be dealt out. All weights are on every rank but with TP."
    ]
    least = min(p.memory for row in answer.rows for p in (row.schemes["cp"],) if p)
    if answer.hardware.memory and least > answer.hardware.memory:
        found.append(
            f"! more than the {size(answer.hardware.memory)} of a device: split weights as well (TP, experts)."
        )
    elif any(p and not p.fits for row in answer.rows for p in row.schemes.values()):
        found.append(f"! more than the {size(answer.hardware.memory)} of a device.")
    found.append("Checked: FLOPs and bytes of CP, against rewritten graphs of transformers' models, to the last one.")
    if answer.measured:
        found.append(
            "Measured: this host's rates, just now. Not measured here: whole models; `cppass run` does that. Ranks are "
            "taken to have a core and its memory bandwidth each."
        )
    else:
        found.append(
            f"Not measured: any time. No {answer.hardware.name} was at hand, neither was any other accelerator; times "
            "follow from its published figures without host time, and are bounds rather than forecasts."
        )
    found.append(f"Figures: {answer.hardware.source}.")
    if answer.hardware.assumed:
        found.append(f"Assumed: {answer.hardware.assumed}.")
    return found


def _head(answer: Answer) -> str:
    s, one = answer.shape, answer.one
    experts = f", {s.experts_per_token} of {s.experts} experts" if s.experts else ""
    return (
        f"{s.name}: {s.layers} layers, hidden {s.hidden}, {s.heads} heads, {s.kv_heads} KV heads{experts}; "
        f"{one.tokens:,} tokens on {answer.hardware.name}\n"
        f"one device: TTFT {duration(one.seconds)}, {size(one.memory)}{_over(one)}"
    )


def _times(answer: Answer) -> Table:
    table = Table(title="time to first token, and CP against one device", title_justify="left", pad_edge=False)
    for column in ("ranks", *(TITLES[s] for s in SCHEMES), "speed-up", "CP waits", "CP pays from"):
        table.add_column(column, justify="right")
    for row in answer.rows:
        cp = row.schemes["cp"]
        assert cp is not None
        mark = "*" if row.ranks == answer.best else ""
        table.add_row(
            f"{mark}{row.ranks}",
            *(duration(p.seconds) if (p := row.schemes[s]) else NOT_POSSIBLE for s in SCHEMES),
            f"{answer.one.seconds / cp.seconds:.2f}x",
            duration(cp.exposed),
            _break_even(row),
            style="bold" if mark else "",
        )
    return table


def _break_even(row: Row) -> str:
    if row.ranks == 1:
        return NOT_POSSIBLE
    return "never" if row.break_even is None else f"{row.break_even:,}"


def _bytes(answer: Answer) -> Table:
    table = Table(title="bytes of a rank: received in a layer, and memory in all", title_justify="left", pad_edge=False)
    table.add_column("ranks", justify="right")
    for scheme in SCHEMES:
        table.add_column(TITLES[scheme], justify="right")
    for scheme in ("cp", "tp"):
        table.add_column(f"{TITLES[scheme]} memory", justify="right")
    for row in answer.rows:
        received = [size(p.received) if (p := row.schemes[s]) else NOT_POSSIBLE for s in SCHEMES]
        held = [size(p.memory) + _over(p) if (p := row.schemes[s]) else NOT_POSSIBLE for s in ("cp", "tp")]
        table.add_row(str(row.ranks), *received, *held)
    return table


def _over(prediction: Prediction) -> str:
    return "" if prediction.fits else " !"


def duration(seconds: float) -> str:
    """Three digits: "1.97 s", "284 ms", "0.89 ms"."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e3:.3g} ms"


def size(octets: float) -> str:
    """Three digits: "67.1 MB", "452 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000 or unit == "GB":
            break
        octets /= 1000
    return f"{octets:.0f} {unit}" if unit == "B" or octets >= 100 else f"{octets:.1f} {unit}"
