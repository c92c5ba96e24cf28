"""The one place that reads the environment: what this machine has, before torch is imported.

With torch_npu installed and no CANN, a plain `import torch` fails, because torch loads every installed device backend.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
CANN_LIBRARY = "libascendcl.so"
CANN_FOLDER = Path("/usr/local/Ascend")
CANN_TOOLKITS = ("ascend-toolkit", "cann", "latest", "nnae", "nnrt")
NEEDS_CANN = ("torch_npu", "torchair", "npugraph_ex")


def cann_found() -> str:
    """Where CANN is: "variable=value", or a folder; "" where it is not."""
    for name in CANN_HOMES:
        if home := os.environ.get(name):
            return f"{name}={home}"
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        if folder and os.path.exists(os.path.join(folder, CANN_LIBRARY)):
            return folder
    return next((str(CANN_FOLDER / name) for name in CANN_TOOLKITS if (CANN_FOLDER / name).exists()), "")


def has_cann() -> bool:
    """Whether CANN is set up in this process, or installed in its usual folder."""
    return bool(cann_found())


def keep_torch_importable() -> None:
    """Where torch_npu is installed without CANN: turn off torch's loading of device backends, and let torch_npu load.

    `import torch_npu`, whenever it comes, then finds stubs of CANN's libraries (lowering.cann_host). A machine with
    CANN is left alone.
    """
    if has_cann() or importlib.util.find_spec("torch_npu") is None:
        return
    os.environ.setdefault(AUTOLOAD, "0")
    if not any(isinstance(finder, _WithoutCann) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutCann())


class _WithoutCann:
    """Finds what the other finders find, and has lowering.cann_host around its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in NEEDS_CANN or (name.startswith("torch_npu.")):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                host: Any = importlib.import_module("lowering.cann_host")
                with host.importing(name):
                    execute(module)

            with contextlib.suppress(AttributeError):  # loaders of built-in kinds; none of these packages has one
                loader.exec_module = exec_module
        return spec


def autoload_of_shell() -> str | None:
    """The variable as this process was started with it, before `import cppass` set it; None without one."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get(AUTOLOAD)
    return next((e.partition(b"=")[2].decode() for e in entries if e.startswith(AUTOLOAD.encode() + b"=")), None)


def launched_ranks() -> int:
    """Ranks that a launcher such as torchrun has started; 1 without one."""
    said = os.environ.get("WORLD_SIZE", "")
    return int(said) if said.isdecimal() else 1


def why_not_writable(folder: Path) -> str:
    """Why no file can be made in this folder, "" where one can."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
