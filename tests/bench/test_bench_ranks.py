"""The sections on real ranks, at tiny sizes, and what is said when a rank fails."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench.failing_rank import failing
from torch.profiler import ProfilerActivity, profile

from cppass.bench import activations, gathers, variants
from cppass.bench.spawn import on_ranks, slowest
from cppass.demo.display import Silent
from cppass.demo.failure import RankError

pytestmark = pytest.mark.timeout(120)


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(RankError, match=r"\[CP650\] rank 1 raised ValueError: no such thing"):
        on_ranks(failing, 2)


def test_the_slowest_rank_counts_in_every_turn() -> None:
    assert slowest([{"a": [1.0, 5.0]}, {"a": [2.0, 3.0]}], "a") == (2.0, 5.0)


def test_gather_measures_both_choices() -> None:
    """The ranks themselves check that both orders of writing leave the same cache."""
    found = gathers.measure_lengths((64,), 2, Silent())
    assert [(c.what, len(c.chosen), len(c.other)) for c in found.choices] == [
        ("one all-gather, not two", 2, 2),
        ("write in gathered order", 2, 2),
    ]
    assert len(found.table().rows) == 2


def test_peaks_are_those_of_live_tensors() -> None:
    """1 MB, 2 MB beside it, then 1 MB after both are gone: 3 MB at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        a = torch.empty(2**20, dtype=torch.uint8)
        b = torch.empty(2**21, dtype=torch.uint8)
        del a, b
        c = torch.empty(2**20, dtype=torch.uint8)
    del c
    assert activations.peak_of(seen) == 3 * 2**20


def test_a_rank_needs_less_memory_than_one_device() -> None:
    job = dataclasses.replace(activations.JOB, preset="qwen3-tiny", layers=1, tokens=128, repeat=3)
    found = activations.measure_job(job, Silent())
    assert found.gathered == 2 * 128 * 2 * 16 * 4
    one = min(*found.eager, *found.aot)
    for own, with_gloo in zip(found.ranks, found.with_gloo, strict=True):
        assert one / 2 - found.gathered < min(own) <= max(own) < one
        assert len(own) == 3 and all(a <= b for a, b in zip(own, with_gloo, strict=True))
    assert found.table().rows[0][3] == f"{0.5 + found.gathered / found.eager[0]:.3f}"


def test_options_are_compared_on_the_same_prefill() -> None:
    """Overlap changes no bit; the ranks check that both graphs were rewritten."""
    found = variants.measure_variants(variants.VARIANTS[:1], 32, 2, Silent(), preset="qwen3-tiny")
    (overlap,) = found.comparisons
    assert (len(overlap.chosen), len(overlap.other), overlap.difference) == (2, 2, 0.0)
    assert found.table().rows[0][:2] == ("overlap", "32")
