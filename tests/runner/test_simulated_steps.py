"""Random steps through one attention layer, all ranks in this process: rows and caches of one device.

Sizes are known here; symbolic ones are those of test_sharded_ranks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner.batches import Batch, batch_of, fixed
from runner.sharded_snippets import BLOCK, NAMED, Layer, attend, layer_of, rows_of
from torch import Tensor

import cppass
from cppass.runner import Bucket, StepPlan

SPARE = 8  # pages that no sequence has: the op wants a page in the cache for each that padding sequences count


def layer_run(plan: StepPlan, packed: bool) -> Callable[..., Tensor]:
    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        layer = Layer(*tensors)
        out = attend(x, layer, plan, packed=packed, kv_lens=plan.cu_kv)
        return out.index_select(0, layer.last - 1)

    return run


@st.composite
def steps(draw: Callable[..., object]) -> tuple[Batch, list[StepPlan], bool]:
    """A batch, the plan of each rank, and whether attention takes packed keys."""
    cp_size = draw(st.sampled_from([2, 3, 4, 8]))
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 60)), max_size=4))
    lengths.insert(draw(st.integers(0, len(lengths))), draw(st.integers(2 * cp_size, 70)))
    packed, remainder = draw(st.booleans()), draw(st.sampled_from(["balanced", "first"]))
    prefixes = [0 if packed else draw(st.one_of(st.just(0), st.integers(1, 200))) for _ in lengths]
    batch = batch_of(lengths, prefixes, BLOCK, draw(st.integers(0, 9)))
    batch = dataclasses.replace(batch, pages=batch.pages + SPARE)
    bucket = None
    if draw(st.booleans()):
        rows = batch.plan(cp_size, remainder=remainder).rows
        bucket = Bucket(rows + rows % 2 + 2 * draw(st.integers(0, 8)), len(lengths) + draw(st.integers(0, 2)))
    return batch, [batch.plan(cp_size, r, remainder=remainder, bucket=bucket) for r in range(cp_size)], packed


@settings(fixed, max_examples=25)
@given(step=steps(), lower=st.booleans(), calls=st.sampled_from([1, 2]))
def test_ranks_compute_what_one_device_does(step: tuple[Batch, list[StepPlan], bool], lower: bool, calls: int) -> None:
    batch, plans, packed = step
    one, cp_size, remainder = layer_of(batch, None), len(plans), plans[0].layout.remainder
    expected = layer_run(batch.plan(1), packed)(rows_of(batch), *one.tensors)
    inputs = [(plan.shard(rows_of(batch)), *layer_of(batch, plan).tensors) for plan in plans]
    calls = 2 if packed else calls  # one call takes a paged cache
    config = cppass.CPConfig(
        inputs="sharded", sharded_inputs=NAMED, cp_size=cp_size, remainder=remainder, attention_calls=calls
    )
    real = [page for page in range(batch.pages) if page != batch.pad_slot // BLOCK]
    run = layer_run(plans[0], packed)
    for seen, own in cppass.simulate(run, inputs[0], cp_size, config, rank_inputs=inputs, lower=lower):
        torch.testing.assert_close(seen[: len(batch.lengths)], expected, rtol=1e-5, atol=1e-5)
        for cache, meant in zip(own[4:6], (one.kc, one.vc), strict=True):
            torch.testing.assert_close(cache[real], meant[real], rtol=1e-5, atol=1e-5)
