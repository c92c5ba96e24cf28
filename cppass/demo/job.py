"""What one run does, as one frozen value that is the same in every process, and the phases it is made of."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cppass.config import INNERS
from cppass.demo.presets import PRESETS
from cppass.errors import OptionError

BACKEND = "npu_cp"
"""The torch.compile backend under test."""

MAX_RANKS = 64
"""More ranks than that on one host is a slip of the finger."""

MOST, WEEK = 2**31 - 1, 7 * 24 * 3600

DTYPES = ("float32", "bfloat16", "float16")

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
"""Allowed max absolute error, as a fraction of max(1, max |reference|). Equal tokens are enforced for float32 only."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a model is written, and what goes with that; the first of each is what a job takes unless it says otherwise.

    Attributes:
        inners: compilers of the rewritten graph.
        caches: kinds of K/V cache.
        attentions: kinds of attention.
        kernels: what ran, where its speed says nothing of the machine that the ops are made for; "" otherwise. There
            is no speed-up then, and no phase of one process with the cores of all ranks.
    """

    inners: tuple[str, ...]
    caches: tuple[str, ...]
    attentions: tuple[str, ...]
    kernels: str = ""


DIALECTS = {
    "hf": Dialect(INNERS["host"], ("dynamic", "static", "none"), ("sdpa", "eager")),
    "npu": Dialect(
        INNERS["npu"],
        ("paged",),
        ("npu_fused_infer_attention_score_v2",),
        kernels="torch_npu's ops ran on CPU kernels made for their numbers, not for speed. No NPU was involved, and "
        "the times say nothing of one.",
    ),
}
"""Hugging Face transformers, and models written with torch_npu's ops (cppass.demo.npu)."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One `cppass run`.

    Attributes:
        dialect: name in DIALECTS.
        preset: name in PRESETS; not looked at where there is a `model`.
        model: directory of a local checkpoint, or None.
        layers, vocab: override what the preset (or, layers only, the checkpoint) says.
        tokens: length of the prompt, in tokens.
        ranks: P, processes of one thread each; a rank stands for a device.
        decode: tokens generated after the prefill, the one that the prefill itself gives not counted.
        batch: sequences in the batch, of `tokens` tokens each.
        cache: "dynamic", "static" or "none"; "paged" with npu.
        attention: transformers' attn_implementation; the op's name with npu.
        dtype: name of a torch dtype.
        dynamic: torch.compile's `dynamic`; None leaves the choice to torch.
        inner: what compiles the rewritten graph.
        repeat: timed prefills; the median is reported.
        seed: of the weights and the prompt.
        timeout: seconds that any one wait may take.

    An empty `cache`, `attention` or `inner` becomes the dialect's first.
    """

    dialect: str = "hf"
    preset: str = "qwen3-0.6b"
    model: str | None = None
    layers: int | None = None
    vocab: int | None = None
    tokens: int = 8192
    ranks: int = 2
    decode: int = 8
    batch: int = 1
    cache: str = ""
    attention: str = ""
    dtype: str = "float32"
    dynamic: bool | None = None
    inner: str = ""
    repeat: int = 3
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        """Raises OptionError: CP050 a value that is not allowed, CP051 no such model, CP052 too many ranks."""
        _one_of("dialect", self.dialect, tuple(DIALECTS))
        dialect = DIALECTS[self.dialect]
        for name, allowed in (
            ("cache", dialect.caches),
            ("attention", dialect.attentions),
            ("inner", dialect.inners),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, allowed[0])
            _fits(name, getattr(self, name), allowed, self.dialect)
        _one_of("dtype", self.dtype, DTYPES)
        if self.dialect == "npu" and self.model is not None:
            raise OptionError(
                "CP050",
                "--model does not go with --dialect npu",
                "give a --preset: these models have random weights only",
            )
        for name, least in (("tokens", 1), ("decode", 0), ("batch", 1), ("repeat", 1), ("layers", 1), ("vocab", 2)):
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                way_out = f"give {least} or more" if value < least else f"give at most {MOST}"
                raise OptionError("CP050", f"--{name} {value} is not allowed", way_out)
        if not -(2**63) <= self.seed < 2**63:
            raise OptionError("CP050", f"--seed {self.seed} is not allowed", "give a number of 64 bits")
        check_timeout(self.timeout)
        if not 1 <= self.ranks <= MAX_RANKS:
            raise OptionError("CP052", f"--cp {self.ranks} ranks is not allowed", f"give 1 to {MAX_RANKS}")
        if self.cache == "none" and self.decode:
            raise OptionError("CP050", f"--decode {self.decode} needs a cache", "use --decode 0, or another --cache")
        if self.model is None:
            _one_of("preset", self.preset, tuple(PRESETS))
        else:
            _check_checkpoint(Path(self.model), self.vocab)

    @property
    def sequence_rows(self) -> int:
        """Rows of the dimension that ranks share: the tokens of one sequence, or of all where they are packed."""
        return self.tokens * (self.batch if self.dialect == "npu" else 1)

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


def phases(job: Job) -> tuple[Phase, ...]:
    """One device, P ranks, and, where speed counts, what the same cores do for one process; in this order."""
    legs = (
        Phase("one_rank", "one device: 1 process, 1 thread", 1, 1, reference="write"),
        Phase("ranks", f"{count(job.ranks, 'rank')} of 1 thread, compiled", job.ranks, 1, True, "compare"),
        Phase("threads", f"1 process, {count(job.ranks, 'thread')}", 1, job.ranks),
    )
    return legs[:2] if DIALECTS[job.dialect].kernels else legs


def count(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks", "4,096 tokens"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def check_timeout(seconds: float) -> None:
    """Raises OptionError (CP050) for a time that cannot be waited."""
    if not 0 < seconds <= WEEK:
        way_out = f"give at most {WEEK} seconds" if seconds > WEEK else "give a number of seconds above 0"
        raise OptionError("CP050", f"--timeout {seconds:g} is not allowed", way_out)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError("CP050", f"--{name} {value!r} is not allowed", f"choose one of {', '.join(allowed)}")


def _fits(name: str, value: str, allowed: Sequence[str], dialect: str) -> None:
    """One of the dialect's; where there is only one, the option itself is what is wrong."""
    if len(allowed) == 1 and value not in allowed:
        raise OptionError(
            "CP050", f"--{name} does not go with --dialect {dialect}", f"leave --{name} out: it is {allowed[0]}"
        )
    _one_of(name, value, allowed)


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
