"""Environment of every test: no device backend is loaded by `import torch`, and torch_npu can be imported."""

import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cppass  # noqa: F401  (before torch_npu: it brings the libraries that torch_npu misses without CANN)
