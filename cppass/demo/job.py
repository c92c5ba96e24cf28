"""What one run does, as one frozen value that is the same in every process, and the phases it is made of."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cppass.demo.presets import PRESETS
from cppass.errors import OptionError

BACKEND = "npu_cp"
"""The torch.compile backend under test."""

MAX_RANKS = 64
"""More ranks than that on one host is a slip of the finger."""

CACHES = ("dynamic", "static", "none")
ATTENTIONS = ("sdpa", "eager")
DTYPES = ("float32", "bfloat16", "float16")
INNERS = ("eager", "inductor")

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
"""Allowed max absolute error, as a fraction of max(1, max |reference|). Equal tokens are enforced for float32 only."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One `cppass run`.

    Attributes:
        preset: name in PRESETS; not looked at where there is a `model`.
        model: directory of a local checkpoint, or None.
        layers, vocab: override what the preset (or, layers only, the checkpoint) says.
        tokens: length of the prompt, in tokens.
        ranks: P, processes of one thread each; a rank stands for a device.
        decode: tokens generated after the prefill, the one that the prefill itself gives not counted.
        batch: sequences in the batch.
        cache: "dynamic", "static" or "none".
        attention: transformers' attn_implementation.
        dtype: name of a torch dtype.
        dynamic: torch.compile's `dynamic`; None leaves the choice to torch.
        inner: what compiles the rewritten graph.
        repeat: timed prefills; the median is reported.
        seed: of the weights and the prompt.
        timeout: seconds that any one wait may take.
    """

    preset: str = "qwen3-0.6b"
    model: str | None = None
    layers: int | None = None
    vocab: int | None = None
    tokens: int = 8192
    ranks: int = 2
    decode: int = 8
    batch: int = 1
    cache: str = "dynamic"
    attention: str = "sdpa"
    dtype: str = "float32"
    dynamic: bool | None = None
    inner: str = "eager"
    repeat: int = 3
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        """Raises OptionError: CP050 a value that is not allowed, CP051 no such model, CP052 too many ranks."""
        _one_of("cache", self.cache, CACHES)
        _one_of("attention", self.attention, ATTENTIONS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("inner", self.inner, INNERS)
        for name, least in (("tokens", 1), ("decode", 0), ("batch", 1), ("repeat", 1), ("layers", 1), ("vocab", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError("CP050", f"--{name} {value} is not allowed", f"give {least} or more")
        if not self.timeout > 0:
            raise OptionError("CP050", f"--timeout {self.timeout:g} is not allowed", "give a number of seconds above 0")
        if not 1 <= self.ranks <= MAX_RANKS:
            raise OptionError("CP052", f"--cp {self.ranks} ranks is not allowed", f"give 1 to {MAX_RANKS}")
        if self.cache == "none" and self.decode:
            raise OptionError("CP050", f"--decode {self.decode} needs a cache", "use --decode 0, or another --cache")
        if self.model is None:
            _one_of("preset", self.preset, tuple(PRESETS))
        else:
            _check_checkpoint(Path(self.model), self.vocab)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Phase:
    """One leg of a run: how many processes of how many threads, compiled or not.

    Attributes:
        name: stable name, also a key of the JSON output.
        title: what the progress display shows.
        processes: how many run at once.
        threads: threads of each.
        compiled: with the backend under test; otherwise the plain model, eagerly.
        reference: "write" keeps results for the others, "compare" checks against them, "" does neither.
    """

    name: str
    title: str
    processes: int
    threads: int
    compiled: bool = False
    reference: str = ""


def phases(job: Job) -> tuple[Phase, Phase, Phase]:
    """One device, P ranks, and what the same cores do for one process, in this order."""
    return (
        Phase("one_rank", "one device: 1 process, 1 thread", 1, 1, reference="write"),
        Phase("ranks", f"{count(job.ranks, 'rank')} of 1 thread, compiled", job.ranks, 1, True, "compare"),
        Phase("threads", f"1 process, {count(job.ranks, 'thread')}", 1, job.ranks),
    )


def count(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks", "4,096 tokens"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError("CP050", f"--{name} {value!r} is not allowed", f"choose one of {', '.join(allowed)}")


def _check_checkpoint(folder: Path, vocab: int | None) -> None:
    if not folder.is_dir():
        raise OptionError("CP051", f"there is no directory {os.fspath(folder)!r}", "give --model a local checkpoint")
    if not (folder / "config.json").is_file():
        raise OptionError(
            "CP051",
            f"{os.fspath(folder)!r} has no config.json",
            "give --model a directory that save_pretrained() wrote",
        )
    if vocab is not None:
        raise OptionError("CP050", "--vocab does not go with --model", "leave --vocab out: a checkpoint has its own")
