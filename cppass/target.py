"""What a lowering offers, and the one place that imports it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import fx

from cppass.errors import CPError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the rank enters: this rank's number, the ranks of the group, and the name collectives know it by."""

    rank: int
    cp_size: int
    group_name: str


class Target(Protocol):
    """A lowering: turns canonical ops into the target's, in place, and compiles the result."""

    name: str

    def lower(self, gm: fx.GraphModule, ranks: Ranks) -> None:
        """Replace every canonical op of `gm`, in place."""

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
        """What runs the lowered graph; takes the graph's inputs, returns its outputs."""


def load(name: str) -> Target:
    """The lowering of that name ("host")."""
    try:
        module = importlib.import_module(f"lowering.{name}")
    except ImportError as error:
        raise CPError("CP501", f"target {name!r} cannot be imported: {error}", "reinstall cppass") from error
    return cast(Target, module.TARGET)
