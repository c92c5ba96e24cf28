"""What the command says before it starts anything: wrong usage, missing parts, --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cppass import cli
from cppass.environment import keep_torch_importable

pytestmark = pytest.mark.timeout(30)

WRONG = {
    "--cp 0": "[CP052] --cp 0 ranks is not allowed",
    "--cp 65": "[CP052] --cp 65 ranks is not allowed",
    "--tokens 0": "[CP050] --tokens 0 is not allowed",
    "--decode -1": "[CP050] --decode -1 is not allowed",
    "--layers 0": "[CP050] --layers 0 is not allowed",
    "--repeat 0": "[CP050] --repeat 0 is not allowed",
    "--timeout 0": "[CP050] --timeout 0 is not allowed",
    "--timeout nan": "[CP050] --timeout nan is not allowed",
    "--cache paged": "[CP050] --cache 'paged' is not allowed\n  way out: choose one of dynamic, static, none",
    "--dtype int8": "[CP050] --dtype 'int8' is not allowed",
    "--cache none --decode 3": "[CP050] --decode 3 needs a cache",
    "--preset qwen4": "[CP050] --preset 'qwen4' is not allowed\n  way out: choose one of qwen3-tiny, qwen3-0.6b,",
    "--model /nowhere": "[CP051] there is no directory '/nowhere'",
    "--model {empty}": "has no config.json",
    "--model {config} --vocab 9": "[CP050] --vocab does not go with --model",
    "--tokens many": "Invalid value for '--tokens'",
    "--colour red": "No such option: --colour",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_told_with_a_way_out(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    filled = arguments.format(empty=tmp_path / "empty", config=tmp_path / "config")
    result = CliRunner().invoke(cli.app, ["run", *filled.split()])
    assert WRONG[arguments] in result.stderr
    assert result.stdout == ""
    assert result.exit_code == 2


def test_wrong_usage_as_json() -> None:
    result = CliRunner().invoke(cli.app, ["run", "--tokens", "0", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {
        "schema": 1,
        "ok": False,
        "error": {
            "code": "CP050",
            "kind": "OptionError",
            "message": "--tokens 0 is not allowed",
            "hint": "give 1 or more",
        },
    }


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"WORLD_SIZE": "2"}, ["--cp", "3"], "[CP052] --cp 3, but torchrun started 2 ranks"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, [], "[CP054] the ranks are on several hosts"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, ["--cp", "3"], ""),  # rank 0 says it for all
    ],
)
def test_wrong_usage_under_torchrun(variables: dict[str, str], arguments: list[str], message: str) -> None:
    launcher = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **variables}
    result = CliRunner(env=launcher).invoke(cli.app, ["run", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert bool(message) == bool(result.stderr)


def test_help_and_version_import_no_torch() -> None:
    code = "import sys; from cppass import cli\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"
    for flag, expected in (("--help", "run "), ("--version", "cppass 0.")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, timeout=20)
        assert expected in done.stdout
        assert (done.returncode, done.stderr) == (0, "")


def test_missing_extras_name_the_install_command() -> None:
    code = "import sys; sys.modules['typer'] = None; import cppass.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.stderr == 'cppass: the command line needs typer; pip install "cppass[host]"\n'
    assert done.returncode == 1


def test_missing_transformers_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["run"])
    assert '[CP055] this command needs transformers, which is not installed\n  way out: pip install "cppass[host]"' in (
        result.stderr
    )


@pytest.mark.parametrize(
    ("installed", "cann", "expected"), [(True, None, "0"), (True, "/usr/local/Ascend", None), (False, None, None)]
)
def test_torch_npu_is_kept_out_only_where_cann_is_missing(
    monkeypatch: pytest.MonkeyPatch, installed: bool, cann: str | None, expected: str | None
) -> None:
    environment = {} if cann is None else {"ASCEND_HOME_PATH": cann}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    keep_torch_importable()
    assert environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == expected
