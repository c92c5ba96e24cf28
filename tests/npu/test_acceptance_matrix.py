"""The acceptance matrix of fused-infer-attention with its KV write: heads, ranks, dtypes, shapes of a step; every rank.

Tolerances, published by RTP-LLM for the same algorithm, of the attention output alone:

    bfloat16    against the bfloat16 call on one device: at most 1.1e-2 anywhere, 5e-4 on average
                against float32 on one device, of the same inputs: at most 1.1e-2 anywhere, and on average no further
                than 1.02 times the bfloat16 call on one device (its rounding alone is 5.3e-4 on average where
                sequences are short, outputs being of size 1 there)
    float32     against one device: at most 1e-5 anywhere
    caches      on all ranks the bits that one device's write leaves

Queries, keys and values are inputs, so that only the gather and the write touch bits of the caches. Here every pair of
two settings; every combination, and lengths up to 32768, with `pytest -m matrix`.

Shape suffixes: T tokens of all sequences, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
import itertools
import unittest.mock
from typing import Any

import pytest
import torch
from npu.fused_snippets import BLOCK, MASK, Snippet, fused, nd_update_on_a_view, traced

import cppass
from cppass import halves
from cppass.demo.npu.forward_metadata import plan_step
from cppass.layout import Half, Zigzag

D = 64
MAX_ERROR, MEAN_ERROR = 1.1e-2, 5e-4  # bfloat16
EXACT = 1e-5  # float32
ROUNDING = 1.02  # mean error against float32: ranks to one device

HEADS = ((64, 8), (32, 4), (8, 1), (4, 1))
CP_SIZES = (4, 8)
DTYPES = (torch.float32, torch.bfloat16)
BATCHES: dict[str, list[tuple[int, int]]] = {  # (new, cached) tokens of each sequence
    "even": [(1024, 0)],
    "odd": [(1025, 0)],
    "prime": [(1031, 0)],
    "one token beside a long one": [(1, 0), (1030, 0)],
    "many short": [(1 + 7 * i % 23, 0) for i in range(40)],  # 1 to 23 tokens, most shorter than 2P
    "prefix, fragmented": [(512, 256), (37, 300), (64, 5)],
}
LONG = {
    "4097": [(4097, 0)],
    "4096 on 2048": [(4096, 2048)],
    "16384": [(16384, 0)],
    "32768": [(32768, 0)],
}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: str
    heads: tuple[int, int]
    cp_size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        H, G = self.heads
        return f"{self.batch}, {H}/{G}, P={self.cp_size}, {str(self.dtype).removeprefix('torch.')}"


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Many tiny calls: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pairs_of_settings() -> list[Case]:
    """Every batch with every heads, in which the values of any two other settings meet too."""
    return [
        Case(batch, heads, CP_SIZES[(h + b) % 2], DTYPES[(h // 2 + b) % 2])
        for (b, batch), (h, heads) in itertools.product(enumerate(BATCHES), enumerate(HEADS))
    ]


def attention(case: Case) -> Snippet:
    """Paged TND in blocks that lie in random order: one write per cache, then the call that reads them by block table.

    inputs: q [T, H, D], k and v [T, G, D], caches [blocks, BLOCK, G, D], slots, block table, mask.
    """
    (H, G), (new, cached) = case.heads, zip(*{**BATCHES, **LONG}[case.batch], strict=True)
    blocks = len(new) * -(-max(map(sum, zip(new, cached, strict=True))) // BLOCK)
    step = plan_step(new, cached, block_size=BLOCK, blocks=blocks, shuffle=1).metadata

    def run(q, k, v, kc, vc, slots, table, mask):  # type: ignore[no-untyped-def]
        pages = [c.view(blocks, BLOCK, -1) for c in nd_update_on_a_view(kc, vc, slots, k, v)]
        lengths = {"actual_seq_qlen": step.cu_q, "actual_seq_kvlen": step.kv_lens}
        paged = {"block_table": table, "block_size": BLOCK, "softmax_scale": D**-0.5}
        causal = {"input_layout": "TND", "sparse_mode": 3, "atten_mask": mask}
        return fused("v2", q, *pages, H, G, **lengths, **paged, **causal)[0]

    generator = torch.Generator().manual_seed(sum(new))
    shapes = [(sum(new), n, D) for n in (H, G, G)] + [(blocks, BLOCK, G, D)] * 2
    random = (torch.randn(*shape, generator=generator).to(case.dtype) for shape in shapes)
    return Snippet(run, (*random, step.slot_mapping, step.block_table, MASK), (3, 4))


def check(case: Case) -> None:
    snippet = attention(case)
    report = cppass.run_pass(traced(snippet), snippet.inputs, cp_size=case.cp_size, lower=False)
    assert (report.status, report.collectives) == ("rewritten", 2)  # K and V together, and the output
    own = [x.clone() for x in snippet.inputs]
    one_device = snippet.run(*own).float()
    in_float32 = [x.float() if x.is_floating_point() else x for x in snippet.inputs]
    exact = snippet.run(*(x.clone() for x in in_float32))
    assert not torch.equal(own[3], snippet.inputs[3]) and not torch.equal(own[4], snippet.inputs[4])

    ranks = cppass.simulate(snippet.run, snippet.inputs, case.cp_size)
    assert len(ranks) == case.cp_size
    for rank, (out_THD, after) in enumerate(ranks):
        assert out_THD.dtype == case.dtype and out_THD.shape == one_device.shape
        of_one, of_exact = (out_THD.float() - one_device).abs(), (out_THD.float() - exact).abs()
        seen = f"rank {rank}: output is off by {of_one.max():.3g}, {of_one.mean():.3g} on average"
        if case.dtype is torch.float32:
            assert of_one.max() <= EXACT, seen
        else:
            assert of_one.max() <= MAX_ERROR and of_one.mean() <= MEAN_ERROR, seen
            assert of_exact.max() <= MAX_ERROR, f"{of_exact.max():.3g} from float32"
            assert of_exact.mean() <= ROUNDING * (one_device - exact).abs().mean(), f"{of_exact.mean():.3g} on average"
        for i in snippet.caches:
            assert torch.equal(after[i], own[i]), f"rank {rank}: a cache differs from one device's"


@pytest.mark.parametrize("case", pairs_of_settings(), ids=str)
def test_every_pair_of_settings(case: Case) -> None:
    check(case)


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "case", list(itertools.starmap(Case, itertools.product(BATCHES, HEADS, CP_SIZES, DTYPES))), ids=str
)
def test_every_combination(case: Case) -> None:
    check(case)


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}/{heads[1]}")
@pytest.mark.parametrize("batch", ["4097", "4096 on 2048"])
def test_long(batch: str, heads: tuple[int, int], cp_size: int) -> None:
    check(Case(batch, heads, cp_size, torch.bfloat16))


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", [Case("16384", (8, 1), 8, DTYPES[1]), Case("32768", (4, 1), 8, DTYPES[1])], ids=str)
def test_very_long(case: Case) -> None:
    check(case)


def test_every_pair_occurs() -> None:
    for a, b in itertools.combinations(dataclasses.fields(Case), 2):
        values = [{getattr(case, f.name) for case in pairs_of_settings()} for f in (a, b)]
        seen = {(getattr(case, a.name), getattr(case, b.name)) for case in pairs_of_settings()}
        assert seen == set(itertools.product(*values))
    assert {case.heads for case in pairs_of_settings()} == set(HEADS)
    assert {(case.cp_size, case.dtype) for case in pairs_of_settings()} == set(itertools.product(CP_SIZES, DTYPES))


# -- controls: what the tolerances notice ------------------------------------------------------------------------------

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@EACH_DTYPE
@pytest.mark.parametrize("batch", ["even", "prime", "prefix, fragmented"])
def test_blocks_of_other_ranks_are_noticed(batch: str, dtype: torch.dtype) -> None:
    with (
        unittest.mock.patch("cppass.layout.owned_blocks", lambda rank, cp_size: (2 * rank, 2 * rank + 1)),
        pytest.raises(AssertionError, match="rank 0: output is off"),
    ):
        check(Case(batch, (4, 1), 4, dtype))


@EACH_DTYPE
@pytest.mark.parametrize("batch", ["even", "odd", "prefix, fragmented"])
def test_one_key_too_few_is_noticed(batch: str, dtype: torch.dtype) -> None:
    """Rows of the next half, which see 513 keys and more of an even step, miss their own one."""
    ends = Zigzag.half_ends

    def one_less(self: Zigzag, rank: int, half: Half) -> list[Any]:
        return [end - half for end in ends(self, rank, half)]

    with (
        unittest.mock.patch.object(halves.Zigzag, "half_ends", one_less),
        pytest.raises(AssertionError, match="rank 0: output is off"),
    ):
        check(Case(batch, (4, 1), 4, dtype))


def test_rows_written_to_each_others_slots_are_noticed() -> None:
    def as_they_are(emit, rows, node, ranks):  # type: ignore[no-untyped-def]
        return emit(torch.ops.aten.clone.default, node.args[0])

    from lowering.npu.target import LOWERINGS

    with (
        unittest.mock.patch.dict(LOWERINGS, {"gathered_order": as_they_are}),
        pytest.raises(AssertionError, match="rank 0"),
    ):
        check(Case("even", (4, 1), 4, torch.float32))


def test_one_bit_of_a_cache_is_noticed() -> None:
    simulate = cppass.simulate

    def one_bit_off(*args: Any) -> list[Any]:
        ranks = simulate(*args)
        last = ranks[-1][1][4].view(torch.int16).flatten()
        last[-1] ^= 1
        return ranks

    with (
        unittest.mock.patch("cppass.simulate", one_bit_off),
        pytest.raises(AssertionError, match="rank 3: a cache differs from one device's"),
    ):
        check(Case("even", (4, 1), 4, torch.bfloat16))
