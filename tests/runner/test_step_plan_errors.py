"""What a runner may get wrong in a step: each is a StepError with its code, and says what was seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from runner.batches import batch_of

from cppass.errors import CPError, StepError
from cppass.runner import Bucket, StepPlan

BATCH = batch_of([13, 50, 1], [0, 20, 30], block_size=16)  # 1, 5 and 2 pages; 64 tokens
SLOTS, TABLE = BATCH.slots, BATCH.table


def error(code: str, *said: str, **given: Any) -> StepError:
    """The error of planning BATCH with some arguments changed."""
    batch = dataclasses.replace(BATCH, **{k: given.pop(k) for k in ("lengths", "prefixes") if k in given})
    with pytest.raises(StepError) as caught:
        batch.plan(**{"cp_size": 2, "rank": 0, **given})
    check(caught.value, code, *said)
    return caught.value


def check(seen: StepError, code: str, *said: str) -> None:
    assert seen.code == code
    assert isinstance(seen, CPError) and isinstance(seen, ValueError)
    assert f"[{code}] " in str(seen) and "way out: " in str(seen) and seen.hint
    for text in said:
        assert text in seen.message, seen.message


def changed(x: torch.Tensor, at: Any, value: int) -> torch.Tensor:
    y = x.clone()
    y[at] = value
    return y


def test_the_batch_of_these_tests_is_all_right() -> None:
    """Control. A half of padding counts as two pages more."""
    assert BATCH.plan(2, slots=(BATCH.pages + 1) * 16, pad_slot=BATCH.pad_slot, bucket=Bucket(32, 3, 5)).sharded


# -- CP610: lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lengths": (13, 50, 2)}, ["[13, 50, 2]", "add up to 65", "[64]"]),
        ({"lengths": (13, 50)}, ["lengths [13, 50]", "prefixes [0, 20, 30]"]),
        ({"lengths": (13, 51, 0)}, ["[13, 51, 0]", "no new token"]),
        ({"lengths": (13, 52, -1)}, ["[13, 52, -1]"]),
        ({"lengths": (13, 50, 1.0)}, ["[13, 50, 1.0]"]),
        ({"lengths": (), "prefixes": ()}, ["lengths []"]),
        ({"prefixes": (0, 20)}, ["prefixes [0, 20]"]),
        ({"prefixes": (0, -1, 30)}, ["prefixes [0, -1, 30]"]),
        ({"prefixes": (0, "20", 30)}, ["prefixes [0, '20', 30]"]),
        ({"slot_mapping": SLOTS[:-1]}, ["add up to 64", "[63]"]),
        ({"slot_mapping": SLOTS.view(-1, 1)}, ["[64, 1]"]),
    ],
    ids=lambda x: (
        " ".join(f"{k}={v if k != 'slot_mapping' else list(v.shape)}" for k, v in x.items())
        if isinstance(x, dict)
        else ""
    ),
)
def test_lengths_that_do_not_add_up(given: dict[str, Any], said: list[str]) -> None:
    error("CP610", *said, **given)


# -- CP611: slots ------------------------------------------------------------------------------------------------------


def test_a_slot_below_0() -> None:
    error("CP611", "slots from -1 to", slot_mapping=changed(SLOTS, 5, -1))


def test_a_slot_beyond_the_cache() -> None:
    error("CP611", f"to {int(SLOTS.max())}", "the cache has 16", slots=16)


def test_the_last_slot_of_the_cache_is_not_beyond_it() -> None:
    """Control."""
    assert BATCH.plan(2, slots=int(SLOTS.max()) + 1).sharded


def test_a_slot_given_twice() -> None:
    twice = int(SLOTS[3])
    error("CP611", f"slot {twice} is given to two tokens", slot_mapping=changed(SLOTS, 7, twice))


def test_a_slot_where_the_block_table_does_not_look() -> None:
    meant = int(SLOTS[13])
    seen = error(
        "CP611", "position 20 of sequence 1", f"to slot {BATCH.pad_slot}", f"in slot {meant}",
        slot_mapping=changed(SLOTS, 13, BATCH.pad_slot),
    )  # fmt: skip
    assert "block_table[sequence, position // block_size]" in seen.hint


def test_slots_in_another_order() -> None:
    error("CP611", "position 0 of sequence 0", slot_mapping=SLOTS.flip(0))


def test_a_block_table_of_another_step() -> None:
    error("CP611", "position 0 of sequence 0", block_table=TABLE.flip(0))


def test_prefixes_of_another_step() -> None:
    error("CP611", "position 19 of sequence 1", prefixes=(0, 19, 30))


def test_slots_that_are_no_ints() -> None:
    error("CP611", "torch.float32", slot_mapping=SLOTS.float())


def test_a_pad_slot_that_a_token_has() -> None:
    error("CP611", f"pad slot {int(SLOTS[4])} is in page", "which belongs to a sequence", pad_slot=int(SLOTS[4]))


def test_a_pad_slot_in_a_page_of_the_prefix() -> None:
    """Padding rows would overwrite a token that is in the cache: position 0 of sequence 1."""
    cached = int(TABLE[1, 0]) * 16
    error("CP611", f"pad slot {cached}", pad_slot=cached)


@pytest.mark.parametrize("pad_slot", [-2, BATCH.pages * 16])
def test_a_pad_slot_outside_the_cache(pad_slot: int) -> None:
    error("CP611", f"pad slot {pad_slot}", pad_slot=pad_slot, slots=BATCH.pages * 16)


# -- CP612: block table ------------------------------------------------------------------------------------------------


def test_a_block_table_too_short() -> None:
    error("CP612", "sequence 1 has 70 tokens", "4 blocks of 16 hold 64", block_table=TABLE[:, :4])


@pytest.mark.parametrize("table", [TABLE[:2], torch.cat([TABLE, TABLE]), TABLE.flatten()], ids=["few", "many", "flat"])
def test_a_block_table_with_other_rows(table: torch.Tensor) -> None:
    error("CP612", str(list(table.shape)), "for 3 sequences", block_table=table)


@pytest.mark.parametrize("page", [-1, BATCH.pages])
def test_a_page_outside_the_cache(page: int) -> None:
    """Of the prefix: no new token is written there, but attention reads it."""
    error(
        "CP612",
        f"{page}",
        "the block table names pages",
        block_table=changed(TABLE, (1, 0), page),
        slots=BATCH.pages * 16,
    )


@pytest.mark.parametrize("size", [0, -16, 16.0])
def test_a_block_size_that_is_none(size: Any) -> None:
    error("CP612", f"block_size={size!r}", block_size=size)


def test_padding_that_counts_as_more_pages_than_there_are() -> None:
    """The op adds up the pages of its sequences, those that the bucket adds included."""
    bucket = Bucket(rows=32, sequences=3)
    error("CP613", "counts as 10 pages, 2 of them for the bucket's padding", bucket=bucket, slots=BATCH.pages * 16)


def test_numbers_of_other_libraries_are_ints() -> None:
    numpy = pytest.importorskip("numpy")
    batch = dataclasses.replace(BATCH, lengths=numpy.array(BATCH.lengths), prefixes=numpy.array(BATCH.prefixes))
    assert batch.plan(2).lengths == BATCH.lengths


# -- CP613: bucket -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket", "said"),
    [
        (Bucket(30, 3), ["64 tokens in 3 sequences", "needs 32 rows", "has 30 rows and 3 sequences"]),
        (Bucket(32, 2), ["needs 32 rows", "has 32 rows and 2 sequences"]),
        (Bucket(32, 3, 4), ["5 columns", "a bucket of 4"]),
    ],
    ids=["rows", "sequences", "columns"],
)
def test_a_step_above_its_bucket(bucket: Bucket, said: list[str]) -> None:
    error("CP613", *said, bucket=bucket)


def test_first_needs_a_larger_bucket_than_balanced() -> None:
    """24 sequences of 5 tokens on 2 ranks: 60 rows, but 72 where the first block of each takes the extra token."""
    batch = batch_of([5] * 24)
    assert batch.plan(2, remainder="balanced", bucket=Bucket(60, 24)).rows == 60
    with pytest.raises(StepError, match="needs 72 rows") as caught:
        batch.plan(2, remainder="first", bucket=Bucket(60, 24))
    assert caught.value.code == "CP613"


@pytest.mark.parametrize("sizes", [(31, 3), (0, 3), (-2, 3), (32, 0), (32, 3, 0), (32.0, 3), (32, 3, "4")])
def test_a_bucket_of_sizes_that_are_none(sizes: Any) -> None:
    with pytest.raises(StepError) as caught:
        Bucket(*sizes)
    check(caught.value, "CP613", f"rows={sizes[0]!r}", f"sequences={sizes[1]!r}")


# -- CP614: tensors of another step ------------------------------------------------------------------------------------

OTHER = batch_of([20, 20])


def raised(call: Any) -> StepError:
    with pytest.raises(StepError) as caught:
        call()
    return caught.value


def test_rows_of_another_step_are_not_cut() -> None:
    plan = BATCH.plan(2)
    check(raised(lambda: plan.shard(torch.zeros(40, 3))), "CP614", "[40, 3]", "64 tokens", "dimension 0")


def test_a_dimension_that_is_none() -> None:
    plan = BATCH.plan(2)
    check(raised(lambda: plan.shard(torch.zeros(64), dim=1)), "CP614", "[64]", "dimension 1")
    check(raised(lambda: plan.shard(torch.zeros(()), dim=0)), "CP614", "[]")


def test_rows_of_one_rank_are_not_restored() -> None:
    plan = BATCH.plan(2)
    check(raised(lambda: plan.restore(torch.zeros(32))), "CP614", "[32]", "64 rows of 2 ranks")


def test_rows_of_another_step_are_not_restored() -> None:
    plan = OTHER.plan(2)
    check(raised(lambda: plan.restore(torch.zeros(64))), "CP614", "[64]", "40 rows of 2 ranks")
    check(raised(lambda: plan.restore_rows(torch.zeros(64), [0])), "CP614", "[64]", "40 rows")


@pytest.mark.parametrize("row", [-1, 64])
def test_rows_that_the_step_does_not_have(row: int) -> None:
    plan = BATCH.plan(2)
    check(raised(lambda: plan.restore_rows(torch.zeros(64), [0, row])), "CP614", f"rows [{row}]", "64 tokens")


def unsharded() -> StepPlan:
    return batch_of([3, 1]).plan(2)


def test_tensors_of_another_step_where_nothing_is_sharded() -> None:
    for call in (unsharded().shard, unsharded().restore, lambda x: unsharded().restore_rows(x, [0])):
        check(raised(lambda call=call: call(torch.zeros(5))), "CP614", "[5]", "4 ")


@pytest.mark.parametrize("call", [lambda p: p.half(0), lambda p: p.half(1, 1), lambda p: p.last_rows])
def test_there_are_no_halves_where_nothing_is_sharded(call: Any) -> None:
    check(raised(lambda: call(unsharded())), "CP614", "not sharded", "no sequence has 4 new tokens")


# -- CP615: ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "cp_size"), [(2, 2), (-1, 2), (0, 0), (0, -2), (0.0, 2), (0, 2.0), (None, 2)])
def test_a_rank_out_of_range(rank: Any, cp_size: Any) -> None:
    error("CP615", f"rank {rank!r} of {cp_size!r}", rank=rank, cp_size=cp_size)


def test_a_remainder_that_is_none() -> None:
    error("CP615", "remainder='last'", remainder="last")
