"""Ranks that raise, die or hang: one clean message, nothing left behind. And a run whose numbers are wrong fails."""

from __future__ import annotations

import dataclasses
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from cppass import cli
from cppass.demo import prefill
from cppass.demo.failure import Failure, RankError
from cppass.demo.job import Job, phases
from cppass.demo.launch import run_phase
from cppass.demo.outcome import Outcome
from cppass.demo.results import Comparison, ModelFacts, ProcessResult, Rewriting
from cppass.errors import OptionError, RefusedError

pytestmark = pytest.mark.timeout(90)

TINY = Job(preset="qwen3-tiny", layers=1, tokens=32, decode=1, repeat=1, timeout=60)


def test_other_weights_on_the_ranks_are_noticed(tmp_path: Path) -> None:
    """The negative control of the comparison: the same job, with another seed on the ranks."""
    one, ranks, _ = phases(TINY)
    (device,) = run_phase(TINY, one, tmp_path, lambda text: None)
    others = run_phase(dataclasses.replace(TINY, seed=1), ranks, tmp_path, lambda text: None)
    outcome = Outcome(TINY, device, others, device)
    assert outcome.caches_identical, "the ranks agree among themselves"
    assert outcome.logits_error > 100 * outcome.logits_allowed
    assert outcome.cache_error > 100 * outcome.cache_allowed
    assert not outcome.passed


def test_an_error_of_the_backend_arrives_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_SUPPRESS_ERRORS", "1")
    with pytest.raises(RankError, match="suppress_errors is set") as caught:
        run_phase(TINY, phases(TINY)[1], tmp_path, lambda text: None)
    assert (caught.value.code, caught.value.failure.kind) == ("CP008", "OptionError")
    assert not ranks_left()


def test_a_killed_rank_is_named_and_takes_the_others_along(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL before it had a result") as caught:
        run_phase(TINY, phases(TINY)[1], tmp_path, _to_rank_1(signal.SIGKILL))
    assert caught.value.code == "CP651"
    assert not ranks_left()


def test_a_full_disk(tmp_path: Path) -> None:
    """As a limit to the size of files; torch only says "unexpected pos" there."""
    path, (least, most) = tmp_path / prefill.REFERENCE, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(OptionError, match=r"one device \(4.0 MB\) cannot be written to .* MB are free") as caught:
            prefill.save([torch.zeros(1_000_000)], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert "TMPDIR" in caught.value.hint


def test_a_port_that_is_in_use() -> None:
    """As torchrun's variables have it: rank 0 is to hold the store at a port that another process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        result = CliRunner(env=world | place).invoke(cli.app, ["run", "--preset", "qwen3-tiny", "--tokens", "64"])
    assert result.exit_code == 1
    assert "[CP054] the ranks cannot meet at 127.0.0.1:" in result.stderr
    assert "choose a free MASTER_PORT" in result.stderr


def test_a_silent_rank_runs_into_the_timeout(tmp_path: Path) -> None:
    impatient = dataclasses.replace(TINY, timeout=4)
    with pytest.raises(RankError, match=r"nothing heard for 4 s; still busy: rank 0 .*, rank 1") as caught:
        run_phase(impatient, phases(impatient)[1], tmp_path, _to_rank_1(signal.SIGSTOP))
    assert caught.value.code == "CP654"
    assert not ranks_left()


def ranks_left() -> list[psutil.Process]:
    """Processes of this one that still run; the helper of Python's own multiprocessing is not ours."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not any("multiprocessing" in word for word in child.cmdline())]


def _to_rank_1(how: signal.Signals) -> Callable[[str], None]:
    def say(text: str) -> None:
        if text == "starting":
            for child in psutil.Process().children():
                if child.cmdline()[-1] == "1":
                    child.send_signal(how)

    return say


def test_torchs_wrapper_is_taken_off() -> None:
    class Wrapper(RuntimeError):
        inner_exception = OptionError("CP001", "unknown option", "see CPConfig")

    found = Failure.of(Wrapper("backend='npu_cp' raised"))
    assert (found.kind, found.code, found.message, found.hint) == (
        "OptionError",
        "CP001",
        "unknown option",
        "see CPConfig",
    )
    assert str(RankError("rank 0", found)) == "[CP001] unknown option\n  way out: see CPConfig"
    assert Failure.from_json(found.to_json()) == found
    assert issubclass(RefusedError, RuntimeError)


def test_the_cause_comes_before_its_consequences() -> None:
    lost = Failure("RuntimeError", "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    wrapped = Failure("CPError", "a rank is gone", "CP601")
    died = Failure("ProcessDied", "rank 1 was killed by SIGKILL", "CP651")
    refused, raised = Failure("RefusedError", "no matcher", "CP101"), Failure("MemoryError", "no more")
    assert sorted([lost, wrapped, raised, refused, died], key=lambda f: f.remoteness)[:3] == [died, refused, raised]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_compare_sees_each_tensor(index: int, tmp_path: Path) -> None:
    kept = [torch.ones(1, 8), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)]
    torch.save(kept, tmp_path / "reference.pt")
    kept[index].view(-1)[-1] += 0.5
    errors = prefill.compare(kept, tmp_path / "reference.pt")
    assert (errors.logits_error, errors.cache_error) == ((0.5, 0.0) if index == 0 else (0.0, 0.5))


GOOD = Comparison(logits_error=1e-6, logits_scale=2.0, cache_error=1e-6, cache_scale=1.0)
BAD: dict[str, tuple[dict[str, object], dict[str, float], str]] = {
    "nothing": ({}, {}, "float32"),
    "tokens": ({"tokens": ((1, 9),)}, {}, "float32"),
    "digest": ({"cache_digest": "b"}, {}, "float32"),
    "logits": ({}, {"logits_error": 3e-5}, "float32"),
    "nan logits": ({}, {"logits_error": float("nan")}, "float32"),
    "nan cache": ({}, {"cache_error": float("nan")}, "bfloat16"),
    "tokens in 16 bit": ({"tokens": ((1, 9),)}, {}, "bfloat16"),
}


@pytest.mark.parametrize("what", BAD)
def test_verdict(what: str) -> None:
    """One bad rank fails the run; tokens are enforced in float32 alone."""
    changes, errors, dtype = BAD[what]
    model = ModelFacts("qwen3", 1, 1, 1, 1, 1, 1, 1, 0, "")
    rank = ProcessResult(model, 1.0, (1.0,), ((1, 2),), "a", 1, "", GOOD, Rewriting("rewritten", 1, 2, 3, ""))
    odd = dataclasses.replace(rank, comparison=dataclasses.replace(GOOD, **errors), **changes)  # type: ignore[arg-type]
    outcome = Outcome(dataclasses.replace(TINY, dtype=dtype), rank, (rank, odd), rank)
    assert outcome.passed == (what in ("nothing", "tokens in 16 bit"))
    assert outcome.to_dict()["ok"] == outcome.passed
    assert ProcessResult.from_json(rank.to_json()) == rank
