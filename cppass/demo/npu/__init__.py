"""Qwen3 as it is written for Ascend's graph mode: paged caches, fused ops, lengths as lists; random weights.

Importing this package imports no torch_npu; building a model does, by ``load_npu_ops``.
"""

from __future__ import annotations

import importlib

from cppass.errors import CPError

__all__ = ["load_npu_ops"]


def load_npu_ops() -> None:
    """Make ``torch.ops.npu`` usable, by importing torch_npu.

    Raises:
        CPError: CP055, torch_npu is not installed or cannot be imported.
    """
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        raise CPError(
            "CP055", f"this model needs torch_npu, which cannot be imported: {error}", 'pip install "cppass[npu-host]"'
        ) from error
