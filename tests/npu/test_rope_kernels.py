"""CPU kernels of rotary position embeddings, against formulas in float64."""

from __future__ import annotations

from typing import Any

import cppass  # noqa: F401  isort: skip  before torch_npu: it makes that importable
import pytest
import torch
import torch_npu  # noqa: F401  registers the ops
from npu.kernel_check import close, run

import lowering.cann_host.kernels  # noqa: F401  registers their CPU kernels

npu = torch.ops.npu
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
B, S, N, G, D = 2, 5, 4, 2, 16
SIZES = {"BSND": (B, S, N, D), "SBND": (S, B, N, D), "BNSD": (B, N, S, D), "TND": (B * S, N, D)}
HEADS = {"BSND": 2, "SBND": 2, "BNSD": 1, "TND": 1}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(layout: str, dtype: torch.dtype = torch.float32, turned: int = D) -> list[torch.Tensor]:
    """query with N heads, key with G, cos and sin with one."""
    shapes = [list(SIZES[layout]) for _ in range(4)]
    for shape, heads in zip(shapes, (N, G, 1, 1), strict=True):
        shape[HEADS[layout]] = heads
    shapes[2][-1] = shapes[3][-1] = turned
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    """Element by element, from the definition."""
    size = cos.shape[-1]
    x, cos, sin = x.double(), cos.double(), sin.double()
    out = x.clone()
    for i in range(size):
        if mode == "half":
            partner, sign = (i + size // 2, -1) if i < size // 2 else (i - size // 2, 1)
        elif mode == "interleave":
            partner, sign = (i + 1, -1) if i % 2 == 0 else (i - 1, 1)
        else:
            quarter = size // 4
            partner, sign = (i + quarter, -1) if i // quarter % 2 == 0 else (i - quarter, 1)
        out[..., i] = x[..., i] * cos[..., i] + sign * x[..., partner] * sin[..., i]
    return out


@BOTH
@pytest.mark.parametrize("mode", ["half", "interleave", "quarter"])
@pytest.mark.parametrize("layout", SIZES)
def test_apply_rotary_pos_emb(layout: str, mode: str, dtype: torch.dtype) -> None:
    q, k, cos, sin = inputs(layout, dtype)
    q_out, k_out = run(npu.npu_apply_rotary_pos_emb, q, k, cos, sin, layout, mode)
    close(q_out, rotated(q, cos, sin, mode))
    close(k_out, rotated(k, cos, sin, mode))


def test_a_short_cos_rotates_the_first_elements() -> None:
    q, k, cos, sin = inputs("TND", turned=8)
    q_out, _ = run(npu.npu_apply_rotary_pos_emb, q, k, cos, sin, "TND")
    close(q_out, rotated(q, cos, sin, "half"))
    assert torch.equal(q_out[..., 8:], q[..., 8:])


def test_one_cos_for_the_whole_batch() -> None:
    q, k, cos, sin = inputs("BSND")
    q_out, _ = run(npu.npu_apply_rotary_pos_emb, q, k, cos[:1], sin[:1])
    close(q_out, rotated(q, cos[:1], sin[:1], "half"))


@BOTH
def test_a_subset_of_tokens_gives_the_same_bits(dtype: torch.dtype) -> None:
    q, k, cos, sin = inputs("TND", dtype)
    whole = npu.npu_apply_rotary_pos_emb(q, k, cos, sin, "TND")
    part = npu.npu_apply_rotary_pos_emb(q[3:4], k[3:4], cos[3:4], sin[3:4], "TND")
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, part, strict=True))


