"""What `cppass cost` is asked and what it answers, for machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from cppass.cost.hardware import HARDWARE, Hardware
from cppass.cost.host import calibrate
from cppass.cost.model import MODELS, ModelShape
from cppass.cost.predict import SCHEMES, Prediction, best_ranks, break_even, predict
from cppass.errors import OptionError

HOST = "host"
MOST_RANKS, MOST_TOKENS = 1024, 2**26
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Question:
    """A model, a device, a prompt length and numbers of ranks.

    Raises:
        OptionError: CP050, one of them is not allowed.
    """

    preset: str
    hardware: str
    tokens: int
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        _choice("--preset", self.preset, tuple(MODELS))
        _choice("--hardware", self.hardware, (*HARDWARE, HOST))
        if not self.ranks or not all(1 <= r <= MOST_RANKS for r in self.ranks):
            given = ",".join(map(str, self.ranks))
            raise OptionError("CP050", f"--ranks {given} is not allowed", f"give numbers from 1 to {MOST_RANKS}")
        least = 2 * max(self.ranks)
        if not least <= self.tokens <= MOST_TOKENS:
            raise OptionError(
                "CP050",
                f"--tokens {self.tokens} is not allowed with {max(self.ranks)} ranks",
                f"give {least} (two a rank) to {MOST_TOKENS}",
            )


def ranks_of(text: str) -> tuple[int, ...]:
    """The numbers in "2,4,8", in order and once each.

    Raises:
        OptionError: CP050, there is something else in it.
    """
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise OptionError("CP050", f"--ranks {text!r} is not allowed", "give numbers such as 2,4,8") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """Predictions for one number of ranks; None where a scheme cannot deal out the heads. `break_even`: in tokens."""

    ranks: int
    schemes: dict[str, Prediction | None]
    break_even: int | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `cppass cost` shows."""

    shape: ModelShape
    hardware: Hardware
    one: Prediction
    rows: tuple[Row, ...]
    best: int

    @property
    def measured(self) -> bool:
        """Whether the device's figures were measured, just now."""
        return self.hardware.name == HOST

    def to_dict(self) -> dict[str, Any]:
        """One JSON object; seconds, bytes and tokens."""
        return {
            "schema": SCHEMA,
            "ok": True,
            "model": dataclasses.asdict(self.shape),
            "hardware": dataclasses.asdict(self.hardware),
            "figures_measured": self.measured,
            "one_device": dataclasses.asdict(self.one),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "best_ranks": self.best,
        }


def answer(question: Question) -> Answer:
    """Predict; measures this host first where that is the device."""
    shape = MODELS[question.preset]
    if question.hardware == HOST:
        hardware = calibrate()
        shape = dataclasses.replace(shape, weight_bytes=4, activation_bytes=4)  # float32, as `cppass run` has it
    else:
        hardware = HARDWARE[question.hardware]
    return answer_for(shape, hardware, question.tokens, question.ranks)


def answer_for(shape: ModelShape, hardware: Hardware, tokens: int, ranks: tuple[int, ...]) -> Answer:
    one = predict(shape, hardware, tokens)
    assert one is not None
    rows = tuple(
        Row(r, {s: predict(shape, hardware, tokens, r, s) for s in SCHEMES}, break_even(shape, hardware, r))
        for r in ranks
    )
    return Answer(shape, hardware, one, rows, best_ranks(shape, hardware, tokens, ranks))


def _choice(option: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise OptionError("CP050", f"{option} {given!r} is not allowed", f"choose one of {', '.join(allowed)}")
