"""The smallest case that fails as a given one does: parts left out and fields set to their defaults, while it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


def smallest(case: Any, fails: Callable[[Any], bool]) -> Any:
    """Greedy; `case` is a frozen dataclass of numbers, texts, tuples and such dataclasses."""
    while True:
        for candidate in simpler(case):
            if fails(candidate):
                case = candidate
                break
        else:
            return case


def simpler(case: Any) -> Iterator[Any]:
    """The case with one thing simpler."""
    if isinstance(case, tuple):
        for i, element in enumerate(case):
            yield case[:i] + case[i + 1 :]
            yield from ((*case[:i], other, *case[i + 1 :]) for other in simpler(element))
    elif dataclasses.is_dataclass(case) and not isinstance(case, type):
        for field in dataclasses.fields(case):
            value = getattr(case, field.name)
            if value != field.default:
                yield dataclasses.replace(case, **{field.name: field.default})
                yield from (dataclasses.replace(case, **{field.name: other}) for other in simpler(value))
