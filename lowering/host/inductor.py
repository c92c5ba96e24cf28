"""Inductor as the inner compiler. Private parts of Inductor, seen in torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from cppass.errors import CPError


def compile_with_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The lowered graph, decomposed as Inductor likes it and compiled; takes a list of inputs (boxed).

    Decomposing happens here, after the pass: the pass reads attention as AOT leaves it.
    """
    try:
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
    except ImportError as error:
        raise CPError("CP502", f"Inductor cannot be imported: {error}", "use inner='eager'") from error

    def run(*args: Any) -> Any:
        return fx.Interpreter(gm).run(*args)

    with torch.no_grad():
        traced = make_fx(run, decomposition_table=select_decomp_table(), _allow_non_fake_inputs=True)(*example_inputs)
    return compile_fx_inner(traced, list(example_inputs))
