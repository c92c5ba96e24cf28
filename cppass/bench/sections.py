"""The sections of `cppass bench` by name. Neither torch nor rich here: the command line reads this for --help."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cppass.errors import OptionError

if TYPE_CHECKING:
    from cppass.bench.table import Bars, Table
    from cppass.demo.display import Display


class Result(Protocol):
    """What a section found: a frozen value of numbers."""

    def table(self) -> Table: ...

    def bars(self) -> Bars | None:
        """The plot, where a section has one."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with seconds and bytes as units."""
        ...


@dataclasses.dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        module: of cppass.bench; has `measure(quick, display) -> Result`.
        models: it builds models of transformers.
    """

    module: str
    models: bool = False

    def measure(self, quick: bool, display: Display) -> Result:
        """Measure. With `quick`, small sizes: they show that it works, and say little."""
        result: Result = importlib.import_module(f"cppass.bench.{self.module}").measure(quick, display)
        return result


SECTIONS = {
    "compile": Section("compile_time", models=True),
    "layout": Section("layouts"),
    "gather": Section("gathers"),
    "attention": Section("attention"),
    "prefill": Section("prefills", models=True),
    "memory": Section("activations", models=True),
    "options": Section("variants", models=True),
    "agreement": Section("agreements"),
}


def chosen(names: Sequence[str]) -> dict[str, Section]:
    """The sections of these names, each once; all of them where none is named.

    Raises:
        OptionError: CP050, there is no such section.
    """
    for name in names:
        if name not in SECTIONS:
            raise OptionError("CP050", f"there is no section {name!r}", f"choose of {', '.join(SECTIONS)}")
    return {name: SECTIONS[name] for name in names or SECTIONS}
