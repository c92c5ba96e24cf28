"""Python blocks of Markdown pages, and what running them gives: parsed by sybil, one namespace a page.

    ```python                  is run
    ```text title="output"     is what the block before it printed, "..." standing for any text
    <!--- skip: next "why" --> leaves the next block out; the test is skipped, with that reason

A page stops at its first failure: what comes after it would fail for lack of names, and other ranks shall not wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import io
import re
import traceback
from pathlib import Path
from typing import Any
from unittest import SkipTest

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder, pattern in ((ROOT, "*.md"), (ROOT / "docs", "**/*.md"), (ROOT / "examples", "*.md"))
    for path in folder.glob(pattern)
)
FENCE = re.compile(r"^ *```(\S+)", re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NOT_RUN = "not run: a block before it failed"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a block ended: failure and skipped are "" where it ran."""

    failure: str = ""
    skipped: str = ""


def run_python(example: Example) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        PythonEvaluator()(example)
    example.namespace["__printed__"] = printed.getvalue()


def compare_output(example: Example) -> str | None:
    printed = example.namespace["__printed__"]
    if doctest.OutputChecker().check_output(example.parsed, printed, FLAGS):
        return None
    return f"the page says\n{example.parsed}\nthe block printed\n{printed}"


BLOCKS = (run_python, compare_output)
SYBIL = Sybil(
    parsers=[
        CodeBlockParser("python", run_python),
        CodeBlockParser('text title="output"', compare_output),
        SkipParser(),
    ]
)


def blocks_of(page: str) -> list[int]:
    """Lines at which the blocks of a page start."""
    return [example.line for example in SYBIL.parse(ROOT / page).examples() if example.region.evaluator in BLOCKS]


def run_page(page: str, names: dict[str, Any]) -> dict[int, Outcome]:
    """Run a page's blocks in order; by line."""
    document = SYBIL.parse(ROOT / page)
    document.namespace.update(names)
    found: dict[int, Outcome] = {}
    failed = False
    for example in document.examples():
        outcome = Outcome(NOT_RUN) if failed else _evaluated(example)
        failed = failed or bool(outcome.failure)
        if example.region.evaluator in BLOCKS or outcome.failure:
            found[example.line] = outcome
    return found


def _evaluated(example: Example) -> Outcome:
    try:
        example.evaluate()
    except SkipTest as skipped:
        return Outcome(skipped=str(skipped))
    except (Exception, SystemExit):
        return Outcome(traceback.format_exc())
    return Outcome()
