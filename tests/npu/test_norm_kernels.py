"""CPU kernels of norms, SwiGLU and dynamic quantisation, against formulas in float64."""

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


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).to(dtype)


def norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.double().flatten(x.dim() - gamma.dim())
    rstd = 1 / (wide.pow(2).sum(-1) / wide.shape[-1] + epsilon).sqrt()
    kept = x.shape[: x.dim() - gamma.dim()]
    rstd = rstd.reshape(*kept, *[1] * gamma.dim())
    return x.double() * rstd * gamma.double(), rstd


@BOTH
@pytest.mark.parametrize(("shape", "dims"), [((7, 64), 1), ((5, 4, 16), 1), ((3, 5, 4, 16), 2), ((0, 64), 1)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], dims: int) -> None:
    x, gamma = randn(*shape, dtype=dtype), randn(*shape[-dims:], dtype=dtype)
    y, rstd = run(npu.npu_rms_norm, x, gamma, 1e-5)
    wanted, wanted_rstd = norm(x, gamma, 1e-5)
    close(y, wanted)
    close(rstd, wanted_rstd)


@BOTH
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x1, x2, gamma = randn(7, 64, dtype=dtype), randn(7, 64, dtype=dtype) + 1, randn(64, dtype=dtype)
    y, rstd, x = run(npu.npu_add_rms_norm, x1, x2, gamma)
    assert torch.equal(x, x1 + x2)
    wanted, wanted_rstd = norm(x, gamma, 1e-6)
    close(y, wanted)
    close(rstd, wanted_rstd)


@BOTH
def test_add_rms_norm_cast_gives_the_norm_twice(dtype: torch.dtype) -> None:
    x1, x2, gamma = randn(7, 64, dtype=dtype), randn(7, 64, dtype=dtype), randn(64, dtype=dtype)
    wide, y, rstd, x = run(npu.npu_add_rms_norm_cast, x1, x2, gamma)
    once = npu.npu_add_rms_norm(x1, x2, gamma)
    assert all(torch.equal(a, b) for a, b in zip((y, rstd, x), once, strict=True))
    assert torch.equal(wide, y.float())


@BOTH
def test_add_rms_norm_v2_works_in_place(dtype: torch.dtype) -> None:
    x1, x2, gamma = randn(7, 64, dtype=dtype), randn(7, 64, dtype=dtype), randn(64, dtype=dtype)
    y, rstd, x = npu.npu_add_rms_norm(x1, x2, gamma)
    assert torch.equal(npu.npu_add_rms_norm_v2(x1, x2, gamma), rstd)
    assert torch.equal(x1, y)
    assert torch.equal(x2, x)


@BOTH
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_swiglu(dtype: torch.dtype, dim: int) -> None:
    x = randn(6, 8, 32, dtype=dtype)
    a, b = x.double().tensor_split(2, dim)
    close(run(npu.npu_swiglu, x, dim), a / (1 + torch.exp(-a)) * b)


@BOTH
def test_dynamic_quant(dtype: torch.dtype) -> None:
    x = randn(2, 5, 64, dtype=dtype)
    x[0, 0] = 0
    q, scale = run(npu.npu_dynamic_quant, x)
    assert torch.equal(scale, x.float().abs().amax(-1) / 127)
    assert q.dtype is torch.int8
    assert q.abs().amax(-1).tolist() == [[0, 127, 127, 127, 127], [127] * 5]
    assert ((q.float() * scale[..., None] - x.float()).abs() <= 0.5001 * scale[..., None]).all()


def test_dynamic_quant_with_smooth_scales() -> None:
    x, smooth = randn(6, 16), randn(2, 16).abs() + 0.5
    whole, _ = run(npu.npu_dynamic_quant, x, smooth_scales=smooth[0])
    assert torch.equal(whole, npu.npu_dynamic_quant(x * smooth[0])[0])
    ends = torch.tensor([2, 6], dtype=torch.int32)
    q, scale = run(npu.npu_dynamic_quant, x, smooth_scales=smooth, group_index=ends)
    scaled = torch.cat([x[:2] * smooth[0], x[2:] * smooth[1]])
    assert torch.equal(scale, scaled.abs().amax(-1) / 127)
    assert torch.equal(q, npu.npu_dynamic_quant(scaled)[0])


