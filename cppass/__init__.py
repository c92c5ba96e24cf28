"""cppass: prefill context parallelism as a torch.compile pass."""

__version__ = "0.1.0"
