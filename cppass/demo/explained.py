"""What `cppass explain` explains: the model of a job, or one that a function of the user's returns."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cppass.api import explain_call
from cppass.demo.job import Job, count
from cppass.demo.subject import build, prompt
from cppass.errors import CPError, OptionError
from cppass.inspection import Explanation

Options = Mapping[str, Any]


def explain_job(job: Job, options: Options, hardware: str | None) -> Explanation:
    """The prefill of a job, on one process.

    Raises:
        CPError: CP051, CP055 as `build` does; CP057, the model failed.
    """
    subject = build(job)
    found: list[Explanation] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        explanation, result = _explained(subject.module, args, kwargs, job.ranks, job.dynamic, options, hardware)
        found.append(explanation)
        return result

    subject.begin().step(forward, prompt(job, subject.facts.vocab))
    facts = subject.facts
    layers = "" if "layer" in facts.note else f", {count(facts.layers, 'layer')}"
    title = facts.family + layers + (f" ({facts.note})" if facts.note else "")
    return dataclasses.replace(found[0], title=title)


def explain_script(
    script: str, cp_size: int, dynamic: bool | None, options: Options, hardware: str | None
) -> Explanation:
    """The model that `FILE.py:function` returns: a module or function, its arguments, and keyword arguments if any.

    Raises:
        OptionError: CP050, there is no such file or function.
        CPError: CP056, the function failed or returned something else; CP057, the model failed.
    """
    model, args, kwargs = _call(_function(script), script)
    return _explained(model, args, kwargs, cp_size, dynamic, options, hardware)[0]


def _explained(
    model: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    cp_size: int,
    dynamic: bool | None,
    options: Options,
    hardware: str | None,
) -> tuple[Explanation, Any]:
    try:
        return explain_call(model, args, kwargs, cp_size, dynamic, options, hardware)
    except CPError:
        raise
    except Exception as error:
        raise CPError(
            "CP057",
            f"the model failed before the pass saw it: {type(error).__name__}: {error}",
            "call it once without cppass on the same inputs; if that works, try torch.compile(backend='aot_eager')",
        ) from error


def _function(script: str) -> Callable[[], Any]:
    name, _, function = script.rpartition(":")
    path = Path(name)
    if not name or not function.isidentifier():
        raise OptionError("CP050", f"--script {script!r} is not allowed", "give FILE.py:function")
    if not path.is_file():
        raise OptionError("CP050", f"--script: there is no file {name!r}", "give FILE.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise OptionError("CP050", f"--script: {name!r} is no Python file", "give FILE.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` does
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CPError("CP056", f"{name} failed: {type(error).__name__}: {error}", "run it with python first") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise OptionError("CP050", f"--script: {name} has no function {function!r}", "give FILE.py:function")
    return found  # type: ignore[no-any-return]


def _call(function: Callable[[], Any], script: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    way_out = "return (model, args) or (model, args, kwargs): a module or function, a tuple and a dict"
    try:
        found = function()
    except Exception as error:
        raise CPError("CP056", f"{script} failed: {type(error).__name__}: {error}", way_out) from error
    given = (*found, {}) if isinstance(found, tuple) and len(found) == 2 else found
    if not (isinstance(given, tuple) and len(given) == 3 and callable(given[0])):
        raise CPError("CP056", f"{script} returned {type(found).__name__} instead of a model and its inputs", way_out)
    model, args, kwargs = given
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise CPError("CP056", f"{script} returned arguments that are no tuple and no dict", way_out)
    return model, tuple(args), kwargs
