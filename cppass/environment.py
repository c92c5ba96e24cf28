"""The one place that reads the environment: what this machine has, before torch is imported.

With torch_npu installed and no CANN, a plain `import torch` fails, because torch loads every installed device backend.
"""

from __future__ import annotations

import importlib.util
import os

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")


def has_cann() -> bool:
    """Whether CANN's environment is set up in this process."""
    return any(os.environ.get(name) for name in CANN_HOMES)


def keep_torch_importable() -> None:
    """Turn off torch's loading of device backends where torch_npu is installed and CANN is not."""
    if AUTOLOAD not in os.environ and not has_cann() and importlib.util.find_spec("torch_npu") is not None:
        os.environ[AUTOLOAD] = "0"


def launched_ranks() -> int:
    """Ranks that a launcher such as torchrun has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
