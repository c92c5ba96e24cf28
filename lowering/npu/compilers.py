"""What compiles a lowered NPU graph: nothing (eager), npugraph_ex (ACL graph) or torchair (GE). Seen in torch_npu 2.13.0.

Without an NPU both compilers run all their passes and then execute the graph on CPU tensors: npugraph_ex by its option
force_eager, torchair by debug.run_eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cppass.errors import CPError
from lowering.npu.hoist import computed_lengths, hoist_lengths


def compile_with(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
    """What runs the graph.

    Raises:
        CPError: CP502, the compiler cannot be imported.
    """
    on_host = not _has_device(gm)
    if inner == "eager":
        return gm.forward
    if inner == "torchair":
        return _torchair(gm, example_inputs, on_host)
    return _npugraph_ex(gm, example_inputs, on_host)


def _has_device(gm: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return any(isinstance(v, torch.Tensor) and v.device.type == "npu" for v in values)


def _npugraph_ex(gm: fx.GraphModule, example_inputs: Sequence[Any], on_host: bool) -> Callable[..., Any]:
    try:
        import torchair  # noqa: F401  (in torch_npu 2.13.0 npugraph_ex cannot be imported before it)
        import npugraph_ex
    except ImportError as error:
        raise _missing("npugraph_ex", error) from error
    options = {"force_eager": True} if on_host else {}
    if not computed_lengths(gm):
        return npugraph_ex.compile_fx(gm, list(example_inputs), options)  # type: ignore[no-any-return]
    inputs, host = hoist_lengths(gm, example_inputs)
    compiled = npugraph_ex.compile_fx(gm, inputs, options)

    def run(*args: Any) -> Any:
        return compiled(*args, *host(*args))

    return run


def _torchair(gm: fx.GraphModule, example_inputs: Sequence[Any], on_host: bool) -> Callable[..., Any]:
    try:
        import torchair
    except ImportError as error:
        raise _missing("torchair", error) from error
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = on_host
    return torchair.get_compiler(config)(gm, list(example_inputs))  # type: ignore[no-any-return]


def _missing(name: str, error: ImportError) -> CPError:
    return CPError("CP502", f"{name} cannot be imported: {error}", 'pip install "cppass[npu-host]", or inner="eager"')
