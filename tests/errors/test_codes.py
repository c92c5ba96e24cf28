"""docs/errors.md holds every code of the source and no other; each is triggered from outside, and says the same."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from errors.bad import Bad, raised
from errors.call_triggers import CALLS, commands
from errors.graph_triggers import GRAPHS

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "CP601": "test_rank_cases.py: it takes two ranks",
}
"""Codes without a row here, and where they are triggered."""

BETWEEN_RANKS = re.compile("CP60[3-9]")  # tests/faults: it takes ranks that disagree, die or leave


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_source() -> set[str]:
    files = [path for package in ("cppass", "lowering") for path in (ROOT / package).rglob("*.py")]
    return {code for path in files for code in re.findall(r'"(CP\d\d\d)"', path.read_text())}


def documented() -> dict[str, list[str]]:
    """Code -> [cause, example, way out] of the tables of docs/errors.md; a code has one row."""
    rows: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(r"CP\d\d\d", cells[0]):
            assert cells[0] not in rows, f"{cells[0]} has two rows"
            rows[cells[0]] = cells[1:]
    return rows


def test_every_code_is_documented_and_no_other() -> None:
    assert sorted(documented()) == sorted(in_source())


@pytest.mark.parametrize("code", sorted(documented()))
def test_a_row_says_cause_example_and_way_out(code: str) -> None:
    cause, example, way_out = documented()[code]
    assert cause and way_out
    assert example.startswith("`") and example.endswith("`")


def test_every_documented_code_is_triggered() -> None:
    triggered = {row.code for row in (*CALLS.values(), *GRAPHS.values(), *commands(Path()).values())}
    here = {code for code in documented() if not BETWEEN_RANKS.fullmatch(code)}
    assert here == triggered | ELSEWHERE.keys()


def matches_example(code: str, message: str) -> None:
    """The message of the docs, in which "..." stands for anything, is one that is really given."""
    example = documented()[code][1].strip("`")
    pattern = ".*".join(re.escape(part) for part in example.split("..."))
    assert re.fullmatch(pattern, message.replace("\n", " "), re.DOTALL), f"docs: {example}\nseen: {message}"


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_refused(name: str) -> None:
    matches_example(GRAPHS[name].code, raised(GRAPHS[name]).message)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by Inductor
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_refused(name: str) -> None:
    matches_example(CALLS[name].code, raised(CALLS[name]).message)


@pytest.mark.parametrize("name", commands(Path()))
def test_a_command_fails(name: str, tmp_path: Path) -> None:
    row: Bad = commands(tmp_path)[name]
    matches_example(row.code, raised(row).message)
