"""cppass doctor: findings, ways out, exit status."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cppass import cli, doctor
from cppass.doctor import BROKEN, NOTE, OK, Line, Probe


def answers(code: str, timeout: float, autoload: str | None = "0") -> Probe:
    return Probe({"gloo": True, "devices": 0})


def by_check(lines: tuple[Line, ...]) -> dict[str, Line]:
    return {line.check: line for line in lines}


def test_this_machine_as_json() -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert (result.exit_code, told["ok"], told["schema"]) == (0, True, 1)
    checks = {check["check"]: check for check in told["checks"]}
    assert {"Python", "torch", "torch_npu", "CANN", "import torch", "gloo", "transformers", "cores"} <= set(checks)
    assert checks["gloo"]["finding"] == "available"
    assert all(check["hint"] for check in told["checks"] if check["state"] == BROKEN)


def test_a_plain_import_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = Probe({}, "ImportError: libhccl.so")
    monkeypatch.setattr(doctor, "_ask", lambda *args, **kwargs: fails)
    line = doctor._plain_import(1, without_cann=True)
    assert line.state == NOTE
    assert "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in line.hint
    assert "torchrun" in line.hint and "import cppass" in line.hint
    assert doctor._plain_import(1, without_cann=False).state == BROKEN


def test_another_torch_npu_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torch_npu": "2.12.0", "transformers": "5.20", "numpy": "2.4"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "_ask", answers)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "broken: torch_npu" in result.stdout
    assert "2.12.0 is for another torch" in " ".join(result.stdout.split())


def test_stubs_that_fail_are_broken() -> None:
    line = doctor._npu_import(Probe({}, "cppass.errors.CPError: [CP504] the stub"), cann="")
    assert (line.state, "CP504" in line.finding) == (BROKEN, True)
    assert line.hint


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os._exit(3)", "status 3"),
        ("import os; os.abort()", "status -6"),
        ("print('no JSON')", "nothing that can be read"),
        ("raise ValueError('why')", "ValueError: why"),
        ("import time; time.sleep(9)", "no answer within 1 s"),
    ],
)
def test_no_probe_takes_the_doctor_down(code: str, expected: str) -> None:
    assert expected in doctor._ask(code, timeout=1).error


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int) -> None:
    lines = (Line("torch", "x" * 200), Line("gloo", "missing", BROKEN, "install it"), Line("CANN", "[none]", OK))
    console = Console(width=width, record=True, file=io.StringIO())
    doctor.render(lines, console)
    text = console.export_text()
    assert all(len(row) <= width for row in text.splitlines())
