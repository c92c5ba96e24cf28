"""What a run needs of a model, in whatever dialect it is written: facts, and sessions of a prefill and decode steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from cppass.demo.job import Job
from cppass.demo.results import ModelFacts

Forward = Callable[..., Any]
"""The model, compiled or not."""


class Session(Protocol):
    """One prefill and its decode steps, on caches that were empty."""

    def step(self, forward: Forward, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocab] after `ids` [batch, new tokens], which follow the tokens of earlier steps."""
        ...

    def keys_and_values(self) -> list[torch.Tensor]:
        """K and V of every layer, in layer order; [] without a cache."""
        ...


class Subject(Protocol):
    """A model with its weights."""

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def facts(self) -> ModelFacts: ...

    def begin(self) -> Session:
        """A session; the one before it is over."""
        ...


def build(job: Job) -> Subject:
    """The model of the job in eval mode, the same weights in every process.

    Raises:
        CPError: CP051, no such checkpoint; CP055, torch_npu cannot be imported.
    """
    if job.dialect == "npu":
        from cppass.demo.npu.subject import NpuModel

        return NpuModel(job)
    from cppass.demo.model import HuggingFace

    return HuggingFace(job)


def prompt(job: Job, vocab: int) -> torch.Tensor:
    """Random token ids [batch, tokens], the same in every process."""
    return torch.randint(0, vocab, (job.batch, job.tokens), generator=torch.Generator().manual_seed(job.seed))
