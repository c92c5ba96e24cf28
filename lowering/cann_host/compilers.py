"""What torch_npu, torchair and npugraph_ex must not ask of CANN where there is none.

Every private name is in this module; all were seen in torch_npu 2.13.0, which contains torchair and npugraph_ex.

    torch_npu    npu._lazy_init             looks for a device: a clear error instead of a loader's
                 npu.utils._is_gte_cann_version   asked by passes: answered as the newest CANN would
    torchair     core._backend: initialize_graph_engine, finalize_graph_engine   start and stop GE: nothing
                 core._backend.TorchNpuGraph.load, compile, run                  run on GE: a clear error, not a crash
                 _ge_concrete_graph.compat_ir.is_cann_compat                     "does CANN know this op": yes
    npugraph_ex  _acl_concrete_graph.replace_stream_event.replace_stream_event_pass   reads the stream: a stand-in
                 npu_fx_compiler._compile_py_code                                makes a stream: None
    both         _acl_concrete_graph.acl_graph.AclGraph.__init__ reads the current device: 0; compile captures: an error
                 _utils.error_code.pretty_error_msg                              rebuilds errors: left as they are
                 _utils.check_platform.is_arch35                                 asks for the chip: no (Ascend 910B)
"""

from __future__ import annotations

import atexit
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from cppass.errors import CPError

NO_NPU = CPError(
    "CP602",
    "this needs an NPU and CANN, and neither is here",
    'run it where they are; here: npugraph_ex with options={"force_eager": True}, torchair with '
    "config.debug.run_eagerly = True, which execute the compiled graph on CPU tensors",
)


def patch_torch_npu(torch_npu: Any) -> None:
    """After `import torch_npu`."""
    _replace(torch_npu.npu, "_lazy_init", _no_npu)
    _replace(torch_npu.npu.utils, "_is_gte_cann_version", _newest_cann)


def _patch_graph_engine(backend: Any) -> None:
    """torchair.core._backend. Its signal handlers look the finalizer up by name, atexit holds the function itself."""
    _replace(backend, "initialize_graph_engine", _nothing)
    atexit.unregister(_replace(backend, "finalize_graph_engine", _nothing))
    graph = _found(backend, "TorchNpuGraph")
    for method in ("load", "compile", "run"):
        _replace(graph, method, _no_npu)


def _patch_compat(compat_ir: Any) -> None:
    """torchair._ge_concrete_graph.compat_ir. An empty text means: compatible."""
    _replace(compat_ir, "is_cann_compat", lambda *args, **kwargs: "")


def _patch_stream_pass(module: Any) -> None:
    """npugraph_ex._acl_concrete_graph.replace_stream_event: the pass compares stream ids; the default stream's is 0."""
    stream = types.SimpleNamespace(stream_id=0)
    _replace(module, "replace_stream_event_pass", _with(module, "replace_stream_event_pass", current_stream=stream))


def _patch_capture(module: Any) -> None:
    """npugraph_ex._acl_concrete_graph.acl_graph and torchair's: a graph notes its device; capture needs a real one."""
    graph = _found(module, "AclGraph")
    _replace(graph, "__init__", _with(graph, "__init__", current_device=0))
    _replace(graph, "compile", _no_npu)


def _patch_generated_code(module: Any) -> None:
    """npugraph_ex.npu_fx_compiler: the code it generates makes a stream for the capture when it is loaded."""
    _replace(module, "_compile_py_code", _with(module, "_compile_py_code", Stream=None))


def _with(owner: Any, name: str, **answers: Any) -> Callable[..., Any]:
    """The function `owner.name`, while which runs torch_npu.npu's functions of these names answer so."""
    original: Callable[..., Any] = _found(owner, name)

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        npu: Any = sys.modules["torch_npu"].npu
        asked = {
            question: _replace(npu, question, lambda *_, a=answer, **__: a) for question, answer in answers.items()
        }
        try:
            return original(*args, **kwargs)
        finally:
            for question, function in asked.items():
                setattr(npu, question, function)

    return run


def _patch_error_messages(module: Any) -> None:
    """torchair._utils.error_code and npugraph_ex's: they build a new error of one text, which a CPError cannot be."""
    _replace(module, "pretty_error_msg", lambda function: function)


def _patch_platform(module: Any) -> None:
    """_utils.check_platform: conversions ask for the chip; they are made as for Ascend 910B."""
    _replace(module, "is_arch35", lambda: False)


PATCHES: dict[str, Callable[[Any], None]] = {  # each as soon as its module is executed, before others import from it
    "torchair._utils.check_platform": _patch_platform,
    "npugraph_ex._utils.check_platform": _patch_platform,
    "torchair._utils.error_code": _patch_error_messages,
    "torchair.core._backend": _patch_graph_engine,
    "torchair._ge_concrete_graph.compat_ir": _patch_compat,
    "torchair._acl_concrete_graph.acl_graph": _patch_capture,
    "npugraph_ex._utils.error_code": _patch_error_messages,
    "npugraph_ex._acl_concrete_graph.replace_stream_event": _patch_stream_pass,
    "npugraph_ex._acl_concrete_graph.acl_graph": _patch_capture,
    "npugraph_ex.npu_fx_compiler": _patch_generated_code,
}


def _replace(owner: Any, name: str, by: Any) -> Any:
    """Set an attribute that must be there already; what it was."""
    original = _found(owner, name)
    setattr(owner, name, by)
    return original


def _found(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise CPError(
            "CP504",
            f"{owner.__name__} has no {name}: this is a version of torch_npu that cppass does not know without CANN",
            "install torch_npu 2.13.0, or use the host target, which needs no torch_npu",
        )
    return getattr(owner, name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Instead of starting and stopping the graph engine."""


def _newest_cann(version: str, module: str = "CANN") -> bool:
    """Passes then rewrite as they do on a machine with a CANN that has all they use."""
    return True


def _no_npu(*args: Any, **kwargs: Any) -> NoReturn:
    raise CPError(NO_NPU.code, NO_NPU.message, NO_NPU.hint)
