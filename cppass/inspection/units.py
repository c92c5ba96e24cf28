"""Numbers for people: three digits and a unit."""

from __future__ import annotations

import re


def octets(number: float | None) -> str:
    """Bytes: "512 B", "67.1 MB", "452 GB"; "symbolic" for None."""
    if number is None:
        return "symbolic"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"


def seconds(number: float) -> str:
    """Time: "1.97 s", "284 ms", "12 us"."""
    if number >= 1:
        return f"{number:.3g} s" if number < 1000 else f"{number:,.0f} s"
    return f"{number * 1e3:.3g} ms" if number >= 1e-3 else f"{number * 1e6:.3g} us"


def flops(number: float) -> str:
    """FLOPs: "3.1 GFLOP"."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g} {unit}FLOP"


def plural(count: int, noun: str) -> str:
    """ "1 rank", "8,192 tokens"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def folded(paths: tuple[str, ...]) -> str:
    """Paths of equal siblings in one: "model.layers.1 .. 27"."""
    if len(paths) < 2:
        return "".join(paths)
    return f"{paths[0]} .. {paths[-1].rpartition('.')[2]}"


def place(where: str) -> str:
    """Where a node comes from, without the way to installed packages: "transformers/modeling_utils.py:72"."""
    return re.sub(r"^\S*/(?:site|dist)-packages/", "", where)
