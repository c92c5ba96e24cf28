"""A row of a table of bad inputs: what is done, which error it must be, and what that must say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

import cppass
from cppass.errors import CPError


@dataclasses.dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        code: of the error.
        act: what a user does.
        says: words that the message has: the option or op, and the value that was seen.
        way_out: words that the hint has.
    """

    code: str
    act: Callable[[], Any]
    says: tuple[str, ...] = ()
    way_out: str = ""


def raised(row: Bad) -> CPError:
    """The error of a row, as torch.compile or a call gives it; the test fails where it is not the one that is meant."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (torch wraps ours in its own types)
        row.act()
    error = cppass.unwrap(caught.value)
    if not isinstance(error, CPError):
        raise error
    check(error, row.code, row.says, row.way_out)
    return error


def check(error: CPError, code: str, says: tuple[str, ...] = (), way_out: str = "") -> None:
    """Every error has a code, says what was seen and names a way out."""
    assert error.code == code, str(error)
    assert str(error).startswith(f"[{code}] {error.message}")
    assert error.hint, f"no way out: {error}"
    assert f"\n  way out: {error.hint}" in str(error)
    for words in says:
        assert words in error.message, f"{words!r} is not in: {error.message}"
    assert way_out in error.hint, f"{way_out!r} is not in: {error.hint}"
