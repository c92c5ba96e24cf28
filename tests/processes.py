"""How tests start ranks: forked from a process that has imported what they need, and has computed nothing.

A spawned process imports torch and transformers anew, five seconds of CPU; a suite starts more than a hundred.
"""

from __future__ import annotations

import multiprocessing.context

import torch.multiprocessing as mp

IMPORTED = ["cppass", "torch", "torch._dynamo", "torch.distributed", "transformers.models.qwen3_moe", "qwen"]


def rank_context() -> multiprocessing.context.ForkServerContext:
    """The multiprocessing context of ranks."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
