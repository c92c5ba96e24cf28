"""Norms, SwiGLU and per-token quantisation: CPU kernels of torch_npu ops.

Every row is computed on its own in float32 and rounded once, so a subset of rows gives the same bits as all rows.
Shape suffixes: N the kept dims, D the normalised dims (those of gamma), 1 a dim of size one.
Source: the op documentation inside torch_npu 2.13 (``torch_npu/_op_plugin_docs.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.cann_host.kernels.library import kernel, reject

__all__: list[str] = []

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INT8 = 1  # torch_npu's number of torch.int8 in dst_type
_INT8_MAX = 127.0


@kernel("npu_rms_norm")
def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``x * rstd * gamma`` [N, D] in x's dtype, and rstd = 1 / sqrt(mean(x^2) + epsilon) [N, 1] in float32.

    Raises:
        RuntimeError: dtypes other than one of float16, bfloat16, float32 for both; gamma is not of the last dims.
    """
    _check_gamma("npu_rms_norm", input, gamma)
    return _normalised(input, gamma, epsilon)


@kernel("npu_add_rms_norm")
def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(norm of x, rstd [N, 1] float32, x) with x = x1 + x2 rounded to the dtype of x1 [N, D].

    Raises:
        RuntimeError: as ``npu_rms_norm``, and x1 and x2 of different shape or dtype.
    """
    x = _sum("npu_add_rms_norm", x1, x2, gamma)
    y, rstd = _normalised(x, gamma, epsilon)
    return y, rstd, x


@kernel("npu_add_rms_norm_v2")
def _add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``npu_add_rms_norm`` in place: x1 becomes the norm, x2 becomes the sum; the result is rstd [N, 1] float32."""
    x = _sum("npu_add_rms_norm_v2", x1, x2, gamma)
    y, rstd = _normalised(x, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(x)
    return rstd


@kernel("npu_add_rms_norm_cast")
def _add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(norm in float32, norm in x's dtype, rstd, x): the float32 norm is the rounded one, widened."""
    x = _sum("npu_add_rms_norm_cast", x1, x2, gamma)
    y, rstd = _normalised(x, gamma, epsilon)
    return y.to(torch.float32, copy=True), y, rstd, x


@kernel("npu_swiglu")
def _swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(a) * b for the halves (a, b) of ``dim``, which comes out half as wide.

    Raises:
        RuntimeError: a dtype other than float16, bfloat16, float32; more than 8 dims; an odd size of ``dim``.
    """
    op = "npu_swiglu"
    _check_dtype(op, "input", input)
    if not 1 <= input.dim() <= 8:
        reject(op, f"saw {input.dim()} dims; supported are 1 to 8")
    if not -input.dim() <= dim < input.dim() or input.shape[dim] % 2:
        reject(op, f"saw dim {dim} of {tuple(input.shape)}; it must be a dim of even size")
    a, b = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(a) * b).to(input.dtype)


@kernel("npu_dynamic_quant")
def _dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Per row: scale = max|x * smooth| / 127 [N] float32, and round(x * smooth / scale) [N, D] int8.

    A row of zeros has scale 0 and comes out as zeros. Rounding is to nearest, ties to even.

    Args:
        smooth_scales: [D]; with ``group_index`` [groups, D].
        group_index: int32 [groups], the end row of each group, increasing; the last is the number of rows.

    Raises:
        RuntimeError: inputs that the documentation forbids.
        NotImplementedError: another dst_type than int8, another quant_mode than "pertoken".
    """
    op = "npu_dynamic_quant"
    _check_dtype(op, "input", input)
    if input.dim() < 2:
        reject(op, f"saw {input.dim()} dim; the input must have more than one")
    if dst_type not in (None, _INT8) or quant_mode != "pertoken" or dst_type_max != 0.0:
        raise NotImplementedError(f"{op}: the host kernel quantises to int8 per token alone")
    rows, width = input.reshape(-1, input.shape[-1]).float(), input.shape[-1]
    if smooth_scales is None:
        if group_index is not None:
            reject(op, "saw group_index without smooth_scales")
    else:
        rows = rows * _smooth_rows(op, smooth_scales, group_index, input, rows.shape[0], width)
    quantised, scale = quantise_rows(rows)
    return quantised.reshape(input.shape), scale.reshape(input.shape[:-1])


def quantise_rows(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of float32 rows: (int8 [N, D], scale [N] float32)."""
    scale = rows_ND.abs().amax(-1) / _INT8_MAX
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(rows_ND / divisor.unsqueeze(-1)).to(torch.int8), scale


def _smooth_rows(
    op: str, smooth_scales: Tensor, group_index: Tensor | None, input: Tensor, rows: int, width: int
) -> Tensor:
    """[D], or [rows, D] with groups; float32."""
    if smooth_scales.dtype != input.dtype:
        reject(op, f"saw smooth_scales of {smooth_scales.dtype}; they must be {input.dtype} as the input")
    if group_index is None:
        if tuple(smooth_scales.shape) != (width,):
            reject(op, f"saw smooth_scales {tuple(smooth_scales.shape)}; without group_index they must be [{width}]")
        return smooth_scales.float()
    if group_index.dtype != torch.int32 or group_index.dim() != 1:
        reject(op, f"saw group_index {group_index.dtype} {tuple(group_index.shape)}; it must be int32 of one dim")
    groups = group_index.shape[0]
    if tuple(smooth_scales.shape) != (groups, width):
        reject(op, f"saw smooth_scales {tuple(smooth_scales.shape)}; with group_index they must be [{groups}, {width}]")
    ends = group_index.tolist()
    if ends != sorted(ends) or not ends or ends[0] < 0 or ends[-1] != rows:
        reject(op, f"saw group_index {ends}; it must increase and end with the {rows} rows of the input")
    counts = torch.diff(group_index, prepend=group_index.new_zeros(1))
    return smooth_scales.float().repeat_interleave(counts, 0)


def _normalised(x_ND: Tensor, gamma_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    dims = list(range(x_ND.dim() - gamma_D.dim(), x_ND.dim()))
    wide = x_ND.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma_D.float()).to(x_ND.dtype), rstd


def _sum(op: str, x1: Tensor, x2: Tensor, gamma: Tensor) -> Tensor:
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        reject(
            op, f"saw x1 {x1.dtype} {tuple(x1.shape)}, x2 {x2.dtype} {tuple(x2.shape)}; dtype and shape must be equal"
        )
    _check_gamma(op, x1, gamma)
    return (x1.float() + x2.float()).to(x1.dtype)


def _check_dtype(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        reject(op, f"saw {name} of {x.dtype}; supported are float16, bfloat16 and float32")


def _check_gamma(op: str, x: Tensor, gamma: Tensor) -> None:
    _check_dtype(op, "x", x)
    if gamma.dtype != x.dtype:
        reject(op, f"saw gamma of {gamma.dtype}; it must be {x.dtype} as x")
    if not 1 <= gamma.dim() <= x.dim() <= 8 or x.shape[x.dim() - gamma.dim() :] != gamma.shape:
        reject(op, f"saw x {tuple(x.shape)}, gamma {tuple(gamma.shape)}; gamma must have the last dims of x, at most 8")
