"""Inductor as the inner compiler. Private parts of Inductor, seen in torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
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
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table

        marked = config.patch(post_grad_custom_pre_pass=_marked(config.post_grad_custom_pre_pass))
    except (ImportError, AttributeError) as error:
        raise CPError("CP502", f"Inductor cannot be imported: {error}", "use inner='eager'") from error

    def run(*args: Any) -> Any:
        return fx.Interpreter(gm).run(*args)

    with torch.no_grad():
        traced = make_fx(run, decomposition_table=select_decomp_table(), _allow_non_fake_inputs=True)(*example_inputs)
    with marked:
        return compile_fx_inner(traced, list(example_inputs))


def _marked(others: Any) -> Any:
    """A pass that does what the one in its place did, and whose id has this lowering's source in it.

    Inductor's cache on disk knows ops by name: without this it would serve code for an older version of them.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Marked(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            if others is not None:
                others(graph)

        def uuid(self) -> Any:
            own = get_hash_for_files(tuple(str(p) for p in sorted(Path(__file__).parent.glob("*.py"))))
            theirs = getattr(others, "uuid", lambda: None)()
            return None if others is not None and theirs is None else (own, theirs)

    return Marked()
