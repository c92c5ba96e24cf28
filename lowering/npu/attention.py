"""cppass::fused_attention -> two calls of the op the model calls, one a half.

before:  out, lse = cppass.fused_attention(q [m, N, D], k, v, ..., lengths, P, even, ...)
after:   prev = npu_fused_infer_attention_score(q[:a], k, v, actual_seq_lengths=[..], actual_seq_lengths_kv=[..], ...)
         next = npu_fused_infer_attention_score(q[a : a + b], k, v, ...)
         out, lse = cat([prev[0], next[0]]), cat([prev[1], next[1]])
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from cppass.arithmetic import node_of
from cppass.emitter import Emitter
from cppass.errors import Unsupported
from cppass.fused_op import LSE_DIM, OPS, TOKEN_DIM
from cppass.halves import CAUSAL, HalfCall, half_call
from cppass.layout import Half, Zigzag
from cppass.ops import named_arguments
from cppass.target import Ranks
from lowering.npu.rows import Rows

aten = torch.ops.aten

HALVES: tuple[Half, Half] = (0, 1)

AS_GIVEN = (
    *("block_table", "num_key_value_heads", "pre_tokens", "next_tokens"),
    *("input_layout", "inner_precise", "block_size"),
)


def is_fused(node: fx.Node) -> bool:
    """A call of the op, in any of its forms."""
    return getattr(node.target, "_name", "") in OPS


def fused_attention(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> list[fx.Node]:
    """Output and log-sum-exp (where it is asked for) of this rank's rows; zeros in padding rows."""
    given = named_arguments(node)
    layout = rows.layout(given["lengths"], given["cp_size"], given["even"])
    dim, start, results = TOKEN_DIM[given["input_layout"]], 0, []
    for half in HALVES:
        call = _tensor_call(emit, layout, ranks.rank, half, given) or _list_call(emit, layout, ranks.rank, half, given)
        if is_known(call.rows, 0):
            continue  # the op refuses an empty query
        results.append(call_half(emit, rows, given, call, start, dim))
        start = start + call.rows
    return _results(emit, results, layout, ranks, given)


