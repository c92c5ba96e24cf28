"""Every option that is wrong is named, with the value that was given and the values that are allowed."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

import cppass
from cppass.config import CHOICES, CPConfig
from cppass.errors import OptionError

DEFAULTS = {
    "group": None,
    "cp_size": None,
    "rank": None,
    "inputs": "replicated",
    "sharded_inputs": (),
    "remainder": None,
    "target": "auto",
    "inner": "auto",
    "on_refusal": "raise",
    "strict": False,
    "min_tokens": 0,
    "hardware": None,
    "overlap": True,
    "attention_calls": 2,
    "agreement": "step",
    "agreement_timeout": None,
    "check_inputs": "first",
    "mode": None,
}


@pytest.mark.parametrize("given", [None, {}])
def test_defaults(given: dict[str, Any] | None) -> None:
    assert dataclasses.asdict(CPConfig.from_options(given)) == DEFAULTS


GOOD: list[dict[str, Any]] = [
    {"cp_size": 1},
    {"cp_size": 4, "rank": 3},
    {"rank": 7},
    {"min_tokens": 0},
    {"min_tokens": 4096},
    {"min_tokens": "auto", "hardware": "h100-sxm"},
    {"overlap": False},
    {"attention_calls": 1},
    {"agreement": "graph", "agreement_timeout": 0.5},
    {"strict": True},
    {"target": "host"},
    {"inner": "eager"},
    {"inner": "inductor"},
    {"on_refusal": "fallback"},
    {"group": "name of a group"},
    {"mode": "max-autotune"},
    {"mode": None},
]


@pytest.mark.parametrize("given", GOOD, ids=str)
def test_what_is_given_is_taken(given: dict[str, Any]) -> None:
    assert dataclasses.asdict(CPConfig.from_options(given)) == {**DEFAULTS, **given}


BAD: list[tuple[str, Any, str]] = [
    *((name, "nonsense", ", ".join(map(repr, allowed))) for name, allowed in CHOICES.items()),
    ("target", None, "'auto', 'host', 'npu'"),
    ("inner", "Inductor", "'auto', 'eager', 'inductor'"),
    ("on_refusal", True, "'raise', 'fallback'"),
    ("cp_size", 0, "1 or more"),
    ("cp_size", -2, "1 or more"),
    ("cp_size", 2.0, "an int of 1 or more, or None"),
    ("cp_size", "2", "an int of 1 or more, or None"),
    ("cp_size", True, "an int of 1 or more, or None"),
    ("rank", -1, "0 or more"),
    ("rank", 0.5, "an int of 0 or more, or None"),
    ("min_tokens", -1, "0 or more"),
    ("min_tokens", None, "an int of 0 or more"),
    ("min_tokens", "4k", "an int of 0 or more"),
    ("strict", 1, "True or False"),
    ("strict", None, "True or False"),
    ("strict", "yes", "True or False"),
    ("check_inputs", 0, "'first', True or False"),
    ("agreement", "never", "one of 'step', 'graph'"),
    ("agreement_timeout", 0, "a number of seconds above 0"),
    ("agreement_timeout", True, "a number of seconds above 0"),
    ("agreement_timeout", "60", "a number of seconds above 0"),
    ("agreement_timeout", float("nan"), "a number of seconds above 0"),
    ("agreement_timeout", float("inf"), "a number of seconds above 0"),
    ("mode", 3, "a string or None"),
    ("group", 2, "ProcessGroup"),
    ("group", [0, 1], "DeviceMesh"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda v: str(v))
def test_a_value_that_is_not_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        CPConfig.from_options({name: value})
    error = caught.value
    assert error.code == "CP003"
    assert f"{name}={value!r}" in error.message
    assert error.hint.startswith(f"{name} is ")
    assert allowed in error.hint


def test_rank_and_size_have_to_fit() -> None:
    with pytest.raises(OptionError, match=r"rank=2 is not allowed\n.*below cp_size=2") as caught:
        CPConfig.from_options({"cp_size": 2, "rank": 2})
    assert caught.value.code == "CP003"


MISSPELT = {
    "cp-size": "cp_size",
    "cpsize": "cp_size",
    "on_refuse": "on_refusal",
    "min_token": "min_tokens",
    "stict": "strict",
    "checkinputs": "check_inputs",
    "Target": "target",
    "input": "inputs",
}


@pytest.mark.parametrize(("given", "meant"), MISSPELT.items())
def test_did_you_mean(given: str, meant: str) -> None:
    with pytest.raises(OptionError) as caught:
        CPConfig.from_options({given: 17})
    error = caught.value
    assert error.code == "CP001"
    assert f"unknown option {given!r} (given 17)" in error.message
    assert error.hint.startswith(f"did you mean {meant!r}? ")


@pytest.mark.parametrize("given", ["zzz", "", 3, None])
def test_an_option_like_no_other(given: Any) -> None:
    """No guess, but always the whole list."""
    with pytest.raises(OptionError) as caught:
        CPConfig.from_options({given: 1})
    assert "did you mean" not in caught.value.hint
    assert all(name in caught.value.hint for name in DEFAULTS)


def test_mode_of_torch_compile_is_recorded() -> None:
    assert CPConfig.from_options({}, mode="reduce-overhead").mode == "reduce-overhead"
    assert CPConfig.from_options({"mode": "default"}, mode="reduce-overhead").mode == "default"


def test_options_are_not_changed() -> None:
    given = {"cp_size": 2}
    CPConfig.from_options(given, mode="default")
    assert given == {"cp_size": 2}


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CPConfig().cp_size = 2  # type: ignore[misc]


SHARDED = {"inputs": "sharded", "sharded_inputs": {"position_ids": 0, "input_ids": 0}}


def test_sharded_inputs_are_taken() -> None:
    config = CPConfig.from_options(SHARDED | {"remainder": "first"})
    assert config.sharded_inputs == (("input_ids", 0), ("position_ids", 0))
    assert CPConfig.merged(config, {"strict": True}).sharded_inputs == config.sharded_inputs
    assert hash(config) == hash(CPConfig.from_options(SHARDED | {"remainder": "first"}))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"inputs": "sharded"}, "sharded_inputs={} is not allowed"),
        (SHARDED | {"sharded_inputs": ["input_ids"]}, "a mapping of names to dimensions"),
        (SHARDED | {"sharded_inputs": {"input_ids": "0"}}, "a mapping of names to dimensions"),
        (SHARDED | {"on_refusal": "fallback"}, "attend over local rows only"),
        (SHARDED | {"min_tokens": 128}, "attend over local rows only"),
        ({"check_inputs": True, "agreement": "graph"}, "'step' with check_inputs=True"),
        (SHARDED | {"check_inputs": True}, "ranks are handed different ids"),
        (SHARDED | {"remainder": "last"}, "one of None, 'first', 'balanced'"),
        ({"sharded_inputs": {"input_ids": 0}}, "for inputs='sharded' alone"),
        ({"remainder": "balanced"}, "for inputs='sharded' alone"),
    ],
)
def test_what_does_not_go_with_the_way_inputs_arrive(given: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError) as caught:
        CPConfig.from_options(given)
    assert caught.value.code == "CP003"
    assert why in str(caught.value)


def test_what_is_not_implemented_says_so() -> None:
    """Allowed names of things to come: Unsupported, not a misspelt option."""
    with pytest.raises(cppass.Unsupported, match="inputs='sharded' with target='host' is not implemented") as caught:
        CPConfig.from_options(SHARDED | {"target": "host"})
    assert caught.value.code == "CP002"


@pytest.mark.parametrize(("target", "inner"), [("host", "npugraph_ex"), ("host", "torchair"), ("npu", "inductor")])
def test_an_inner_compiler_belongs_to_a_target(target: str, inner: str) -> None:
    with pytest.raises(OptionError, match=f"(?s)inner='{inner}' is not allowed.*with target='{target}'"):
        CPConfig.from_options({"target": target, "inner": inner})


def test_run_pass_and_simulate_check_them_too() -> None:
    with pytest.raises(OptionError, match="CP001"):
        cppass.run_pass(None, (), cpsize=2)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="CP003"):
        cppass.simulate(lambda x: x, (), 0)


def test_misspelt_beside_a_config() -> None:
    with pytest.raises(OptionError, match=r"CP001.*\n.*did you mean 'cp_size'"):
        cppass.run_pass(None, (), CPConfig(cp_size=2), cpsize=4)  # type: ignore[arg-type]


def test_errors_survive_pickling() -> None:
    """They travel between processes."""
    with pytest.raises(OptionError) as caught:
        CPConfig.from_options({"cp_size": 0})
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is OptionError
    assert (copied.code, copied.message, copied.hint) == (caught.value.code, caught.value.message, caught.value.hint)
    assert str(copied) == str(caught.value)
