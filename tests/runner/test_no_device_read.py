"""Planning reads no value of a tensor on a device: a read would wait for all that the device still has to do.

The `meta` device stands for any other: its tensors have no values, so that every read raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runner.batches import Sharded, batch_of, for_all, ranks_of, sharded

from cppass.errors import StepError
from cppass.runner import Bucket, StepPlan

BATCH = batch_of([13, 50, 1], [0, 20, 30])


def on_meta(case: Sharded, **given: Any) -> StepPlan:
    slots, table = case.batch.slots.to("meta"), case.batch.table.to("meta")
    policy = case.plan.layout.remainder
    own = {"slot_mapping": slots, "block_table": table, "remainder": policy, "bucket": case.plan.bucket}
    return case.batch.plan(case.plan.cp_size, **{**own, **given})


def test_reading_a_meta_tensor_raises() -> None:
    """Control: what the tests below rely on."""
    x = BATCH.slots.to("meta")
    for read in (x.tolist, x[0].item, lambda: int(x[0]), lambda: bool(x[0] < 0), x.nonzero, x.numpy, x.cpu):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read()


@for_all(case=sharded(max_cp=6))
def test_a_step_on_a_device_is_planned_as_on_the_host(case: Sharded) -> None:
    seen, meant = on_meta(case), case.plan
    for name in ("lengths", "prefixes", "layout", "cu_q", "kv_lens", "cu_kv", "positions", "rows", "last_rows"):
        assert getattr(seen, name) == getattr(meant, name)
    for name in ("slot_mapping", "block_table", "cu_q_tensor"):
        x, y = getattr(seen, name), getattr(meant, name)
        assert x.device.type == "meta"
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@for_all(case=sharded(max_cp=6))
def test_rows_on_a_device_are_cut_and_restored(case: Sharded) -> None:
    plan, x = on_meta(case), torch.empty(case.batch.tokens, 3, device="meta")
    parts = [own.shard(x) for own in ranks_of(plan)]
    assert {(part.device.type, tuple(part.shape)) for part in parts} == {("meta", (plan.rows, 3))}
    gathered = torch.cat(parts)
    assert plan.restore(gathered).shape == x.shape
    assert plan.restore_rows(gathered, [0, case.batch.tokens - 1]).shape == (2, 3)


def test_a_step_that_is_not_sharded_reads_nothing_either() -> None:
    batch = batch_of([3, 1])
    plan = batch.plan(2, slot_mapping=batch.slots.to("meta"), block_table=batch.table.to("meta"))
    assert not plan.sharded and plan.cu_q_tensor.device.type == "meta"


@pytest.mark.parametrize("where", ["slot_mapping", "block_table"])
def test_either_tensor_on_a_device_is_not_read(where: str) -> None:
    """Slots of the host with a block table on a device, or the other way round: neither is compared."""
    given = {"slot_mapping": BATCH.slots, "block_table": BATCH.table}
    given[where] = given[where].to("meta")
    assert BATCH.plan(2, bucket=Bucket(40, 4, 8), **given).sharded


def test_a_wrong_slot_is_found_on_the_host_alone() -> None:
    """Control: the host does read. On a device the slots are the runner's word."""
    wrong = BATCH.slots.flip(0)
    with pytest.raises(StepError, match="CP611"):
        BATCH.plan(2, slot_mapping=wrong)
    assert BATCH.plan(2, slot_mapping=wrong.to("meta"), block_table=BATCH.table.to("meta")).sharded


def test_what_needs_no_read_is_checked_on_a_device_too() -> None:
    slots, table = BATCH.slots.to("meta"), BATCH.table.to("meta")
    for code, given in (
        ("CP610", {"slot_mapping": slots[1:], "block_table": table}),
        ("CP612", {"slot_mapping": slots, "block_table": table[:, :4]}),
        ("CP613", {"slot_mapping": slots, "block_table": table, "bucket": Bucket(30, 3)}),
    ):
        with pytest.raises(StepError, match=code):
            BATCH.plan(2, **given)
