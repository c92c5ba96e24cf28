"""`cppass run --dialect npu`: models of torch_npu's ops, and the example that does the same by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cppass import cli

pytestmark = pytest.mark.timeout(120)

RUN = (sys.executable, "-m", "cppass.cli", "run", "--dialect", "npu", "--layers", "1", "--tokens", "61")
SMALL = ("--decode", "1", "--repeat", "1", "--timeout", "60")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
NO_AUTOLOAD = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # torchrun imports torch without cppass
EXAMPLE = Path(__file__).parents[2] / "examples" / "npu_dialect.py"


def test_dense_on_npugraph_ex_as_json() -> None:
    preset = ("--preset", "qwen3-tiny", "--batch", "2")
    done = subprocess.run([*RUN, *SMALL, *preset, "--json"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["check"]["tokens_equal"] and found["check"]["caches_identical_across_ranks"]
    assert [len(row) for row in found["check"]["tokens"]] == [2, 2]
    assert (found["job"]["inner"], found["job"]["cache"]) == ("npugraph_ex", "paged")
    done_by_pass = found["rewriting"]
    assert (done_by_pass["status"], done_by_pass["sites"], done_by_pass["collectives"]) == ("rewritten", 1, 2)
    # K and V in float32 of 31 rows (chunks of 15 and 16) of each of two sequences, and two rows of hidden states
    assert done_by_pass["received_bytes"] == 2 * 31 * (2 * 2 * 16 * 4) + 2 * (64 * 4)
    assert "No NPU was involved" in found["kernels"]
    assert found["speedup"] is None and found["seconds"]["threads"] is None
    assert all(line.startswith("[") and "s] " in line for line in done.stderr.splitlines()), "progress lines, no noise"
    assert "ERR99999" not in done.stderr


def test_moe_on_torchair_under_torchrun() -> None:
    arguments = ("--preset", "qwen3-moe-tiny", "--inner", "torchair", *SMALL)
    done = subprocess.run(
        [*TORCHRUN, *RUN[1:], *arguments], capture_output=True, text=True, timeout=110, env=NO_AUTOLOAD
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.replace("\u2502", " ").split())
    assert "tokens equal to one device yes (2 tokens of 1 sequence)" in said
    assert "attention sites 1 found, 1 rewritten" in said
    assert "No NPU was involved" in said and "speed-up" not in said
    assert "PASS: every rank equals one device" in said
    assert said.startswith("qwen3_moe (random weights)"), "the report and nothing else"
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "ERR99999" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cache static", "[CP050] --cache does not go with --dialect npu\n  way out: leave --cache out"),
        ("--attention sdpa", "[CP050] --attention does not go with --dialect npu"),
        ("--model /nowhere", "[CP050] --model does not go with --dialect npu\n  way out: give a --preset"),
        (
            "--inner inductor",
            "[CP050] --inner 'inductor' is not allowed\n  way out: choose one of npugraph_ex,",
        ),
    ],
)
def test_what_does_not_go_with_the_dialect(arguments: str, message: str) -> None:
    result = CliRunner().invoke(cli.app, ["run", "--dialect", "npu", *arguments.split()])
    assert message in result.stderr
    assert (result.exit_code, result.stdout) == (2, "")


def test_missing_torch_npu_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch_npu" else object())
    result = CliRunner().invoke(cli.app, ["run", "--dialect", "npu"])
    expected = '[CP055] this command needs torch_npu, which is not installed\n  way out: pip install "cppass[npu-host]"'
    assert expected in result.stderr


def test_the_example() -> None:
    done = subprocess.run([*TORCHRUN, EXAMPLE], capture_output=True, text=True, timeout=110, env=NO_AUTOLOAD)
    assert done.returncode == 0, done.stderr
    assert "rewritten" in done.stdout and "101 tokens, 2 ranks" in done.stdout
    assert float(done.stdout.split()[-1]) < 1e-5
