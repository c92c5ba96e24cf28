"""What went wrong in a process, in a form that travels as JSON and is shown as one clean message."""

from __future__ import annotations

import dataclasses
import json
import traceback

from cppass.errors import CPError

OUT_OF_MEMORY = "out of memory? use fewer --layers, --tokens or ranks"
UNKNOWN = "--traceback shows where it was raised"


@dataclasses.dataclass(frozen=True)
class Failure:
    """An exception of another process.

    Attributes:
        kind: name of its type.
        message: its text.
        code: of a CPError; "" otherwise.
        hint: the way out.
        trace: the Python traceback.
    """

    kind: str
    message: str
    code: str = ""
    hint: str = ""
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Ours out of torch's wrapper, where there is one."""
        trace = "".join(traceback.format_exception(error))
        ours = find_ours(error)
        if ours is not None:
            return cls(type(ours).__name__, ours.message, ours.code, ours.hint, trace)
        memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        return cls(type(error).__name__, str(error), hint=OUT_OF_MEMORY if memory else UNKNOWN, trace=trace)

    @property
    def remoteness(self) -> int:
        """How likely it only follows from another rank's failure: a death never; lost connections and CP6xx mostly."""
        if self.code == "CP651":
            return 0
        if self.code:
            return 3 if self.code.startswith("CP6") else 1
        return 3 if "onnection" in self.message or "gloo" in self.message else 2

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        return cls(**json.loads(text))


class RankError(CPError):
    """A process of the run failed. Its code is that of its CPError, or CP650 (raised), CP651 (died), CP654 (silent)."""

    def __init__(self, where: str, failure: Failure) -> None:
        self.where, self.failure = where, failure
        text = failure.message if failure.code else f"{where} raised {failure.kind}: {failure.message}"
        super().__init__(failure.code or "CP650", text, failure.hint)

    def __reduce__(self) -> tuple[object, ...]:
        return (RankError, (self.where, self.failure))


def find_ours(error: BaseException) -> CPError | None:
    """The CPError that an exception is, wraps (BackendCompilerFailed.inner_exception), or was raised from."""
    seen: list[BaseException] = []
    todo: BaseException | None = error
    while todo is not None and todo not in seen:
        if isinstance(todo, CPError):
            return todo
        seen.append(todo)
        inner = getattr(todo, "inner_exception", None)
        todo = inner if isinstance(inner, BaseException) else todo.__cause__
    return None
