"""registered(): plain text that is the same wherever the same files run, and another where a rule is another."""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from extending import own_ops as own  # noqa: F401
from torch import fx

import cppass
from cppass.extend import Axes, axes, pointwise, reduction, row_wise
from cppass.hook import npu_pass
from cppass.registry import identity_of

NORM = "owntest::norm"

SCRIPT = """
import sys, cppass, torch
lib = torch.library.Library("idtest", "DEF")
lib.define("norm(Tensor x) -> Tensor")
from cppass.extend import row_wise

def over(names):
    def rule(node):
        return row_wise(*names)(node)
    return rule

cppass.rule("idtest::norm", over(sys.argv[1].split(",")))
print(*cppass.registered())
"""


def test_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [str(script), "x,y"]
    there = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(script), run_name="__main__")
    assert there == capsys.readouterr().out
    assert there.startswith("rule idtest::norm: __main__.over.<locals>.rule, sha256 ")


def test_kinds_print_as_they_were_written() -> None:
    kinds = [pointwise, row_wise("x", used=2), reduction("x", dim=-1), axes("bs.", x="b.s.")]
    assert [identity_of(k) for k in kinds] == [
        "pointwise",
        "row_wise('x', used=2)",
        "reduction('x', dim=-1)",
        "axes('bs.', x='b.s.')",
    ]


def made_of(value: Any) -> Any:
    def rule(node: fx.Node) -> Axes | None:
        return None if value else row_wise("x")(node)

    return rule


def test_the_source_counts(tmp_path: Path) -> None:
    """What a function calls in its file, too."""
    script, seen = tmp_path / "rules_of_mine.py", []
    for names in ("'x'", "'x'", "'y'"):
        script.write_text(f"NAMES = {names}\n\ndef rule(node):\n    return NAMES\n")
        seen.append(identity_of(runpy.run_path(str(script))["rule"]))
    assert seen[0] == seen[1] != seen[2]


def test_closed_over_values_count() -> None:
    assert identity_of(made_of(1)) != identity_of(made_of(2))
    assert identity_of(made_of(made_of(1))) != identity_of(made_of(made_of(2)))
    assert identity_of(functools.partial(made_of(1), extra=1)) != identity_of(functools.partial(made_of(1), extra=2))
    assert identity_of(made_of((1, "a", None, {"b": [2.5]}))) == identity_of(made_of((1, "a", None, {"b": [2.5]})))


def test_a_function_without_a_file() -> None:
    """A notebook's or a console's: told apart by its code."""
    texts = ["lambda node: None", "lambda node: row_wise('x')(node)", "lambda node: row_wise('y')(node)"]
    assert len({identity_of(eval(text, {"row_wise": row_wise, "__name__": "cell"})) for text in texts}) == 3


def test_what_has_no_text_is_refused() -> None:
    with pytest.raises(cppass.OptionError, match=r"CP022.*no text that is the same in every process"):
        cppass.rule(NORM, made_of(object()))
    assert cppass.registered() == ()


def test_a_hook_is_another_with_other_rules() -> None:
    """torchair's cache_compile tells hooks apart by their code."""
    plain = npu_pass(cp_size=2).__code__
    assert npu_pass(cp_size=2).__code__ == plain
    cppass.rule(NORM, row_wise("x"))
    assert npu_pass(cp_size=2).__code__ != plain
