"""A check in front of what runs a compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def checked_first(run: Callable[..., Any], check: Callable[[Sequence[Any]], None]) -> Callable[..., Any]:
    """`run` with `check(inputs)` before it, whether it takes its inputs boxed (one list) or as arguments."""

    def checked(*args: Any) -> Any:
        check(args[0] if len(args) == 1 and isinstance(args[0], list) else args)
        return run(*args)

    checked._boxed_call = getattr(run, "_boxed_call", False)  # type: ignore[attr-defined]
    return checked
