"""Command lines that make no sense, and files that are broken: a message with a way out, a status, and no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import qwen
from errors.bad import check
from errors.call_triggers import error_of
from typer.testing import CliRunner

from cppass import cli
from cppass.demo.job import Job
from cppass.demo.model import build
from cppass.errors import CPError

USAGE = {
    "run --tokens -1": ("CP050", "--tokens -1", "1 or more"),
    "run --tokens 99999999999": ("CP050", "--tokens 99999999999", "at most 2147483647"),
    "run --batch 0": ("CP050", "--batch 0", "1 or more"),
    "run --batch -3": ("CP050", "--batch -3", "1 or more"),
    "run --vocab 1": ("CP050", "--vocab 1", "2 or more"),
    "run --layers -1": ("CP050", "--layers -1", "1 or more"),
    "run --seed 99999999999999999999": ("CP050", "--seed 99999999999999999999", "64 bits"),
    "run --timeout inf": ("CP050", "--timeout inf", "at most 604800 seconds"),
    "run --timeout -1": ("CP050", "--timeout -1", "seconds above 0"),
    "run --timeout 1e30": ("CP050", "--timeout 1e+30", "at most"),
    "run --dialect tpu": ("CP050", "--dialect 'tpu'", "hf, npu"),
    "run --inner nvcc": ("CP050", "--inner 'nvcc'", "eager, inductor"),
    "run --attention linear": ("CP050", "--attention 'linear'", "sdpa, eager"),
    "run --dialect npu --cache static": ("CP050", "--cache does not go with --dialect npu", "leave --cache out"),
    "run --dialect npu --model .": ("CP050", "--model does not go with --dialect npu", "--preset"),
    "run --cp -1": ("CP052", "--cp -1", "1 to 64"),
    "run --preset {empty}": ("CP050", "--preset ''", "qwen3-tiny"),
    "run --model {file}": ("CP051", "there is no directory", "checkpoint"),
    "run --model {empty}": ("CP051", "has no config.json", "save_pretrained()"),
    "bench everything": ("CP050", "'everything'", "compile, layout"),
    "bench layout --out {file}/records": ("CP050", "--out", "another directory"),
    "bench layout --out {file}": ("CP050", "--out", "another directory"),
    "bench layout --out /proc/records": ("CP050", "--out", "another directory"),
    "cost --tokens -5": ("CP050", "--tokens -5", "two a rank"),
    "cost --ranks {empty}": ("CP050", "--ranks ''", "2,4,8"),
    "cost --ranks -2": ("CP050", "--ranks -2", "1 to 1024"),
    "cost --ranks 1.5": ("CP050", "--ranks '1.5'", "2,4,8"),
    "cost --plot {folder}": ("CP050", "it is a directory", "elsewhere"),
    "cost --plot /proc/plot.svg": ("CP050", "cannot be written", "elsewhere"),
    "doctor --timeout 0": ("CP050", "--timeout 0", "seconds above 0"),
    "doctor --timeout nan": ("CP050", "--timeout nan", "seconds above 0"),
}


@pytest.mark.parametrize("words", USAGE)
def test_wrong_usage(words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    places = {"{file}": f"{tmp_path}/file", "{folder}": f"{tmp_path}/folder.svg", "{empty}": ""}
    filled = [places.get(w) if w in places else w.replace("{file}", places["{file}"]) for w in words.split()]
    result = CliRunner().invoke(cli.app, filled)
    assert (result.exit_code, result.stdout) == (2, "")
    code, seen, way_out = USAGE[words]
    check(error_of(result.stderr), code, (seen,), way_out)


@pytest.mark.parametrize(
    "words", ["run --tokens 1.5", "run --cp two", "cost --tokens", "run --layers", "fly", "run fast"]
)
def test_what_the_parser_refuses(words: str) -> None:
    result = CliRunner().invoke(cli.app, words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr or "error" in result.stderr.lower()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "first"}, {"WORLD_SIZE": "many"}, {"LOCAL_WORLD_SIZE": "2.0"}, {"RANK": "-1"}],
    ids=str,
)
def test_a_launchers_variables_that_are_no_numbers(environment: dict[str, str]) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **environment}
    result = CliRunner(env=torchrun).invoke(cli.app, ["run"])
    assert (result.exit_code, result.stdout) == (2, "")
    check(error_of(result.stderr), "CP054", tuple(environment.values()), "torchrun")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    qwen.model("dense", "sdpa").save_pretrained(folder)
    return folder


def changed(**values: object) -> Callable[[Path], None]:
    """Other values in config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20000])


def without_one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut off": (truncated, "cannot load"),
    "weights that are empty": (written("model.safetensors", ""), "cannot load"),
    "weights that are text": (written("model.safetensors", "weights " * 99), "cannot load"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
    "one weight missing": (without_one_weight, "lacks 1 weight, model.layers.1.mlp.up_proj.weight"),
    "weights of another width": (changed(intermediate_size=100), "cannot load"),
    "weights of another vocabulary": (changed(vocab_size=64), "cannot load"),
    "no heads": (changed(num_attention_heads=0), ""),
    "a width that is a word": (changed(hidden_size="wide"), "cannot"),
    "a model of an unknown type": (changed(model_type="qwen99"), "cannot read the config"),
    "a model that is no causal LM": (changed(model_type="vit", architectures=["ViTModel"]), "cannot load"),
    "a config that is no JSON": (written("config.json", "{'hidden_size': 64"), "cannot read the config"),
    "a config that is a list": (written("config.json", "[]"), "cannot read the config"),
    "a config that is null": (written("config.json", "null"), "cannot read the config"),
    "a config that is empty": (written("config.json", ""), "cannot read the config"),
    "a shard that is not there": (
        written(
            "model.safetensors.index.json", '{"metadata": {}, "weight_map": {"lm_head.weight": "model-2.safetensors"}}'
        ),
        "",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(name: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    damage, seen = BROKEN[name]
    damage(tmp_path / "model")
    if name == "a shard that is not there":
        (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CPError) as caught:
        build(Job(model=str(tmp_path / "model"), tokens=16, decode=0))
    check(caught.value, "CP051", (seen,))


def test_a_whole_checkpoint(whole: Path) -> None:
    """Control."""
    assert build(Job(model=str(whole), tokens=16, decode=0)).config.hidden_size == 64


# -- as a user runs it -------------------------------------------------------------------------------------------------


def shell(words: str, after: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m cppass.cli {words} {after}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)


def test_more_memory_than_there_is() -> None:
    done = shell("run --preset qwen3-tiny --tokens 2000000000 --batch 1000 --cp 2")
    assert (done.returncode, done.stdout) == (1, "")
    check(error_of(done.stderr), "CP650", ("one device", "allocate"), "fewer --layers, --tokens")


def test_a_closed_pipe() -> None:
    done = shell("cost", "| true; echo ${PIPESTATUS[0]}")
    assert done.stderr == ""


def test_what_nobody_foresaw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of cppass itself: one message, status 1; the traceback on demand."""
    monkeypatch.setattr("cppass.cost.answer.answer", lambda question: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["cppass", "cost"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    check(error_of(capsys.readouterr().err), "CP901", ("ZeroDivisionError: division by zero",), "report")
    monkeypatch.setattr(sys, "argv", ["cppass", "--traceback", "cost"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
