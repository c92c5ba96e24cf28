"""Random steps of a model runner: each rank is handed its own rows (inputs="sharded") of a batch on a paged cache.

One layer with steps around it; sizes are known here, symbolic ones are those of runner/test_sharded_ranks.py.
"""

from __future__ import annotations

import dataclasses

import torch
from fuzz.inputs import Inputs
from fuzz.mixing import MIXING
from fuzz.programs import SHARP, Named, stepped
from fuzz.tokenwise import TOKENWISE
from hypothesis import strategies as st
from runner.batches import Batch, batch_of
from runner.sharded_snippets import BLOCK, NAMED, Layer, attend, layer_of, rows_of
from torch import Tensor

import cppass
from cppass.runner import Bucket, StepPlan

SPARE = 20  # pages that no sequence has: the op wants a page in the cache for each that padding sequences count
OF_ALL_ROWS = {
    "position",
    "given flags",
    "given rows",
    "mean of marked",
    "product over tokens",
    "added by index",
    "put",
}
OF_ALL_ROWS |= {"in order", "selected", "gathered", "scattered", "decay over tokens"}
"""Steps that number the rows or take something a row: of local rows these say something else than of all."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A batch, how it is planned and what is around its attention.

    Attributes:
        lengths, prefixes: new and cached tokens of each sequence.
        packed: attention reads this step's keys, not the pages.
        seed: where the pages are.
        bucket: rows and sequences more than needed; None for none.
        calls: attention calls a site.
        lower: run the lowered graphs; else the ops' meanings.
        before, after: steps on the rows.
    """

    cp_size: int = 2
    lengths: tuple[int, ...] = (8,)
    prefixes: tuple[int, ...] = (0,)
    packed: bool = False
    remainder: str = "balanced"
    seed: int = 0
    bucket: tuple[int, int] | None = None
    calls: int = 2
    lower: bool = True
    before: tuple[Named, ...] = ()
    after: tuple[Named, ...] = ()

    def batch(self) -> Batch:
        made = batch_of(self.lengths, self.prefixes, BLOCK, self.seed)
        return dataclasses.replace(made, pages=made.pages + SPARE)

    def plans(self, batch: Batch) -> list[StepPlan]:
        bucket = None
        if self.bucket is not None:
            rows = batch.plan(self.cp_size, remainder=self.remainder).rows
            bucket = Bucket(rows + rows % 2 + self.bucket[0], len(self.lengths) + self.bucket[1])
        return [batch.plan(self.cp_size, r, remainder=self.remainder, bucket=bucket) for r in range(self.cp_size)]

    def run(self, given: Inputs, plan: StepPlan, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """The last row of each sequence."""
        layer = Layer(*tensors)
        out = attend(stepped(self.before, x, given), layer, plan, packed=self.packed, kv_lens=plan.cu_kv)
        return stepped(self.after, out, given).index_select(0, layer.last - 1)


def outcome(step: Step) -> str:
    """ "rewritten" or "refused CP112"; raises AssertionError where a rank has other rows or caches than one device."""
    batch = step.batch()
    plans, one, weights = step.plans(batch), layer_of(batch, None), Inputs(dtype=torch.float32)
    with torch.no_grad():
        expected = step.run(weights, batch.plan(1), rows_of(batch), one.tensors)
    count = len(one.tensors)
    inputs = [(plan.shard(rows_of(batch)), *layer_of(batch, plan).tensors, *weights.made) for plan in plans]
    config = cppass.CPConfig(
        inputs="sharded",
        sharded_inputs=NAMED,
        cp_size=step.cp_size,
        remainder=step.remainder,
        attention_calls=step.calls,
    )

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        return step.run(Inputs(rest[count:]), plans[0], x, rest[:count])

    try:
        ranks = cppass.simulate(run, inputs[0], step.cp_size, config, rank_inputs=inputs, lower=step.lower)
    except cppass.RefusedError as error:
        return f"refused {error.code}"
    real = [page for page in range(batch.pages) if page != batch.pad_slot // BLOCK]
    for seen, own in ranks:
        _same(seen[: len(step.lengths)], expected)
        for cache, meant in zip(own[4:6], (one.kc, one.vc), strict=True):
            _same(cache[real], meant[real])
    return "rewritten"


def _same(seen: Tensor, meant: Tensor) -> None:
    least = 1e-5 * float(meant.nan_to_num(posinf=0, neginf=0).abs().max())
    torch.testing.assert_close(seen, meant, rtol=1e-4, atol=max(least, 1e-5), equal_nan=True)


# -- drawing one -------------------------------------------------------------------------------------------------------


@st.composite
def _around(draw: st.DrawFn) -> tuple[Named, ...]:
    """Up to two steps; one in sixteen mixes rows, which has to be refused."""
    mixes = draw(st.integers(0, 15)) == 15
    names = [f"mixing: {name}" for name in MIXING if name not in OF_ALL_ROWS] if mixes else list(TOKENWISE)
    names = [name for name in names if name not in SHARP | OF_ALL_ROWS]
    return tuple(draw(st.lists(st.tuples(st.sampled_from(names), st.integers(0, 7)), max_size=2)))


@st.composite
def runner_steps(draw: st.DrawFn) -> Step:
    cp_size = draw(st.sampled_from([2, 3, 4, 8]))
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 60)), max_size=4))
    lengths.insert(draw(st.integers(0, len(lengths))), draw(st.integers(2 * cp_size, 70)))
    packed = draw(st.booleans())
    prefixes = [0 if packed else draw(st.one_of(st.just(0), st.integers(1, 200))) for _ in lengths]
    bucket = draw(st.one_of(st.none(), st.tuples(st.integers(0, 8).map(lambda n: 2 * n), st.integers(0, 2))))
    return Step(
        cp_size, tuple(lengths), tuple(prefixes), packed, draw(st.sampled_from(["balanced", "first"])),
        draw(st.integers(0, 9)), bucket, 2 if packed else draw(st.sampled_from([1, 2])), draw(st.booleans()),
        draw(_around()), draw(_around()),
    )  # fmt: skip
