"""CPConfig: every option of the backend, documented and checked. Built from torch.compile(options=...)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from cppass.cost.hardware import HARDWARE, Hardware
from cppass.errors import OptionError, Unsupported

CHOICES: dict[str, tuple[str | int | None, ...]] = {
    "inputs": ("replicated", "sharded"),
    "target": ("auto", "host", "npu"),
    "on_refusal": ("raise", "fallback"),
    "remainder": (None, "first", "balanced"),
    "attention_calls": (1, 2),
    "agreement": ("step", "graph"),
    "inner": ("auto", "eager", "inductor", "npugraph_ex", "torchair"),
}
INNERS = {"host": ("eager", "inductor"), "npu": ("npugraph_ex", "torchair", "eager")}
"""What compiles the rewritten graph, per target; the first is what "auto" takes."""

NON_GROUP_MEMBER = -100  # what torch.distributed.new_group returns on a rank that is not in the group


@dataclasses.dataclass(frozen=True)
class CPConfig:
    """Options of `torch.compile(model, backend="npu_cp", options={...})`.

    Attributes:
        group: the ranks that share a sequence: a ProcessGroup, its name, or a one-dimensional DeviceMesh. None: the
            world.
        cp_size: number of ranks where there is no group (run_pass, explain); with a group it must agree with it.
        rank: this rank's number in the group where there is no group; 0 by default.
        inputs: "replicated": every rank is handed the same full inputs and gets the full outputs. "sharded": a model
            runner hands each rank its own rows, as cppass.runner plans them; see docs/runner.md.
        sharded_inputs: with inputs="sharded": {name: token dimension} of the inputs that arrive as local rows, named as
            the model's forward names them ("position_ids", or "metadata.position_ids").
        remainder: with inputs="sharded": which blocks are one row longer, "balanced" (None) or "first"; the runner's
            plan must say the same.
        target: which ops are emitted: "host", "npu", or "auto" (npu where the graph has torch_npu's ops or tensors on
            an NPU, else host). It does not say which machine runs them: NPU graphs run on CPU tensors, too.
        inner: what compiles the rewritten graph. host: "eager" ("auto") or "inductor". npu: "npugraph_ex" ("auto", ACL
            graph), "torchair" (GE, max-autotune) or "eager".
        on_refusal: "raise", or "fallback": run the graph unsharded, with a warning and a report.
        strict: True refuses an op that has no rule; False gathers its inputs, goes on and reports it.
        min_tokens: graphs with fewer tokens are left alone; at least 2 * cp_size tokens are needed in any case. "auto":
            as many as the cost model says pay on `hardware` (docs/cost-model.md).
        hardware: with min_tokens="auto": the device, by name in cppass.cost.HARDWARE or as a cppass.cost.Hardware; the
            same on all ranks. None: "ascend-910b" for graphs of NPU ops, "host-core" for others.
        overlap: start a collective as soon as what it sends is there and wait for it when what it brings is needed;
            False keeps the order in which the graph was written.
        attention_calls: target npu: 2, one call a half, or 1, both halves in one call over 2 x sequences (a paged cache
            in TND, which that names twice).
        agreement: when the ranks of a group compare what they are about to run: before every "step" of a graph with
            collectives, or before the first one of a "graph" alone (docs/agreement.md says what that gives up).
        agreement_timeout: seconds a rank waits there for the others. None: as long as a collective of the group would,
            300 at most.
        check_inputs: compare values there, too: "first", token ids and a sample of the weights before the first step of
            each graph; True, token ids before every step; False, neither. With inputs="sharded" weights alone.
        mode: torch.compile's mode; accepted and recorded, it changes nothing.
    """

    group: Any = None
    cp_size: int | None = None
    rank: int | None = None
    inputs: str = "replicated"
    sharded_inputs: Any = ()
    remainder: str | None = None
    target: str = "auto"
    inner: str = "auto"
    on_refusal: str = "raise"
    strict: bool = False
    min_tokens: int | str = 0
    hardware: Any = None
    overlap: bool = True
    attention_calls: int = 2
    agreement: str = "step"
    agreement_timeout: float | None = None
    check_inputs: bool | str = "first"
    mode: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if not _is_one_of(getattr(self, name), allowed):
                raise _bad(name, getattr(self, name), "one of " + ", ".join(repr(a) for a in allowed))
        if not (isinstance(self.check_inputs, bool) or _is_one_of(self.check_inputs, ("first",))):
            raise _bad("check_inputs", self.check_inputs, "'first', True or False")
        for name in ("strict", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")
        _check_int("cp_size", self.cp_size, 1, optional=True)
        _check_int("rank", self.rank, 0, optional=True)
        if not _is_one_of(self.min_tokens, ("auto",)):
            _check_int("min_tokens", self.min_tokens, 0)
            if self.hardware is not None:
                raise _bad("hardware", self.hardware, "for min_tokens='auto' alone")
        elif not (isinstance(self.hardware, Hardware) or _is_one_of(self.hardware, (None, *HARDWARE))):
            raise _bad("hardware", self.hardware, f"a cppass.cost.Hardware, or one of {', '.join(HARDWARE)}")
        _check_seconds("agreement_timeout", self.agreement_timeout)
        if self.check_inputs is True and self.agreement != "step":
            raise _bad("agreement", self.agreement, "'step' with check_inputs=True: ids are compared before every step")
        if self.rank is not None and self.cp_size is not None and self.rank >= self.cp_size:
            raise _bad("rank", self.rank, f"an int below cp_size={self.cp_size}")
        if self.mode is not None and not isinstance(self.mode, str):
            raise _bad("mode", self.mode, "a string or None")
        if self.group is not None and not _is_group(self.group):
            raise _bad("group", self.group, "a ProcessGroup, the name of one, or a one-dimensional DeviceMesh")
        if self.target != "auto" and self.inner not in ("auto", *INNERS[self.target]):
            raise _bad("inner", self.inner, f"one of {', '.join(INNERS[self.target])} with target={self.target!r}")
        self._check_contract()

    def _check_contract(self) -> None:
        """What goes with the two ways inputs may arrive."""
        named = _named_dims(self.sharded_inputs)
        object.__setattr__(self, "sharded_inputs", named)
        if self.inputs == "replicated":
            for name in ("sharded_inputs", "remainder"):
                if getattr(self, name):
                    raise _bad(name, getattr(self, name), "for inputs='sharded' alone")
            return
        if not named:
            raise _bad("sharded_inputs", {}, 'with inputs=\'sharded\' such as {"input_ids": 0, "position_ids": 0}')
        for name, default in (("on_refusal", "raise"), ("min_tokens", 0)):
            if getattr(self, name) != default:
                why = "a graph that is left alone would attend over local rows only"
                raise _bad(name, getattr(self, name), f"{default!r} with inputs='sharded': {why}")
        if self.check_inputs is True:
            why = "ranks are handed different ids"
            raise _bad("check_inputs", True, f"'first' or False with inputs='sharded': {why}")
        if self.target == "host":
            raise Unsupported(
                "CP002",
                "inputs='sharded' with target='host' is not implemented: it takes fused-infer-attention",
                "leave inputs at its default, 'replicated'",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> CPConfig:
        """The config of a torch.compile call.

        Raises:
            OptionError: an option is unknown (CP001) or has a value that is not allowed (CP003).
        """
        if not isinstance(options, (Mapping, type(None))):
            raise OptionError("CP003", f"options={options!r} is no dict", 'give them by name, such as {"strict": True}')
        given = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, 1)
                meant = f"did you mean {close[0]!r}? " if close else ""
                raise OptionError(
                    "CP001",
                    f"unknown option {name!r} (given {given[name]!r})",
                    f"{meant}options are {', '.join(names)}",
                )
        if mode is not None:
            given.setdefault("mode", mode)
        return cls(**given)

    @classmethod
    def merged(cls, config: CPConfig | None, options: Mapping[str, Any]) -> CPConfig:
        """A config with some options changed; raises as from_options does."""
        if not isinstance(config, (cls, type(None))):
            raise OptionError("CP003", f"config={config!r} is no CPConfig", "make one: cppass.CPConfig(cp_size=2)")
        given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} if config is not None else {}
        return cls.from_options({**given, **options})


def _named_dims(given: Any) -> tuple[tuple[str, int], ...]:
    """Sorted (name, dimension) pairs of a mapping, or of such pairs."""
    try:
        named = tuple(sorted(dict(given).items()))
    except (TypeError, ValueError):
        named = ((None, 0),)
    for name, dim in named:
        if not isinstance(name, str) or isinstance(dim, bool) or not isinstance(dim, int):
            raise _bad("sharded_inputs", given, 'a mapping of names to dimensions, such as {"input_ids": 0}')
    return named


def _is_one_of(value: object, allowed: tuple[str | int | None, ...]) -> bool:
    """Equal to one of them and of its type: True is not 1, and an array is compared with nothing."""
    return not isinstance(value, bool) and any(isinstance(value, type(a)) and value == a for a in allowed)


def _bad(name: str, value: object, allowed: str) -> OptionError:
    return OptionError("CP003", f"option {name}={value!r} is not allowed", f"{name} is {allowed}")


def _check_int(name: str, value: object, least: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _bad(name, value, f"an int of {least} or more" + (", or None" if optional else ""))


def _check_seconds(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < float("inf")):  # type: ignore[operator]
        raise _bad(name, value, "a number of seconds above 0, or None")


def _is_group(value: object) -> bool:
    """By name of type, so that checking options imports no torch.distributed."""
    kinds = {c.__name__ for c in type(value).__mro__}
    named = _is_one_of(value, (NON_GROUP_MEMBER,)) or isinstance(value, str)
    return named or bool(kinds & {"ProcessGroup", "DeviceMesh"})
