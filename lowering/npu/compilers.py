"""What compiles a lowered NPU graph: nothing (eager), npugraph_ex (ACL graph) or torchair (GE); of torch_npu 2.13.0.

Without an NPU both compilers run all their passes and then execute the graph on CPU tensors: npugraph_ex by its option
force_eager, torchair by debug.run_eagerly.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cppass.errors import CPError
from lowering.npu.hoist import Host, computed_lengths, hoist
from lowering.npu.tables import tables


def compile_with(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
    """What runs the graph.

    Raises:
        CPError: CP502, the compiler cannot be imported.
    """
    if inner == "eager":
        return gm.forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both use what torch 2.13 calls deprecated; nothing a user could change
        how = _torchair if inner == "torchair" else _npugraph_ex
        return how(gm, example_inputs, on_host=not _has_device(gm))


def _has_device(gm: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return any(isinstance(v, torch.Tensor) and v.device.type == "npu" for v in values)


def _npugraph_ex(gm: fx.GraphModule, example_inputs: Sequence[Any], on_host: bool) -> Callable[..., Any]:
    _, _, npugraph_ex = _imported("torch_npu", "torchair", "npugraph_ex")
    register_writes()
    options = {"force_eager": True} if on_host else {}
    given, host = _hoisted(gm, example_inputs, [*computed_lengths(gm), *tables(gm)])
    return _after(host, npugraph_ex.compile_fx(gm, given, options))


def _hoisted(
    gm: fx.GraphModule, example_inputs: Sequence[Any], computed: list[fx.Node]
) -> tuple[list[Any], Host | None]:
    """Example inputs, and what computes the ones that were added; None where none were."""
    return hoist(gm, example_inputs, computed) if computed else (list(example_inputs), None)


def _after(host: Host | None, compiled: Callable[..., Any]) -> Callable[..., Any]:
    if host is None:
        return compiled

    def run(*args: Any) -> Any:
        return compiled(*args, *host(*args))

    return run


def _torchair(gm: fx.GraphModule, example_inputs: Sequence[Any], on_host: bool) -> Callable[..., Any]:
    _, torchair = _imported("torch_npu", "torchair")
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = on_host
    given, host = _hoisted(gm, example_inputs, tables(gm))
    return _after(host, torchair.get_compiler(config)(gm, given))


def register_writes() -> None:
    """Let npugraph_ex turn the functional npu_scatter_pa_kv_cache back into the one that writes the cache in place.

    It knows npu_scatter_nd_update and others by itself; without this a step would copy whole caches. Private.
    """
    module = _imported("torch_npu", "torchair", "npugraph_ex._acl_concrete_graph.graph_pass")[-1]
    register = getattr(module, "register_inplaceable_npu_op", None)
    if register is None:
        raise CPError(
            "CP504",
            "npugraph_ex has no register_inplaceable_npu_op: this is a version that cppass does not know",
            "install torch_npu 2.13.0, or write the cache with npu_scatter_nd_update_",
        )
    register("npu_scatter_pa_kv_cache_functional", "npu_scatter_pa_kv_cache", mutated_arg=[2, 3])


def _imported(*names: str) -> list[Any]:
    """Modules, in this order: torch_npu makes the others importable, and torchair has to precede npugraph_ex."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by torchair 2.13.0
            return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise CPError(
            "CP502", f"{names[-1]} cannot be imported: {error}", 'pip install "cppass[npu-host]", or inner="eager"'
        ) from error
