"""Errors and refusals: what went wrong, where, and the way out.

Codes are stable: CP0xx options and call, CP1xx find, CP2xx shard, CP3xx plan, CP4xx verify, CP5xx lower, CP6xx run
time, CP9xx internal.

`torch.compile` wraps whatever a backend raises: users catch `torch._dynamo.exc.BackendCompilerFailed` and find the
`CPError` as its `inner_exception` (`cppass.unwrap` returns it).
"""

from __future__ import annotations

import dataclasses


class CPError(RuntimeError):
    """Base of every error cppass raises on purpose.

    Args:
        code: stable code such as "CP001".
        message: what was seen and what is supported.
        hint: what the user can do about it.
    """

    def __init__(self, code: str, message: str = "", hint: str = "") -> None:
        self.code, self.message, self.hint = code, message, hint
        text = f"[{code}] {message}" + (f"\n  way out: {hint}" if hint else "")
        super().__init__(text if message else code)  # a whole text: torchair builds errors of other errors' texts

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.code, self.message, self.hint))


def _rebuild(cls: type[CPError], code: str, message: str, hint: str) -> CPError:
    error = cls.__new__(cls)
    CPError.__init__(error, code, message, hint)
    return error


class OptionError(CPError, ValueError):
    """An option or argument is unknown or has a value that is not allowed (CP0xx)."""


class StepError(CPError, ValueError):
    """What a model runner says of a step does not fit together (CP61x)."""


class PeerError(CPError):
    """The ranks of a group do not agree, or one of them failed or is missing (CP60x). Raised on every rank that can."""


class Unsupported(CPError, NotImplementedError):
    """A named feature that cppass does not rewrite (yet). Nothing was rewritten."""


class RefusedError(CPError):
    """The graph holds something that cannot be rewritten correctly; nothing was rewritten."""

    def __init__(self, refusals: tuple[Refusal, ...] | str) -> None:
        if isinstance(refusals, str):  # a whole text, as CPError takes it
            self.refusals: tuple[Refusal, ...] = ()
            super().__init__(refusals)
            return
        self.refusals = refusals
        first, rest = refusals[0], len(refusals) - 1
        more = f"\n  and {rest} more of the same kind" if rest else ""
        super().__init__(first.code, first.why + first.place() + more, first.hint)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.refusals,))


class UnsupportedRefusal(RefusedError, NotImplementedError):
    """The graph asks for a named feature that cppass does not rewrite (yet); nothing was rewritten."""


def refused_error(refusals: tuple[Refusal, ...]) -> RefusedError:
    """The error of these refusals; a NotImplementedError where the first is about a named feature."""
    return (UnsupportedRefusal if refusals[0].code in FEATURE_CODES else RefusedError)(refusals)


FEATURE_CODES = ("CP110", "CP111")


class VerifyError(CPError):
    """The rewritten graph is not a legal one: a bug of cppass, caught before it could give a wrong number (CP4xx)."""


class ExtensionError(CPError):
    """A registered rule or site form fails, returns nonsense, or does not do what it says (CP115, CP204 to CP206)."""


class InternalError(CPError):
    """Something below or inside cppass failed while compiling; the cause is chained (CP9xx)."""


class CPWarning(UserWarning):
    """Results stay right, but not as fast as they could be."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a node was not rewritten.

    Attributes:
        code: stable code such as "CP101".
        node: name of the FX node.
        op: the node's target, as text.
        why: what was seen and why it cannot be rewritten.
        hint: the way out.
        where: "file:line in function: source" of the user's code, where the graph knows it.
        module: path of the module that the node was made in, "model.layers.0.self_attn"; "" where unknown.
    """

    code: str
    node: str
    op: str
    why: str
    hint: str = ""
    where: str = ""
    module: str = ""

    def place(self) -> str:
        module = f" of {self.module}" if self.module else ""
        return f"\n  at node {self.node} ({self.op}){module}" + (f"\n  from {self.where}" if self.where else "")

    def __str__(self) -> str:
        return f"[{self.code}] {self.why}{self.place()}" + (f"\n  way out: {self.hint}" if self.hint else "")
