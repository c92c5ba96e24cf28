"""Sample calls of every op in cppass.op_rules.RULES, small enough to read, with TOKENS rows somewhere in them.

Traps are on purpose: sizes equal to TOKENS that are no tokens (contracted, reduced or looked-up axes, batches, head
sizes), and products with TOKENS (outer and inner factors). Values are random: equal results mean equal rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

aten, prims = torch.ops.aten, torch.ops.prims

TOKENS = 10  # does not divide by 2P for P = 2 or 3: the last block is padded
T = TOKENS


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One call.

    Attributes:
        op, args, kwargs: the call.
        values: False for ops whose output has a shape, no values (empty_like).
        cautious: (slot, dim) of operands whose rows the rule gathers although local rows would do.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: bool = True
    cautious: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        parts = [_text(a) for a in self.args] + [f"{k}={_text(v)}" for k, v in self.kwargs.items()]
        return f"{self.op.name().removeprefix('aten::')}({', '.join(parts)})"


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(map(_text, value)) + "]"
    return str(value)


_generator = torch.Generator().manual_seed(7)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def sparse(*shape: int) -> Tensor:
    """Booleans, True once in every column of the first dimension of TOKENS rows: any() over some rows misses it."""
    hit = torch.zeros(shape, dtype=torch.bool)
    hit.select(shape.index(T), T - 2).fill_(True)
    return hit


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=_generator)


def call(op: Any, *args: Any, **kwargs: Any) -> Sample:
    return Sample(op, args, kwargs)


def cautiously(sample: Sample, *slots: tuple[int, int]) -> Sample:
    return dataclasses.replace(sample, cautious=slots)


def shapes_only(sample: Sample) -> Sample:
    return dataclasses.replace(sample, values=False)


def _reductions(op: Any, *shape: int) -> list[Sample]:
    """Over the last axis, over the tokens, over both, over everything; with and without keepdim."""
    value = sparse(*shape) if op in (aten.any.dim, aten.all.dim) else x(*shape)
    if op is aten.all.dim:
        value = ~value
    one_dim = op in (aten.any.dim, aten.all.dim, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default)
    one_dim = one_dim or op is aten.prod.dim_int
    dims: list[Any] = [-1, shape.index(T)] if one_dim else [[-1], [shape.index(T)], [-1, shape.index(T)]]
    return [call(op, value, dim, keep) for dim in dims for keep in (False, True)]


SAME = [
    *(call(op, x(2, T, 4)) for op in (aten.clone.default, aten.alias.default, aten.detach.default)),
    *(call(op, x(T, T)) for op in (aten.lift_fresh_copy.default, aten.contiguous.default)),
    call(aten.copy.default, x(2, T, 4), x(2, T, 4)),
    call(aten._to_copy.default, x(2, T, 4), dtype=torch.float32),
    call(prims.convert_element_type.default, x(2, T, 4), torch.float32),
    call(aten.floor_divide.default, ids(50, T, 4), 3),
    call(aten.floor_divide.default, ids(50, 2, T), ids(9, T) + 1),
    call(aten.floor_divide.default, ids(50, T, 1), ids(9, 3) + 1),
    *(shapes_only(call(op, x(2, T, 4))) for op in (aten.empty_like.default,)),
    *(call(op, x(2, T, 4)) for op in (aten.zeros_like.default, aten.ones_like.default)),
    call(aten.full_like.default, x(2, T), 3.5),
]

POINTWISE_BY_TAG = [
    call(aten.add.Tensor, x(2, T, 4), x(4)),
    call(aten.add.Tensor, x(T, 4), x(2, T, 4)),
    call(aten.mul.Tensor, x(2, T, 4), x(T, 1)),
    call(aten.mul.Tensor, x(T, 1), x(1, T)),  # an outer product: either operand carries, never both
    call(aten.add.Tensor, x(T, T), x(T)),
    call(aten.where.self, x(T, 1) > 0, x(4), x(T, 4)),
    call(aten.silu.default, x(2, T, 4)),
    call(aten.pow.Tensor_Scalar, x(T, 4), 2),
    call(aten.clamp.default, x(T, 4), -1, 1),
    call(aten.masked_fill.Scalar, x(T, 4), x(T, 1) > 0, 0.0),
    call(aten.rsqrt.default, x(1, T, 1).abs() + 1),
    call(aten.le.Tensor, x(T, 1), x(1, 6)),
]

AXES = [
    call(aten.view.default, x(2, T, 4), [2 * T, 4]),
    call(aten.view.default, x(2, T, 4), [-1, 4]),
    call(aten.view.default, x(2 * T, 4), [2, T, 4]),
    call(aten.view.default, x(2, T, 4 * T), [2, T, 4, T]),  # head size == tokens
    call(aten.view.default, x(T, T, 4), [T * T, 4]),  # batch == tokens
    call(aten.view.default, x(T, 4), [2, T // 2, 4]),  # cuts the axis
    call(aten.reshape.default, x(T, 3), [T * 3]),
    call(aten.reshape.default, x(T * 3), [T, 3]),
    call(aten._unsafe_view.default, x(2 * T, 4), [2, T, 2, 2]),
    call(aten.transpose.int, x(2, T, 4), 1, 2),
    call(aten.transpose.int, x(2, T, 4), -1, 0),
    call(aten.permute.default, x(2, T, 4), [1, 2, 0]),
    call(aten.permute.default, x(T, 3, T), [-1, 0, 1]),
    call(aten.t.default, x(T, 4)),
    call(aten.t.default, x(T)),
    *(call(aten.unsqueeze.default, x(T, 4), dim) for dim in (0, 1, -1)),
    call(aten.squeeze.dim, x(1, T, 4), 0),
    call(aten.squeeze.dim, x(1, T, 4), 1),  # of another size: nothing goes
    call(aten.squeeze.dims, x(1, T, 1), [0, 2]),
    call(aten.squeeze.default, x(1, T, 1, 4)),
    call(aten.select.int, x(2, T, 4), 0, 1),
    call(aten.select.int, x(2, T, 4), 1, -1),
    call(aten.slice.Tensor, x(2, T, 4), 2, 1, 3),
    call(aten.slice.Tensor, x(2, T, 4), 1, 2, 7),
    call(aten.slice.Tensor, x(2, T, 4), 1, 0, T),  # all of it
    call(aten.slice.Tensor, x(2, T, 4), 1, -T, 2**63 - 1),
    call(aten.slice.Tensor, x(2, T, 4), 1, 0, 2**63 - 1, 2),
    call(aten.expand.default, x(1, T, 4), [3, -1, -1]),
    call(aten.expand.default, x(T, 1), [2, T, 4]),
    call(aten.expand.default, x(T, 1), [T, T]),  # one axis carries, the other repeats
    call(aten.expand.default, x(1, T), [T, T]),
    call(aten.repeat.default, x(T, 4), [1, 3]),
    call(aten.repeat.default, x(T, 4), [2, 1, 1]),
    cautiously(call(aten.repeat.default, x(T, 4), [2, 1]), (0, 0)),  # outer 2 would do
    call(aten.cat.default, [x(T, 4), x(T, 2)], 1),
    call(aten.cat.default, [x(T, 4), x(3, 4)]),
    cautiously(call(aten.cat.default, [x(T, 4), x(T, 4)], 0), (0, 0), (1, 0)),  # outer 2 would do
    call(aten.stack.default, [x(T, 4), x(T, 4)]),
    call(aten.stack.default, [x(T, 4), x(T, 4)], -1),
    call(aten.split.Tensor, x(2, T, 4), 2, -1),
    call(aten.split.Tensor, x(2, T, 4), 5, 1),
    call(aten.split.Tensor, x(T, 4), 5),
    call(aten.split_with_sizes.default, x(2, T, 4), [1, 3], 2),
    call(aten.split_with_sizes.default, x(T, 4), [4, 6]),
    call(aten.unbind.int, x(2, T, 4)),
    call(aten.unbind.int, x(2, T, 3), 1),
    call(aten.constant_pad_nd.default, x(T, 4), [1, 2]),
    call(aten.constant_pad_nd.default, x(T, 4), [0, 0, 0, 3]),
    call(aten.flip.default, x(T, 4), [1]),
    call(aten.flip.default, x(T, 4), [0]),
    call(aten.roll.default, x(T, 4), [1], [1]),
    call(aten.roll.default, x(T, 4), [1], [0]),
    call(aten.roll.default, x(T, 4), [1]),
    call(aten.glu.default, x(T, 4)),
    call(aten.glu.default, x(4, T), 0),
    call(aten.glu.default, x(4, T), 1),
    call(aten.view_as_complex.default, x(2, T, 2)),
    call(aten.view_as_real.default, torch.complex(x(2, T), x(2, T))),
]

USED_UP = [
    *_reductions(aten.mean.dim, 2, T, 4),
    *_reductions(aten.sum.dim_IntList, T, 4),
    call(aten.sum.dim_IntList, x(T, 4), None),
    call(aten.sum.dim_IntList, x(T, T), [1]),
    *_reductions(aten.amax.default, 2, T, 4),
    call(aten.amax.default, x(T, 4)),
    *_reductions(aten.amin.default, 2, T, 4),
    *_reductions(aten.argmax.default, 2, T, 4),
    call(aten.argmax.default, x(T, 4)),
    *_reductions(aten.argmin.default, 2, T, 4),
    *_reductions(aten.any.dim, 2, T, 4),
    *_reductions(aten.all.dim, 2, T, 4),
    *_reductions(aten.max.dim, 2, T, 4),
    *_reductions(aten.min.dim, 2, T, 4),
    *_reductions(aten.prod.dim_int, 2, T, 4),
    call(aten.var.correction, x(2, T, 4), [-1], correction=1, keepdim=True),
    call(aten.var.correction, x(2, T, 4), [1], correction=0),
    *_reductions(aten.logsumexp.default, 2, T, 4),
    call(aten.linalg_vector_norm.default, x(2, T, 4), 2, [-1], True),
    call(aten.linalg_vector_norm.default, x(2, T, 4), 2, [-1]),
    call(aten.linalg_vector_norm.default, x(2, T, 4), 2, [1]),
    call(aten.linalg_vector_norm.default, x(T, 4)),
    *(call(op, x(2, T, 4), dim, False) for op in (aten._softmax.default, aten._log_softmax.default) for dim in (-1, 1)),
    call(aten._softmax.default, x(T, T), -1, False),  # a score matrix: rows carry, columns are mixed
    call(aten._safe_softmax.default, x(2, T, 4), -1),
    call(aten._safe_softmax.default, x(2, T, 4), 1),
    call(aten.cumsum.default, x(T, 4), 1),
    call(aten.cumsum.default, x(T, 4), 0),
    call(aten.cumprod.default, x(T, 4), -1),
    call(aten.cumprod.default, x(T, 4), 0),
    call(aten.topk.default, x(T, 4), 2),
    call(aten.topk.default, x(4, T), 2),
    call(aten.topk.default, x(T, 4), 3, 0),
    call(aten.sort.default, x(T, 4)),
    call(aten.sort.default, x(4, T)),
    call(aten.sort.default, x(T, 4), 0, True),
    call(aten.sort.stable, x(T, 4), stable=True),
    call(aten.sort.stable, x(T, 4), stable=True, dim=0),
    call(aten.gather.default, x(T, 4), 1, ids(4, T, 2)),
    cautiously(call(aten.gather.default, x(T, 4), 0, ids(T, T, 4)), (1, 0)),  # local indices into whole rows would do
    call(aten.gather.default, x(T, 4), 1, ids(4, 3, 2)),  # fewer rows of indices than of values
    call(aten.scatter.src, x(T, 4), 1, ids(4, T, 4), x(T, 4)),
    call(aten.scatter.src, x(T, 4), 0, torch.randperm(T, generator=_generator)[:, None].expand(T, 4), x(T, 4)),
    call(aten.scatter.value, x(T, 4), -1, ids(4, T, 2), 1.0),
    call(aten.scatter.value, x(T, 4), 0, ids(T, 3, 4), 1.0),
    call(aten.native_layer_norm.default, x(2, T, 4), [4], x(4), x(4), 1e-5),
    call(aten.native_layer_norm.default, x(2, T, 4), [4], None, None, 1e-5),
    call(aten.native_layer_norm.default, x(2, T, 4), [T, 4], x(T, 4), None, 1e-5),
    call(aten._fused_rms_norm.default, x(2, T, 4), [4], x(4), 1e-5),
    call(aten._fused_rms_norm.default, x(2, 4, T), [T], x(T), 1e-5),
]

PRODUCTS = [
    call(aten.mm.default, x(T, 4), x(4, 6)),
    call(aten.mm.default, x(4, T), x(T, 6)),  # contracts the tokens
    call(aten.mm.default, x(T, T), x(T, 6)),  # hidden size == tokens
    call(aten.mm.default, x(4, 6), x(6, T)),
    call(aten.bmm.default, x(2, T, 4), x(2, 4, 6)),
    call(aten.bmm.default, x(2, T, 4), x(2, 4, T)),  # scores: rows or columns carry
    call(aten.bmm.default, x(2, 4, T), x(2, T, 6)),
    call(aten.bmm.default, x(T, 1, 4), x(T, 4, 6)),  # batch == tokens
    call(aten.addmm.default, x(6), x(T, 4), x(4, 6)),
    call(aten.addmm.default, x(T, 6), x(T, 4), x(4, 6), beta=2),
    call(aten.addmm.default, x(T), x(T, 4), x(4, T)),
    call(aten.addmm.default, x(T, 1), x(T, T), x(T, 6)),
    call(aten.baddbmm.default, x(2, 1, 6), x(2, T, 4), x(2, 4, 6)),
    call(aten.baddbmm.default, x(2, T, T), x(2, T, 4), x(2, 4, T)),
    call(aten.mv.default, x(T, 4), x(4)),
    call(aten.mv.default, x(4, T), x(T)),
]

LOOK_UPS = [
    call(aten.embedding.default, x(30, 4), ids(30, 2, T)),
    call(aten.embedding.default, x(T, T), ids(T, T)),  # vocabulary == hidden size == tokens
    call(aten.index.Tensor, x(30, 4), [ids(30, T)]),
    call(aten.index.Tensor, x(T, 4), [ids(T, 6)]),
    call(aten.index.Tensor, x(T, 4), [ids(T, T)]),
    call(aten.index.Tensor, x(2, T, 4), [None, None, ids(4, 3)]),
    call(aten.index.Tensor, x(2, T, 4), [ids(2, 3)]),
    call(aten.index.Tensor, x(2, 3, T), [ids(2, 5), None, ids(T, 5)]),  # not adjacent: the looked-up axis comes first
    call(aten.index.Tensor, x(3, T, 5), [ids(3, 6), None, ids(5, 6)]),
    call(aten.index.Tensor, x(3, 5, T), [ids(3, T, 1), ids(5, 6)]),
    call(aten.index.Tensor, x(T, 4), [sparse(T)]),
    call(aten.index_select.default, x(30, 4), 0, ids(30, T)),
    call(aten.index_select.default, x(T, 4), 1, ids(4, 6)),
    call(aten.index_select.default, x(T, 4), 0, ids(T, 6)),
]

# Rows of a local sort are in test_moe_rules.py; here these ops meet plain rows, and refuse them.
EXPERTS = [
    call(aten.histc.default, x(T).float(), 4, 0, 3),
    call(aten._grouped_mm.default, x(T, 16).bfloat16(), x(3, 16, 8).bfloat16(), torch.tensor([4, 7, T]).int()),
    call(aten.index_put.default, x(T, 4), [ids(T, 3)], x(3, 4)),
    call(aten.index_put.default, x(30, 4), [torch.randperm(30, generator=_generator)[:T]], x(T, 4)),
]

SAMPLES = [*SAME, *POINTWISE_BY_TAG, *AXES, *USED_UP, *PRODUCTS, *LOOK_UPS, *EXPERTS]
