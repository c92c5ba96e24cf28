"""Progress: bars on a terminal, lines elsewhere. On standard error, so that standard output is the result alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Display(Protocol):
    """Told of phases and of the steps in them."""

    def start(self, title: str, steps: int) -> None: ...

    def step(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """Shows nothing: for ranks other than 0."""

    def start(self, title: str, steps: int) -> None:
        pass

    def step(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass


class Lines:
    """One line per step, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console, self._begin, self._title = console, time.monotonic(), ""

    def start(self, title: str, steps: int) -> None:
        self._title = title

    def step(self, text: str) -> None:
        elapsed = time.monotonic() - self._begin
        self._console.print(f"[{elapsed:6.1f} s] {self._title}: {text}", markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        self.step("done")


class Bars:
    """One bar per phase."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, TaskID(0)

    def start(self, title: str, steps: int) -> None:
        self._task = self._progress.add_task(title, total=steps, now="")

    def step(self, text: str) -> None:
        self._progress.update(self._task, now=text)
        self._progress.advance(self._task)

    def finish(self) -> None:
        task = self._progress.tasks[self._progress.task_ids.index(self._task)]
        self._progress.update(self._task, completed=task.total, now="done")


@contextlib.contextmanager
def displayed(console: Console) -> Iterator[Display]:
    """The display that suits the console, for as long as the run takes."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), BarColumn(bar_width=12))
    with Progress(*columns, TextColumn("{task.fields[now]}"), TimeElapsedColumn(), console=console) as progress:
        yield Bars(progress)
