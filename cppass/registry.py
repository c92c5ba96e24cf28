"""What was registered from outside the package: rules and site forms, by op, and the text that identifies them.

The built-in tables stay as they are; `cppass/op_rules.py` and `cppass/match` look here for ops that they do not know.
How to register is `cppass/extend`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from cppass.errors import OptionError
from cppass.rules import Rule, name_of

RULE, SITE_FORM = "rule", "site form"


@dataclasses.dataclass(frozen=True)
class Registration:
    """One registered rule or site form.

    Attributes:
        kind: RULE or SITE_FORM.
        op: the op by name, such as "mylib::gate".
        read: the Rule; or what makes an AttentionSite (or a Refusal) of a node.
        identity: what it was made from, and a hash of that source; the same in every process that runs it.
    """

    kind: str
    op: str
    read: Any
    identity: str

    def __str__(self) -> str:
        return f"{self.kind} {self.op}: {self.identity}"


_registrations: dict[str, Registration] = {}


def add(registration: Registration) -> None:
    _registrations[registration.op] = registration


def remove(op: str) -> bool:
    """Whether there was one."""
    return _registrations.pop(op, None) is not None


def find(op: str) -> Registration | None:
    return _registrations.get(op)


def registered() -> tuple[str, ...]:
    """Every registration as a line of plain text, sorted: equal texts mean equal rules and forms.

    ("rule mylib::gate: row_wise('x', 'gate', used=1)", "site form mylib::attend: forms.attend, sha256 0f3a...")

    The hash is of the source files that define the functions, and of the values they close over. Whatever keeps or
    compares compiled graphs should take these lines into its key.
    """
    return tuple(sorted(str(r) for r in _registrations.values()))


def registered_rule(node: fx.Node) -> Rule | None:
    """The registered rule of a node's op, None where there is none."""
    found = _registrations.get(name_of(node))
    return found.read if found is not None and found.kind == RULE else None


def registered_form(node: fx.Node) -> Callable[[fx.Node], Any] | None:
    """What reads a node as attention by a registered form, None where there is none."""
    found = _registrations.get(name_of(node))
    return found.read if found is not None and found.kind == SITE_FORM else None


# -- identity ----------------------------------------------------------------------------------------------------------


def identity_of(reader: Any) -> str:
    """Stable text for a function, or for a frozen dataclass that is called like one.

    Raises:
        OptionError: CP022, it holds something that has no stable text (an object, an open file, a tensor).
    """
    if dataclasses.is_dataclass(reader) and not isinstance(reader, type) and _of_cppass(reader):
        return repr(reader)  # its code is cppass's, which has a version
    digest = hashlib.sha256(_text(reader).encode()).hexdigest()
    return f"{_name(reader)}, sha256 {digest[:16]}"


def _of_cppass(reader: Any) -> bool:
    return type(reader).__module__.split(".")[0] == "cppass"


def _name(reader: Any) -> str:
    inner = reader.func if isinstance(reader, functools.partial) else reader
    named = inner if isinstance(inner, types.FunctionType) else type(inner)
    return f"{_module(named)}.{named.__qualname__}"


def _module(named: Any) -> str:
    """Spawned processes know the main module by another name."""
    return str(named.__module__).replace("__mp_main__", "__main__")


def _text(value: Any) -> str:
    """Everything that decides what a reader returns, as far as it can be told: source, defaults, values closed over."""
    if isinstance(value, types.FunctionType):
        closed = inspect.getclosurevars(value).nonlocals
        given = (value.__defaults__, value.__kwdefaults__, dict(sorted(closed.items())))
        return f"{_module(value)}.{value.__qualname__} {_source(value)} {_text(given)}"
    if isinstance(value, functools.partial):
        return f"partial {_text(value.func)} {_text(value.args)} {_text(value.keywords)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return f"{_source(type(value))} {_text(fields)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_text(v)}" for name, v in value.items()) + "}"
    plain = (str, int, float, type(None), torch.dtype, torch._ops.OpOverload, types.BuiltinFunctionType, type)
    if isinstance(value, plain):
        return repr(value)
    raise OptionError(
        "CP022",
        f"{value!r} has no text that is the same in every process, so graphs made with it could not be told apart",
        "register a plain function (or a frozen dataclass with __call__) over plain values",
    )


def _source(defined: types.FunctionType | type) -> str:
    """The file that defines it, as what it calls is mostly there too; its code where there is no file."""
    try:
        return Path(inspect.getsourcefile(defined) or "").read_text()
    except (OSError, TypeError):
        call = defined if isinstance(defined, types.FunctionType) else defined.__dict__.get("__call__")
        return _code(call.__code__) if isinstance(call, types.FunctionType) else f"{defined.__qualname__}"


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"
