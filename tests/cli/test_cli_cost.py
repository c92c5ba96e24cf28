"""`cppass cost`: wrong usage, the tables, JSON and the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cppass import cli
from cppass.cost import HARDWARE, MODELS, answer, host

pytestmark = pytest.mark.timeout(60)

WRONG = {
    "--preset qwen4": "[CP050] --preset 'qwen4' is not allowed\n  way out: choose one of qwen3-0.6b, qwen3-8b,",
    "--hardware abacus": "[CP050] --hardware 'abacus' is not allowed\n  way out: choose one of ascend-910b,",
    "--tokens 0": "[CP050] --tokens 0 is not allowed with 16 ranks\n  way out: give 32 (two a rank) to",
    "--tokens 99999999": "[CP050] --tokens 99999999 is not allowed",
    "--ranks 0,2": "[CP050] --ranks 0,2 is not allowed\n  way out: give numbers from 1 to 1024",
    "--ranks two": "[CP050] --ranks 'two' is not allowed\n  way out: give numbers such as 2,4,8",
    "--plot out.doc": "[CP050] --plot 'out.doc' is not allowed\n  way out: end it with one of .svg, .png, .pdf",
    "--plot /nowhere/out.svg": "[CP050] --plot: there is no directory '/nowhere'",
}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["cost", *arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_told_with_a_way_out(arguments: str) -> None:
    result = CliRunner().invoke(cli.app, ["cost", *arguments.split()])
    assert WRONG[arguments] in result.stderr
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["cost", "--plot", str(tmp_path / "out.svg")])
    assert '[CP055] this command needs matplotlib, which is not installed\n  way out: pip install "cppass[plot]"' in (
        result.stderr
    )
    assert result.exit_code == 2


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("preset", MODELS)
def test_tables_fit_80_columns_and_say_what_was_not_measured(preset: str, hardware: str) -> None:
    text = run("--preset", preset, "--hardware", hardware, "--ranks", "1,2,64", "--tokens", "1048576")
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "Not measured: any time." in flat
    assert "Figures: " in flat and "Assumed: " in flat
    assert "*64" in text


def test_json_of_the_default() -> None:
    found = json.loads(run("--json"))
    assert (found["schema"], found["ok"], found["figures_measured"]) == (1, True, False)
    assert [row["ranks"] for row in found["rows"]] == [2, 4, 8, 16]
    assert found["best_ranks"] == 16
    two = found["rows"][0]
    assert two["schemes"]["cp"]["received"] == 32_768 * 2 * 8 * 128 * 2 / 2
    assert two["schemes"]["tp"]["received"] == 8 * two["schemes"]["cp"]["received"]
    assert two["break_even"] % 4 == 0


def test_schemes_that_are_not_possible_are_null() -> None:
    row = json.loads(run("--json", "--ranks", "64"))["rows"][0]
    assert row["schemes"]["tp"] is None and row["schemes"]["cp"] is not None


def test_a_plot_has_a_curve_for_each_number_of_ranks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "out.svg"
    run("--ranks", "2,8", "--plot", str(target))
    drawn = target.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("one device", "2 ranks", "8 ranks", "prompt tokens"))


def test_the_host_is_measured_and_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "calibrate", lambda: host.calibrate(0.1, link=False))
    found = json.loads(
        run("--hardware", "host", "--json", "--preset", "qwen3-0.6b", "--tokens", "2048", "--ranks", "2")
    )
    assert found["figures_measured"] and found["model"]["activation_bytes"] == 4
    text = " ".join(run("--hardware", "host", "--tokens", "2048").split())
    assert "Measured: this host's rates, just now." in text