@BOTH
@pytest.mark.parametrize("op", ["rms", "add", "swiglu", "quant"])
def test_a_subset_of_rows_gives_the_same_bits(dtype: torch.dtype, op: str) -> None:
    x, gamma = randn(37, 1024, dtype=dtype), randn(1024, dtype=dtype)
    call = {
        "rms": lambda t: npu.npu_rms_norm(t, gamma),
        "add": lambda t: npu.npu_add_rms_norm(t, t, gamma),
        "swiglu": lambda t: (npu.npu_swiglu(t),),
        "quant": lambda t: npu.npu_dynamic_quant(t),
    }[op]
    for rows in (slice(5, 6), slice(0, 9), slice(30, 37)):
        assert all(torch.equal(whole[rows], part) for whole, part in zip(call(x), call(x[rows]), strict=True))


x, g = torch.ones(4, 8), torch.ones(8)
REFUSED: dict[str, tuple[Any, ...]] = {
    "x of int32": (npu.npu_rms_norm, x.int(), g.int()),
    "x of float64": (npu.npu_rms_norm, x.double(), g.double()),
    "gamma of bfloat16": (npu.npu_rms_norm, x, g.bfloat16()),
    "gamma too short": (npu.npu_rms_norm, x, g[:4]),
    "gamma of more dims": (npu.npu_rms_norm, x, torch.ones(1, 4, 8)),
    "x2 of another shape": (npu.npu_add_rms_norm, x, x[:2], g),
    "x2 of another dtype": (npu.npu_add_rms_norm, x, x.half(), g),
    "v2: x2 of another shape": (npu.npu_add_rms_norm_v2, x, x[:2], g),
    "cast: gamma of bfloat16": (npu.npu_add_rms_norm_cast, x, x, g.bfloat16()),
    "swiglu of int32": (npu.npu_swiglu, x.int()),
    "swiglu of an odd size": (npu.npu_swiglu, x[:, :7]),
    "swiglu of a scalar": (npu.npu_swiglu, torch.tensor(1.0)),
    "swiglu along no dim": (npu.npu_swiglu, x, 2),
    "quantise int32": (npu.npu_dynamic_quant, x.int()),
    "quantise one dim": (npu.npu_dynamic_quant, g),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    op, *args = REFUSED[case]
    with pytest.raises(RuntimeError, match="documentation of the NPU op"):
        op(*args)


SMOOTH: dict[str, dict[str, Any]] = {
    "smooth_scales of another dtype": {"smooth_scales": g.half()},
    "smooth_scales too short": {"smooth_scales": g[:4]},
    "groups without smooth_scales": {"group_index": torch.tensor([4], dtype=torch.int32)},
    "one smooth_scales for two groups": {"smooth_scales": g, "group_index": torch.tensor([2, 4], dtype=torch.int32)},
    "int64 groups": {"smooth_scales": x[:2], "group_index": torch.tensor([2, 4])},
    "falling groups": {"smooth_scales": x[:2], "group_index": torch.tensor([4, 2], dtype=torch.int32)},
    "groups that end early": {"smooth_scales": x[:2], "group_index": torch.tensor([2, 3], dtype=torch.int32)},
}


@pytest.mark.parametrize("case", SMOOTH)
def test_refused_smooth_scales(case: str) -> None:
    with pytest.raises(RuntimeError, match="documentation of the NPU op"):
        npu.npu_dynamic_quant(x, **SMOOTH[case])


@pytest.mark.parametrize("options", [{"dst_type": 16}, {"quant_mode": "perchannel"}, {"dst_type_max": 1.0}])
def test_other_quantisations_are_not_implemented(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="int8 per token"):
        npu.npu_dynamic_quant(x, **options)
