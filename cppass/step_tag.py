"""Tensors of a planned step carry which one, so that a compiled graph can tell a plan that is not meant for it.

A runner's mistake of this kind (tensors of two steps, a plan for other ranks or another remainder policy than the model
was compiled for) has shapes that fit and numbers that do not. Tensors that a runner makes itself carry nothing, and
pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from cppass.checked import checked_first
from cppass.errors import StepError
from cppass.party import Party

ATTRIBUTE = "_cppass_step"


@dataclasses.dataclass(frozen=True)
class StepTag:
    """Which step a tensor belongs to, and for whom it was laid out.

    Attributes:
        step: number of the plan in its process.
        layout: (cp_size, rank, remainder).
    """

    step: int
    layout: tuple[int, int, str]

    def put(self, x: Tensor) -> Tensor:
        setattr(x, ATTRIBUTE, self)
        return x


def check_steps(
    run: Callable[..., Any], layout: tuple[int, int, str], party: Party | None = None
) -> Callable[..., Any]:
    """`run` with a check of its tensors before it: attribute reads alone. The other ranks hear of a failure.

    Raises:
        StepError: CP616, they were planned for other ranks or another remainder policy, or in two different steps.
    """

    def check(inputs: Iterable[Any]) -> None:
        with party.told() if party else contextlib.nullcontext():
            _check(inputs, layout)

    return checked_first(run, check)


def _check(inputs: Iterable[Any], layout: tuple[int, int, str]) -> None:
    tags = {tag for x in inputs if (tag := getattr(x, ATTRIBUTE, None)) is not None}
    for tag in tags:
        if tag.layout != layout:
            raise StepError(
                "CP616",
                f"the step was planned for {_text(tag.layout)}; the model is compiled for {_text(layout)}",
                "plan steps with the group and the remainder policy of the compiled model",
            )
    if len({tag.step for tag in tags}) > 1:
        raise StepError("CP616", "the model is handed tensors of different steps", "use one plan for all of them")


def _text(layout: tuple[int, int, str]) -> str:
    cp_size, rank, remainder = layout
    return f"rank {rank} of {cp_size}, remainder={remainder!r}"
