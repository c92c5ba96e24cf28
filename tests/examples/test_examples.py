"""Every example, run as its first lines say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *options: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks else []
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, f"examples/{script}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment, check=False)


def test_tour() -> None:
    """It starts its ranks by itself; docs/tour.md shows what it prints."""
    ended = run("tour.py")
    assert "same tokens as one device: True" in ended.stdout, ended.stderr
    (difference,) = re.findall(r"largest difference from one device: (\S+)", ended.stdout)
    assert float(difference) < 1e-4
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    shown = page.split("<!-- printed by examples/tour.py -->")[1].split("```")[1].removeprefix("text\n")
    assert without_digits_of(difference, ended.stdout) == without_digits_of(r"\d\.\de-\d+", shown)


def without_digits_of(difference: str, printed: str) -> str:
    """Rounding differs from machine to machine; nothing else does."""
    return re.sub(difference, "x", printed)


def test_npu_hook() -> None:
    """Under torchair; tests/npu/test_npu_ranks.py has the same under npugraph_ex."""
    ended = run("npu_hook.py", "--compiler", "torchair", ranks=2)
    assert ended.returncode == 0, ended.stderr
    (difference,) = re.findall(r"torchair: largest difference from one device: (\S+)", ended.stdout)
    assert float(difference) < 1e-4
    assert "2 attention sites" in ended.stdout


def test_every_example_is_listed_and_run() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for example in (ROOT / "examples").glob("*.py"):
        assert f"[{example.name}]({example.name})" in listed
        assert f'"{example.name}"' in tests


def test_hugging_face() -> None:
    ended = run("hugging_face.py", ranks=2)
    assert "tokens equal one device: True" in ended.stdout, ended.stderr


def test_model_runner() -> None:
    """Nine requests over time: chunks, decode rows, reused prefixes; one graph for every sharded step."""
    ended = run("model_runner.py", ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("equal to one device: True") == 9
    assert "(128 reused)" in ended.stdout
    assert re.search(r"[1-9]\d* sharded steps on 1 graph, [1-9]\d* plain ones", ended.stdout)


def test_prefill_and_decode_in_separate_processes() -> None:
    ended = run("prefill_decode.py", ranks=3)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("equal to one device: True") == 6
    assert "sharded" not in ended.stdout  # decode runs without context parallelism


def test_custom_rule() -> None:
    ended = run("custom_rule.py")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("equal to one device: True") == 2
    before, after = (ended.stdout.split(title)[1] for title in ("without a rule: ", "with a rule: "))
    assert before.startswith("3 collectives")
    assert "mylib.gated_mlp.default has no rule" in before.split("with a rule")[0]
    assert after.startswith("2 collectives")
    assert "has no rule" not in after


def test_qwen3_235b_fits_its_devices() -> None:
    ended = run("qwen3_235b.py")
    weights = [float(n) for n in re.findall(r"weights ([\d.]+) GB", ended.stdout)]
    assert len(weights) == 2
    assert 16 * weights[0] == pytest.approx(2 * 235, rel=0.15)  # 235 B weights of two bytes, some of them replicated
    assert "131072 tokens: cache  6.31 GB, received K/V  4.73 GB" in ended.stdout


# -- GSM8K on a tiny checkpoint ----------------------------------------------------------------------------------------

WORDS = ["how", "many", "apples", "are", "3", "and", "4", "?", "Question", ":", "Answer", "think", "step", "by"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=len(WORDS) + 1)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gsm8k") / "test.jsonl"
    asked = [{"question": "how many apples are " + "3 and 4 " * n, "answer": f"so\n#### {n}"} for n in (3, 4)]
    path.write_text("\n".join(json.dumps(entry) for entry in asked))
    return path


def test_gsm8k(checkpoint: Path, data: Path) -> None:
    ended = run("gsm8k.py", "--model", str(checkpoint), "--data", str(data), "--new-tokens", "6", ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert "2 questions, 2 ranks" in ended.stdout
    assert "2 answers the same text" in ended.stdout


def test_gsm8k_below_its_threshold(checkpoint: Path, data: Path) -> None:
    options = ["--model", str(checkpoint), "--data", str(data), "--new-tokens", "2", "--threshold", "1.1"]
    ended = run("gsm8k.py", *options, ranks=2)
    assert ended.returncode == 1
    assert "is below 1.1" in ended.stderr


def test_gsm8k_names_a_bad_line(checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "how many"}')
    ended = run("gsm8k.py", "--model", str(checkpoint), "--data", str(bad), ranks=1)
    assert ended.returncode == 1
    assert f"{bad}:1: not" in ended.stderr
