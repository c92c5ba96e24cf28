"""What pages name exists: commands and their options, files, tests and extras."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
import typer.main
from documentation.code_blocks import PAGES, ROOT

from cppass.cli import app

SHELL = re.compile(r"^ *```(?:bash|sh)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:cppass|pytest|python|torchrun) [^`\n]+)`")
LABEL = re.compile(r"cppass [\w ]+: ")  # the name of a range in a profile, not a command
PATH = re.compile(r"`((?:cppass|lowering|tests|docs|examples|\.ci)/[\w./-]*)`")
EXTRA = re.compile(r"(?:cppass|\.)\[([\w,-]+)\]")


def commands(page: str) -> Iterator[list[str]]:
    """Command lines of a page as lists of words: lines of shell blocks and code in running text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for block in SHELL.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(code for code in INLINE.findall(text) if not LABEL.match(code))]:
        for command in line.split("&&"):
            if words := shlex.split(command, comments=True):
                yield words


def ours(words: list[str]) -> list[str] | None:
    """The words behind `cppass`, however it is started; None for other commands."""
    starts = [i for i, word in enumerate(words) if word.split("/")[-1] == "cppass" or word == "cppass.cli"]
    starts = [i for i in starts if i == 0 or words[i - 1] == "-m"]
    return words[starts[0] + 1 :] if starts else None


def wrong(words: list[str]) -> str:
    """What is wrong with a command of cppass, "" where nothing is.

    One capital letter stands for a number; an option at the end may be named without its value.
    """
    group = typer.main.get_command(app)
    name, *arguments = ["1" if re.fullmatch("[A-Z]", word) else word for word in words]
    try:
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    except KeyError:
        return f"cppass has no command {name!r}"
    except Exception as error:
        told = f"{type(error).__name__}: {getattr(error, 'message', error)}"
        return "" if told == f"BadOptionUsage: Option {words[-1]!r} requires an argument." else told
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_cppass_parse(page: str) -> None:
    given = [words for command in commands(page) if (words := ours(command))]
    assert [f"{' '.join(words)}: {problem}" for words in given if (problem := wrong(words))] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    named = {
        word.split("::")[0] for words in commands(page) for word in words if word.startswith(("tests/", "examples/"))
    }
    named |= set(PATH.findall((ROOT / page).read_text(encoding="utf-8")))
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_options_of_examples_exist(page: str) -> None:
    for words in commands(page):
        for script in (word for word in words if word.startswith("examples/")):
            options = [word for word in words[words.index(script) :] if word.startswith("--")]
            assert all(f'"{option}"' in (ROOT / script).read_text() for option in options), f"{page}: {words}"


@pytest.mark.parametrize("page", PAGES)
def test_extras_exist(page: str) -> None:
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {extra for found in EXTRA.findall((ROOT / page).read_text()) for extra in found.split(",")}
    assert named <= set(extras)


def test_wrong_commands_are_noticed() -> None:
    assert wrong(["run", "--tokens", "N", "--cp", "4"]) == ""
    assert "--colour" in wrong(["run", "--colour", "red"])
    assert "integer" in wrong(["run", "--tokens", "many"])
    assert wrong(["run", "--tokens"]) == ""
    assert wrong(["walk"]) == "cppass has no command 'walk'"
    assert ours(shlex.split("torchrun --nproc-per-node=2 -m cppass.cli run --cp 2")) == ["run", "--cp", "2"]
    assert ours(shlex.split(".venv/bin/cppass cost --tokens 9")) == ["cost", "--tokens", "9"]
    assert ours(shlex.split("pip install cppass")) is None
