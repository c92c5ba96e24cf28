"""Does a site form read its op rightly? A call is rewritten for P ranks, run on all, and compared with one device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cppass.api import run_pass
from cppass.config import CPConfig
from cppass.errors import ExtensionError, refused_error
from cppass.report import REWRITTEN, Report
from cppass.simulator import simulate, traced


@dataclasses.dataclass(frozen=True)
class FormCheck:
    """What was tried: the report of the last graph, and the largest difference from one device."""

    report: Report
    error: float

    def __str__(self) -> str:
        return f"equal to one device (largest difference {self.error:.2g})\n{self.report}"


def check_site_form(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    cp_sizes: Sequence[int] = (2, 3),
    tolerance: float = 1e-5,
) -> FormCheck:
    """Try a site form on a function that calls its op (or on the op itself, called with positional arguments).

    Args:
        function: from tensors to tensors; it may compute queries, keys and values, and write a cache in place.
        args: its arguments. Floating-point tensors are drawn anew. Tokens: 2 * cp_size or more.
        cp_sizes: numbers of ranks to try.
        tolerance: of the largest value, at least of 1; for results and for written arguments.

    Raises:
        ExtensionError: CP205, a rank has other results than one device; CP206, nothing was rewritten.
        RefusedError: the graph was refused, by the site form or by another check.
    """
    given = [_drawn(x, i) for i, x in enumerate(args)]
    whole = [x.clone() if isinstance(x, Tensor) else x for x in given]
    with torch.no_grad():
        expected = (function(*whole), whole)
    worst, report = 0.0, None
    for cp_size in cp_sizes:
        report = _rewritten(function, given, cp_size)
        for rank, seen in enumerate(simulate(function, given, cp_size)):
            error = _difference(seen, expected)
            worst = max(worst, error)
            if not error <= tolerance:
                raise ExtensionError(
                    "CP205",
                    f"{_forms(report)}: rank {rank} of {cp_size} differs from one device by {error:.2g} of the largest "
                    f"value (allowed {tolerance:.2g})",
                    "does the site form say what the call masks, its scale, its layout, and where its keys come from?",
                )
    if report is None:
        raise ExtensionError("CP206", "no number of ranks was given", "leave cp_sizes out")
    return FormCheck(report, worst)


def _rewritten(function: Callable[..., Any], given: Sequence[Any], cp_size: int) -> Report:
    report = run_pass(traced(function, given), given, CPConfig(cp_size=cp_size, on_refusal="fallback"), lower=False)
    if report.refusals:
        raise refused_error(report.refusals)
    if report.status != REWRITTEN:
        hint = "call the op in the function, with as many tokens as 2 * cp_size"
        raise ExtensionError("CP206", f"nothing was rewritten for {cp_size} ranks: {report.reason}", hint)
    return report


def _forms(report: Report) -> str:
    return ", ".join(dict.fromkeys(site.form for site in report.sites))


def _drawn(x: Any, seed: int) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def _difference(seen: Any, expected: Any) -> float:
    """The largest, of the largest value, at least of 1; infinity where shapes or numbers of results differ."""
    ours, theirs = ([x for x in pytree.tree_leaves(side) if isinstance(x, Tensor)] for side in (seen, expected))
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    errors = [float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs]
    return max((float("inf") if math.isnan(e) else e for e in errors), default=float("inf"))
