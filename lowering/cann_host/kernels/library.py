"""How a CPU kernel gets onto a real torch_npu op: schema and meta function stay torch_npu's own.

before:  torch.ops.npu.npu_rms_norm(x, gamma)   # NotImplementedError: no kernel for the 'CPU' backend
after:   @kernel("npu_rms_norm")
         def _rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import torch

from cppass.errors import CPError

_P = ParamSpec("_P")
_R = TypeVar("_R")

# A registration lives as long as its Library object.
_libraries: dict[str, torch.library.Library] = {}


def kernel(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: the function becomes the CPU kernel of a torch_npu op; it is returned unchanged.

    Args:
        name: "npu_rms_norm", "npu_fused_infer_attention_score.out"; of another namespace "atb::_npu_reshape_and_cache".

    Raises:
        CPError: CP504, this torch_npu has no such op.
    """
    namespace, op, overload = _split(name)
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if packet is None or (overload or "default") not in packet.overloads():
        raise CPError(
            "CP504",
            f"torch_npu has no op {namespace}::{op}{overload and '.' + overload} to put a CPU kernel on",
            "import torch_npu first; the kernels are written for torch_npu 2.13.0",
        )

    def register(function: Callable[_P, _R]) -> Callable[_P, _R]:
        if namespace not in _libraries:
            _libraries[namespace] = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]
        target = f"{op}.{overload}" if overload else op
        _libraries[namespace].impl(target, function, "CPU")  # type: ignore[no-untyped-call]
        return function

    return register


def reject(op: str, why: str) -> NoReturn:
    """For inputs that the real op's documentation forbids: an NPU would fail or compute something else.

    Raises:
        RuntimeError: always; what a torch_npu op raises for invalid inputs.
    """
    raise RuntimeError(f"{op}: {why} (refused by the host kernel because the documentation of the NPU op forbids it)")


def _split(name: str) -> tuple[str, str, str]:
    namespace, _, rest = name.rpartition("::")
    op, _, overload = rest.partition(".")
    return namespace or "npu", op, overload
