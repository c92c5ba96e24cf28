"""`cppass explain`: its output, its exit status, a model of the user's, wrong usage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from cppass import cli
from cppass.inspection.document import schema

SCRIPT = """
import torch
from torch.nn.functional import scaled_dot_product_attention

def attention(x, dropout=0.0):
    return scaled_dot_product_attention(x, x, x, dropout_p=dropout, is_causal=True)

def good():
    return attention, (torch.ones(1, 2, 16, 8),)

def refused():
    return attention, (torch.ones(1, 2, 16, 8),), {"dropout": 0.5}

def short():
    return attention, (torch.ones(1, 2, 3, 8),)

def failing():
    return (lambda x: x.no_such_method()), (torch.ones(1),)

def wrong():
    return attention

def raising():
    raise ValueError("no weights here")
"""

WRONG = {
    "--html /nowhere/page.html": "[CP050] --html: there is no directory '/nowhere'",
    "--cp 0": "[CP052] --cp 0 ranks is not allowed",
    "--preset qwen4": "[CP050] --preset 'qwen4' is not allowed",
    "--script nowhere.py:model": "[CP050] --script: there is no file 'nowhere.py'",
    "--script {script}": "[CP050] --script",
    "--script {script}:nothing": "has no function 'nothing'",
    "--script {script}:good --layers 3": "[CP050] --layers does not go with --script",
    "--script {script}:good --hardware abacus": "[CP003] hardware 'abacus' is not known",
}


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["explain", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(("function", "status"), [("good", 0), ("short", 3), ("refused", 4)])
def test_exit_status_says_what_happened(function: str, status: int, script: Path) -> None:
    out = run("--script", f"{script}:{function}", status=status)
    assert {0: "rewritten: attention", 3: "left alone: attention", 4: "refused: attention"}[status] in out


@pytest.mark.parametrize(("function", "code"), [("failing", "CP057"), ("wrong", "CP056"), ("raising", "CP056")])
def test_a_script_that_fails(function: str, code: str, script: Path) -> None:
    result = CliRunner().invoke(cli.app, ["explain", "--script", f"{script}:{function}", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == code
    assert f"[{code}]" in result.stderr and "way out:" in result.stderr


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_told_with_a_way_out(arguments: str, script: Path) -> None:
    result = CliRunner().invoke(cli.app, ["explain", *arguments.format(script=script).split()])
    assert WRONG[arguments] in result.stderr
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_preset_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "72")
    page = tmp_path / "page.html"
    out = run("--preset", "qwen3-tiny", "--tokens", "32", "--layers", "4", "--graph", "--html", str(page))
    report, graph = out.split("before\n")
    text = " ".join(report.split())
    assert "rewritten: qwen3, 4 layers (random weights), 32 tokens on 2 ranks" in text
    assert "4 x scaled_dot_product_attention (CPU flash)" in text
    assert "3 x same" in text
    assert max(map(len, report.splitlines())) <= 72
    assert "cppass.attention(" in graph and "# attention; local in dim 2" in graph
    assert "nodes of model.layers.2 .. 3, the same as model.layers.1" in graph
    assert page.read_text().startswith("<!doctype html>")


def test_json_of_a_mixture_of_experts() -> None:
    found = json.loads(run("--preset", "qwen3-moe-tiny", "--tokens", "32", "--layers", "1", "--json"))
    jsonschema.validate(found, schema())
    kinds = {n["state"]["text"] for n in found["graphs"][0]["before"]}
    assert "local counts of sorted rows" in kinds


def test_a_page_without_jinja_names_the_extra(monkeypatch: pytest.MonkeyPatch, script: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["explain", "--html", str(tmp_path / "page.html")])
    assert 'needs jinja2, which is not installed\n  way out: pip install "cppass[explain]"' in result.stderr
    assert result.exit_code == 2
