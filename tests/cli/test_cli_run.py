"""The whole command, as a user starts it: spawned ranks, and under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(120)

TINY = ["--tokens", "61", "--decode", "1", "--repeat", "1", "--timeout", "60"]
"""61 tokens do not divide by 2 * ranks."""

KEYS = {
    "": {
        "schema", "ok", "launcher", "job", "model", "check", "rewriting", "kernels", "seconds", "speedup", "peak_memory"
    },
    "model": {
        "family", "parameters", "layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "experts", "note"
    },
    "check": {
        "tokens", "tokens_equal", "tokens_enforced", "logits_max_error", "logits_allowed", "cache_max_error",
        "cache_allowed", "caches_identical_across_ranks",
    },
    "rewriting": {"status", "sites", "collectives", "received_bytes", "text"},
    "seconds": {"one_rank", "ranks", "threads", "compile"},
    "speedup": {"median", "least", "most"},
    "peak_memory": {"method", "one_rank_bytes", "ranks_bytes", "threads_bytes"},
}  # fmt: skip


def test_json_of_spawned_ranks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cppass.cli", "run", "--preset", "qwen3-tiny", *TINY, "--json"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: set(found[name] if name else found) for name in KEYS} == KEYS
    assert (found["schema"], found["ok"], found["launcher"]) == (1, True, "spawn")
    assert found["check"]["tokens_equal"]
    assert found["check"]["caches_identical_across_ranks"]
    assert [len(row) for row in found["check"]["tokens"]] == [2]
    assert found["rewriting"]["status"] == "rewritten"
    layers = found["model"]["layers"]
    assert (found["rewriting"]["sites"], found["rewriting"]["collectives"]) == (layers, layers + 1)
    # One gather of K and V per layer, of the rows of the fullest rank, and one of the row of hidden states that the
    # last token needs: this is what arrives from the one other rank, in float32.
    kv_row, padded_rows, hidden_row = 2 * 2 * 16 * 4, 16 + 15, 64 * 4
    assert found["rewriting"]["received_bytes"] == layers * padded_rows * kv_row + hidden_row
    assert all(line.startswith("[") for line in done.stderr.splitlines()), "progress lines and nothing else"


def test_table_under_torchrun() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "cppass.cli", "run", "--preset", "qwen3-moe-tiny", "--layers", "1", "--cache", "static", *TINY),
        ],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens equal to one device") == 1, "one rank prints"
    lines = [" ".join(line.strip("\u2502").split()).replace(" \u2502", ":") for line in done.stdout.splitlines()]
    assert "tokens equal to one device: yes (2 tokens of 1 sequence)" in lines
    assert "K/V caches identical on all ranks: yes (every bit, after decoding too)" in lines
    assert "attention sites: 1 found, 1 rewritten" in lines
    assert "collectives per forward: 2 (2 per layer, 1 layer)" in lines
    assert "PASS: every rank equals one device" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
