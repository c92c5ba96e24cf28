"""CPU kernels of torch_npu ops, registered on import. Needs an importable torch_npu."""

from lowering.cann_host.kernels import attention, cache, moe, norms, rope  # noqa: F401