q, k, cos, sin = inputs("TND")
q4, k4, cos4, sin4 = inputs("BSND")
REFUSED: dict[str, tuple[Any, ...]] = {
    "layout BSH": (q, k, cos, sin, "BSH"),
    "mode third": (q, k, cos, sin, "TND", "third"),
    "4 dims as TND": (q4, k4, cos4, sin4, "TND"),
    "3 dims as BSND": (q, k, cos, sin, "BSND"),
    "two dtypes": (q, k, cos.bfloat16(), sin.bfloat16(), "TND"),
    "float64": (q.double(), k.double(), cos.double(), sin.double(), "TND"),
    "key of other tokens": (q, k[:3], cos, sin, "TND"),
    "key of another head size": (q, k[..., :8], cos, sin, "TND"),
    "cos of fewer tokens": (q, k, cos[:3], sin[:3], "TND"),
    "cos per head": (q, k, cos.expand(-1, N, -1), sin.expand(-1, N, -1), "TND"),
    "cos and sin differ": (q, k, cos, sin[..., :8], "TND"),
    "cos wider than the head": (q, k, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2), "TND"),
    "odd head size": (q[..., :7], k[..., :7], cos[..., :7], sin[..., :7], "TND"),
    "quarter of 6": (q[..., :6], k[..., :6], cos[..., :6], sin[..., :6], "TND", "quarter"),
    "one cos for all of S": (q4, k4, cos4[:, :1], sin4[:, :1], "BSND"),
    "one cos for all of T": (q, k, cos[:1], sin[:1], "TND"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    with pytest.raises(RuntimeError, match="documentation of the NPU op"):
        npu.npu_apply_rotary_pos_emb(*REFUSED[case])


@BOTH
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("r_shape", [(1, 1, S, D), (1, S, 1, D), (S, 1, 1, D)])
def test_rotary_mul(r_shape: tuple[int, ...], mode: str, dtype: torch.dtype) -> None:
    shape = [S if size == S else heads for size, heads in zip(r_shape[:3], (2, 3, 4), strict=True)]
    x, r1, r2 = (
        randn(*shape, D, dtype=dtype),
        randn(*r_shape, seed=1, dtype=dtype),
        randn(*r_shape, seed=2, dtype=dtype),
    )
    close(run(npu.npu_rotary_mul, x, r1, r2, mode), rotated(x, r1, r2, mode))


@pytest.mark.parametrize("r_shape", [(B, 1, S, D), (B, N, S, D)])
def test_rotary_mul_per_sequence(r_shape: tuple[int, ...]) -> None:
    x, r1, r2 = randn(B, N, S, D), randn(*r_shape, seed=1), randn(*r_shape, seed=2)
    close(run(npu.npu_rotary_mul, x, r1, r2), rotated(x, r1, r2, "half"))


def test_rotary_mul_by_a_matrix() -> None:
    x, r1, r2 = randn(B, N, S, D), randn(1, 1, S, D, seed=1), randn(1, 1, S, D, seed=2)
    turn = torch.zeros(D, D)
    turn[range(D // 2, D), range(D // 2)], turn[range(D // 2), range(D // 2, D)] = -1, 1
    close(run(npu.npu_rotary_mul, x, r1, r2, "half", turn), rotated(x, r1, r2, "half"))


x, r = randn(B, N, S, D), randn(1, 1, S, D)
MUL_REFUSED: dict[str, tuple[Any, ...]] = {
    "mode quarter": (x, r, r, "quarter"),
    "3 dims": (x[0], r[0], r[0]),
    "r2 of another shape": (x, r, r[:, :, :1]),
    "int32": (x.int(), r, r),
    "odd head size": (x[..., :7], r[..., :7], r[..., :7]),
    "head size 896": (x.repeat(1, 1, 1, 56), r.repeat(1, 1, 1, 56), r.repeat(1, 1, 1, 56)),
    "r1 narrower": (x, r[..., :8], r[..., :8]),
    "heads and sequence without batch": (x, r.expand(1, N, S, D), r.expand(1, N, S, D)),
    "interleave with a batch": (x, r.expand(B, 1, S, D), r.expand(B, 1, S, D), "interleave"),
    "1000 sequences": (torch.ones(1000, 2, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)),
    "matrix of another size": (x, r, r, "half", torch.eye(8)),
}


@pytest.mark.parametrize("case", MUL_REFUSED)
def test_rotary_mul_refusals(case: str) -> None:
    with pytest.raises(RuntimeError, match="documentation of the NPU op"):
        npu.npu_rotary_mul(*MUL_REFUSED[case])