def fused_attention_in_one_call(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> list[fx.Node]:
    """The same by one call: every sequence is in it twice, with its prev and with its next block.

    after:   out, lse = npu_fused_infer_attention_score(q[: a + b], k, v, block_table=cat([table, table]),
                 actual_seq_lengths=[.., a, .., a + b], actual_seq_lengths_kv=[prev's, then next's], ...)
    """
    given = named_arguments(node)
    check_one_call(node, given)
    layout = rows.layout(given["lengths"], given["cp_size"], given["even"])
    halves = [(_list_call(emit, layout, ranks.rank, half, given), given) for half in HALVES]
    call, both = one_call(emit, rows, halves)
    return _results(emit, [call_half(emit, rows, both, call, 0, 0)], layout, ranks, given)


def _results(
    emit: Emitter, calls: list[list[fx.Node]], layout: Zigzag, ranks: Ranks, given: dict[str, Any]
) -> list[fx.Node]:
    """Output and log-sum-exp of all rows, from those of the calls."""
    dims = (TOKEN_DIM[given["input_layout"]], LSE_DIM[given["input_layout"]])
    parts = zip(*calls, strict=True)
    return [joined(emit, list(part), dim, layout, ranks.rank) for part, dim in zip(parts, dims, strict=False)]


def check_one_call(node: fx.Node, given: dict[str, Any]) -> None:
    """Raises Unsupported: CP508, keys and values of a sequence cannot be named twice."""
    paged = given["block_table"] is not None and isinstance(given["q_lengths"], (list, tuple))
    if given["input_layout"] != "TND" or not paged:
        raise Unsupported(
            "CP508",
            f"attention_calls=1 takes a paged cache in TND with lists of lengths; {node.name} has "
            f"{given['input_layout']}{'' if paged else ' without them'}",
            "leave attention_calls at its default, 2",
        )


def one_call(
    emit: Emitter, rows: Rows, halves: list[tuple[HalfCall, dict[str, Any]]]
) -> tuple[HalfCall, dict[str, Any]]:
    """Both halves as one call over 2 x sequences, and the operands it is made with."""
    (prev, given), (after, given_after) = halves
    assert isinstance(prev.q_lengths, list) and isinstance(after.q_lengths, list)
    tables = [given["block_table"], given_after["block_table"]]
    table = rows.once(("both halves", *tables), lambda: emit(aten.cat.default, tables, 0))
    call = dataclasses.replace(
        prev,
        rows=prev.rows + after.rows,
        q_lengths=[*prev.q_lengths, *(prev.rows + n for n in after.q_lengths)],
        kv_lengths=[*(prev.kv_lengths or ()), *(after.kv_lengths or ())],
    )
    return call, given | {"block_table": table}


def is_known(number: Any, value: int) -> bool:
    return isinstance(number, int) and number == value


def _list_call(emit: Emitter, layout: Zigzag, rank: int, half: Half, given: dict[str, Any]) -> HalfCall:
    numbers = emit.numbers
    paged = given["block_table"] is not None
    return half_call(
        layout,
        rank,
        half,
        input_layout=given["input_layout"],
        paged=paged,
        q_lengths=None if given["q_lengths"] is None else [numbers(n) for n in given["q_lengths"]],
        kv_lengths=None if given["kv_lengths"] is None else [numbers(n) for n in given["kv_lengths"]],
        kv_rows=None if paged else numbers(emit.size(given["k"], TOKEN_DIM[given["input_layout"]])),
        sparse_mode=given["sparse_mode"],
    )


def _tensor_call(emit: Emitter, layout: Zigzag, rank: int, half: Half, given: dict[str, Any]) -> HalfCall | None:
    """Lengths in tensors, the token axis cut as one sequence: a half may cut through any sequence, or miss it.

    A sequence's queries are those of its rows that the half holds; its keys end where the half does, if rows do not see
    later ones.
    """
    ends, keys = given["q_tensor"], given["kv_tensor"]
    if ends is None:
        return None
    (count,), (last,) = layout.half_rows(rank, half), layout.half_ends(rank, half)
    first = node_of(last - count)
    own = emit(aten.sub.Tensor, emit(aten.clamp.default, ends, first, node_of(last)), first)
    mode = given["sparse_mode"]
    if mode in CAUSAL:
        starts = emit(aten.constant_pad_nd.default, emit(aten.slice.Tensor, ends, 0, 0, -1), [1, 0])
        behind = [emit(aten.clamp.default, emit(aten.sub.Tensor, x, node_of(last)), 0) for x in (ends, starts)]
        seen = emit(aten.sub.Tensor, keys, emit(aten.sub.Tensor, *behind))
        keys = emit(aten.clamp.default, seen, 1)  # at least one, of a sequence without a query here
    return HalfCall(count, own, keys, None, CAUSAL.get(mode, mode))  # type: ignore[arg-type]


def call_half(emit: Emitter, rows: Rows, given: dict[str, Any], call: HalfCall, start: Any, dim: int) -> list[fx.Node]:
    """Output and log-sum-exp (where it is asked for) of the query rows from `start` on."""
    end = start + call.rows
    query = _dense(emit, emit(aten.slice.Tensor, given["q"], dim, node_of(start), node_of(end)))
    key, value = (_seen(emit, rows, given[x], call) for x in ("k", "v"))
    mask = given["mask"]
    if mask is not None and given["sparse_mode"] in (0, 1):
        at = mask.meta["val"].dim() - 2
        mask = _dense(emit, emit(aten.slice.Tensor, mask, at, node_of(start), node_of(end)))
    op = _op(given["op"])
    names = OPS[op._name]
    options = {
        "atten_mask": mask,
        names["q_lengths"]: _plain(call.q_lengths),
        names["kv_lengths"]: _plain(call.kv_lengths),
        **{name: given[name] for name in AS_GIVEN},
        "sparse_mode": call.sparse_mode,
        **{names[field]: given[field] for field in ("num_heads", "scale", "lse", "sink") if field in names},
    }
    result = emit(op, query, key, value, **{k: v for k, v in options.items() if v is not None})
    return [emit(operator.getitem, result, i) for i in range(2 if given["lse"] else 1)]


def _op(name: str) -> Any:
    """The overload of "npu.npu_fused_infer_attention_score_v2.default"."""
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _plain(lengths: Any) -> Any:
    return [node_of(n) for n in lengths] if isinstance(lengths, list) else lengths


def _seen(emit: Emitter, rows: Rows, x: fx.Node, call: HalfCall) -> fx.Node:
    """Packed keys or values: the rows that this half's queries may see, one sequence after the other."""
    if call.kv_spans is None:
        return _dense(emit, x)
    if len(call.kv_spans) == 1:
        first, count = call.kv_spans[0]
        return _dense(emit, emit(aten.slice.Tensor, x, 0, node_of(first), node_of(first + count)))
    return emit(aten.index_select.default, x, 0, rows.spans(call.kv_spans))


def _dense(emit: Emitter, x: fx.Node) -> fx.Node:
    """The op takes contiguous operands."""
    if x.meta["val"].is_contiguous():
        return x
    return emit(aten.clone.default, x, memory_format=torch.contiguous_format)


def joined(emit: Emitter, halves: list[fx.Node], dim: int, layout: Zigzag, rank: int) -> fx.Node:
    """The halves one after the other, then zeros in the padding rows.

    Where it is not known how many those are, as many as there may be are added and what is too much is cut off, since a
    size that may be 0 would get graphs of its own: all local rows of a bucket, else one row a sequence.
    """
    first = halves[0].meta["val"]
    padding = layout.local_rows - layout.real_rows(rank) if isinstance(layout.local_rows, int) else None
    known = layout.even or isinstance(padding, int)
    if not known:
        padding = len(layout.lengths) if layout.rows is None else node_of(layout.local_rows)
    if not layout.even and not is_known(padding, 0):
        sizes = [emit.size(halves[0], d) if d != dim else padding for d in range(first.dim())]
        halves = [*halves, emit(aten.full.default, sizes, 0, dtype=first.dtype, device=first.device)]
    whole = halves[0] if len(halves) == 1 else emit(aten.cat.default, halves, dim)
    return whole if known else emit(aten.slice.Tensor, whole, dim, 0, node_of(layout.local_rows))
