"""Rotary position embedding: CPU kernels of torch_npu ops.

Shape suffixes: T tokens of all sequences, B batch, S sequence, N heads, D head size, R <= D rotated head size.
Every element depends on its own row alone; the arithmetic is in float32 and rounded once.
Source: the op documentation inside torch_npu 2.13 (``torch_npu/_op_plugin_docs.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.cann_host.kernels.library import kernel, reject

__all__: list[str] = []

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_HEADS = {"BSND": 2, "SBND": 2, "BNSD": 1, "TND": 1}  # the dim that counts heads
_BATCH = {"BSND": 0, "SBND": 1, "BNSD": 0}  # the dim that cos and sin may have of size 1
_PARTS = {"half": 2, "interleave": 2, "quarter": 4}

# npu_rotary_mul, first three dims of r1: which are those of the input (the others are 1), and where B and N then are.
_HALF_FORMS = (
    ((2,), (0, 1)),  # input BNSD, r1 11SD
    ((0, 2), (0, 1)),  # B1SD
    ((0, 1, 2), (0, 1)),  # BNSD
    ((1,), (0, 2)),  # input BSND, r1 1S1D
    ((0, 1), (0, 2)),  # BS1D
    ((0, 1, 2), (0, 2)),  # BSND
    ((0,), (1, 2)),  # input SBND, r1 S11D
    ((0, 1), (1, 2)),  # SB1D
    ((0, 1, 2), (1, 2)),  # SBND
)
_INTERLEAVE_FORMS = (((2,), (0, 1)), ((1,), (0, 2)), ((0,), (1, 2)))


@kernel("npu_apply_rotary_pos_emb")
def _apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """Rotated query and key: ``x * cos + rotate(x) * sin`` of the first R of D elements, the rest as it was.

    On an NPU the results are the inputs, updated in place, although the schema says otherwise; here they are new
    tensors, as in graph mode, where torchair copies the inputs first.

    Args:
        query, key: TND [T, N, D], or 4 dims in the order of ``layout``; they may differ in N alone.
        cos, sin: as query with N = 1 and R <= D; B may be 1.
        rotary_mode: "half" rotates (x1, x2) to (-x2, x1); "interleave" does so with even and odd elements,
            "quarter" rotates (x1, x2, x3, x4) to (-x2, x1, -x4, x3).

    What any documented product takes is taken; A2 and A3 themselves ask for BSND or TND, "half", and D of 64 or 128.

    Raises:
        RuntimeError: inputs that the documentation forbids.
    """
    op = "npu_apply_rotary_pos_emb"
    if layout not in _HEADS:
        reject(op, f"saw layout {layout!r}; supported are {', '.join(_HEADS)}")
    if rotary_mode not in _PARTS:
        reject(op, f"saw rotary_mode {rotary_mode!r}; supported are {', '.join(_PARTS)}")
    tensors = {"query": query, "key": key, "cos": cos, "sin": sin}
    seen = ", ".join(f"{name} {x.dtype} {tuple(x.shape)}" for name, x in tensors.items())
    if any(x.dtype != query.dtype or x.dtype not in _FLOATS for x in tensors.values()):
        reject(op, f"saw {seen}; all must have one dtype of float16, bfloat16, float32")
    if any(x.dim() != len(layout) for x in tensors.values()):
        reject(op, f"saw {seen}; layout {layout} has {len(layout)} dims")
    heads, size, turned = _HEADS[layout], query.shape[-1], cos.shape[-1]
    if _without(query, heads) != _without(key, heads):
        reject(op, f"saw {seen}; query and key may differ in their number of heads alone")
    if not _fits(cos, query, layout) or not _fits(sin, query, layout) or cos.shape != sin.shape:
        reject(op, f"saw {seen}; cos and sin must be as the query with one head, in layout {layout}")
    if not turned <= size <= 1024 or turned % _PARTS[rotary_mode]:
        reject(
            op, f"saw {seen}; {rotary_mode} needs a last dim of at most 1024 and a multiple of {_PARTS[rotary_mode]}"
        )
    return _rotated(query, cos, sin, rotary_mode), _rotated(key, cos, sin, rotary_mode)


@kernel("npu_rotary_mul")
def _rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """``r1 * x + r2 * rotate(x)`` of an input of 4 dims (BNSD, BSND or SBND), in its dtype.

    Args:
        r1, r2: cos and sin; broadcast over heads and batch as the documentation lists for each layout.
        rotate: [D, D]; given, rotate(x) is x @ rotate and ``rotary_mode`` is not read.

    Raises:
        RuntimeError: inputs that the documentation forbids.
    """
    op = "npu_rotary_mul"
    seen = f"saw input {input.dtype} {tuple(input.shape)}, r1 {r1.dtype} {tuple(r1.shape)}, r2 {tuple(r2.shape)}"
    if rotary_mode not in ("half", "interleave"):
        reject(op, f"saw rotary_mode {rotary_mode!r}; supported are half, interleave")
    if any(x.dtype not in _FLOATS for x in (input, r1, r2)):
        reject(op, f"{seen}; supported are float16, bfloat16 and float32")
    if not input.dim() == r1.dim() == r2.dim() == 4 or r1.shape != r2.shape:
        reject(op, f"{seen}; all must have 4 dims, r1 and r2 the same shape")
    if input.shape[3] >= 896 or input.shape[3] % 2 or r1.shape[3] != input.shape[3]:
        reject(op, f"{seen}; the last dims must be equal, even and less than 896")
    if not _known_form(input, r1, rotary_mode):
        reject(op, f"{seen}; r1 must spread over heads and batch as documented for {rotary_mode}, with B, N < 1000")
    if rotate is not None:
        if tuple(rotate.shape) != (input.shape[3], input.shape[3]):
            reject(op, f"{seen}, rotate {tuple(rotate.shape)}; rotate must be [D, D]")
        turned = input.float() @ rotate.float()
    else:
        turned = _turned(input.float(), rotary_mode)
    return (r1.float() * input.float() + r2.float() * turned).to(input.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    size = cos.shape[-1]
    head = x[..., :size].float()
    out = torch.empty_like(x)
    out[..., :size] = head * cos.float() + _turned(head, mode) * sin.float()
    out[..., size:] = x[..., size:]
    return out


def _turned(x: Tensor, mode: str) -> Tensor:
    if mode == "interleave":
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    if mode == "quarter":
        x1, x2, x3, x4 = x.chunk(4, -1)
        return torch.cat((-x2, x1, -x4, x3), -1)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((-x2, x1), -1)


def _without(x: Tensor, dim: int) -> tuple[int, ...]:
    return (*x.shape[:dim], *x.shape[dim + 1 :])


def _fits(table: Tensor, query: Tensor, layout: str) -> bool:
    """Whether cos or sin has the query's dims but the last, one head, and the batch of the query or 1."""
    wanted = [1 if dim == _HEADS[layout] else size for dim, size in enumerate(query.shape[:-1])]
    batch = _BATCH.get(layout)
    return all(
        have in ((want, 1) if dim == batch else (want,))
        for dim, (have, want) in enumerate(zip(table.shape, wanted, strict=False))
    )


def _known_form(x: Tensor, r1: Tensor, mode: str) -> bool:
    forms = _HALF_FORMS if mode == "half" else _INTERLEAVE_FORMS
    for full, (batch, heads) in forms:
        few = max(x.shape[batch], x.shape[heads]) if mode == "half" else x.shape[batch] * x.shape[heads]
        if few < 1000 and all(r1.shape[dim] == (x.shape[dim] if dim in full else 1) for dim in range(3)):
            return True
    return False
