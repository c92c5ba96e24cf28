"""The real torch_npu, torchair and npugraph_ex on a machine without CANN. cppass.environment calls these on import.

No device is pretended: `torch.npu.is_available()` is False. Op schemas, shape functions, graph passes and conversions
are the real ones; ops run on CPU tensors with the kernels of lowering.cann_host.kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from types import ModuleType

from lowering.cann_host.compilers import PATCHES, patch_torch_npu
from lowering.cann_host.libraries import load_stubs

HARMLESS = "Warning: ASCEND_HOME_PATH environment variable is not set."  # printed by torch_npu 2.13.0


@contextlib.contextmanager
def importing(name: str) -> Iterator[None]:
    """Around the execution of one module of torch_npu, torchair or npugraph_ex; `name` as it is imported.

    Raises:
        CPError: CP504, the stubs cannot be loaded, or a private part is missing from this version.
    """
    if name == "torch_npu":
        load_stubs()
        with _without_harmless_lines():
            yield
        complete()
    else:
        yield
        if patch := PATCHES.get(name):
            patch(sys.modules[name])


def complete() -> ModuleType:
    """After torch_npu's import: clear errors where a device is needed, and the CPU kernels, which it returns."""
    patch_torch_npu(sys.modules["torch_npu"])
    return importlib.import_module("lowering.cann_host.kernels")


@contextlib.contextmanager
def _without_harmless_lines() -> Iterator[None]:
    """Standard output of Python, less the line that says CANN is not here."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write("".join(line for line in printed.getvalue().splitlines(True) if line.strip() != HARMLESS))
