"""Canonical ops of sharded inputs -> one all-gather, two calls a site, rows fetched from their owners.

Halves of balanced blocks have room for m / 2 rows each, so nothing in the graph has a size that depends on a batch: the
padding rows of a half are one more sequence of the call, over pages that hold anything, and their results are rows that
nothing reads. With remainder "first" the halves lie one behind the other, and are cut where the lengths say.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import fx

from cppass.arithmetic import node_of
from cppass.emitter import Emitter
from cppass.halves import HalfCall, half_call
from cppass.layout import Half, Zigzag
from cppass.ops import named_arguments
from cppass.sharded_ops import layout_of
from cppass.target import Ranks
from lowering.npu.attention import HALVES, call_half, check_one_call, is_known, joined, one_call
from lowering.npu.moves import fetched
from lowering.npu.rows import Rows
from lowering.npu.tables import half_keys, row_homes

aten = torch.ops.aten


def gather_sharded(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> list[fx.Node]:
    """One all-gather of all values, side by side in a row.

    before:  k [m, G, D], v [m, G, D]      after:  all_gather([m, 2 * G * D]) -> k [P * m, G, D], v [P * m, G, D]
    """
    xs = named_arguments(node)["xs"]
    flat = [emit(aten.reshape.default, x, [emit.size(x, 0), -1]) for x in xs]
    gathered = emit.all_gather(flat[0] if len(flat) == 1 else emit(aten.cat.default, flat, 1), ranks)
    start: Any = 0
    results = []
    for x, part in zip(xs, flat, strict=True):
        width = emit.numbers(emit.size(part, 1))
        own = gathered
        if len(flat) > 1:
            own = emit(aten.slice.Tensor, gathered, 1, node_of(start), node_of(start + width))
        start = start + width
        sizes = [emit.size(x, d) for d in range(1, x.meta["val"].dim())]
        results.append(emit(aten.reshape.default, own, [emit.size(gathered, 0), *sizes]))
    return results


def look_up_sharded(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> fx.Node:
    """The rows that `index` names, from the ranks that own them."""
    given = named_arguments(node)
    x, index = given["x"], given["index"]
    layout = _layout(emit, given, emit.size(x, 0))
    owner, row = row_homes(emit, rows, layout, index)
    return fetched(emit, rows, x, owner, row, ranks)


def fused_attention_sharded(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> list[fx.Node]:
    """Output and log-sum-exp (where it is asked for) of this rank's rows."""
    given = named_arguments(node) | {"input_layout": "TND"}
    layout = _layout(emit, given, emit.size(given["q"], 0))
    start: Any = 0
    results = []
    for half in HALVES:
        call, here = _half(emit, rows, layout, ranks.rank, half, given)
        if is_known(call.rows, 0):
            continue  # the op refuses an empty query
        results.append(call_half(emit, rows, here, call, start, 0))
        start = start + call.rows
    return _joined(emit, results, layout, ranks)


def fused_attention_sharded_in_one_call(emit: Emitter, rows: Rows, node: fx.Node, ranks: Ranks) -> list[fx.Node]:
    """The same by one call over 2 x sequences, their padding as further ones."""
    given = named_arguments(node) | {"input_layout": "TND"}
    check_one_call(node, given)
    layout = _layout(emit, given, emit.size(given["q"], 0))
    halves = [_half(emit, rows, layout, ranks.rank, half, given) for half in HALVES]
    call, both = one_call(emit, rows, halves)
    return _joined(emit, [call_half(emit, rows, both, call, 0, 0)], layout, ranks)


def _joined(emit: Emitter, results: list[list[fx.Node]], layout: Zigzag, ranks: Ranks) -> list[fx.Node]:
    if layout.remainder == "balanced":
        parts = zip(*results, strict=True)
        return [part[0] if len(part) == 1 else emit(aten.cat.default, list(part), 0) for part in parts]
    return [joined(emit, list(part), 0, layout, ranks.rank) for part in zip(*results, strict=True)]


def _layout(emit: Emitter, given: dict[str, Any], rows: Any) -> Zigzag:
    ends = [emit.numbers(n) for n in given["q_lengths"]]
    return layout_of(ends, given["cp_size"], given["remainder"], emit.numbers(rows))


def _half(
    emit: Emitter, rows: Rows, layout: Zigzag, rank: int, half: Half, given: dict[str, Any]
) -> tuple[HalfCall, dict[str, Any]]:
    """The call of one half, and the operands it is made with."""
    paged = given["block_table"] is not None
    kv_lengths = [emit.numbers(n) for n in given["kv_lengths"]]
    options = {"input_layout": "TND", "q_lengths": None, "kv_rows": None, "sparse_mode": given["sparse_mode"]}
    call = half_call(layout, rank, half, paged=paged, kv_lengths=kv_lengths, **options)
    here = dict(given)
    keys: Any = None
    if paged:
        call = dataclasses.replace(call, kv_lengths=[_at_least_one(n) for n in call.kv_lengths or ()])
    else:
        starts = [0, *kv_lengths[:-1]]
        whole = [(start, end - start) for start, end in zip(starts, kv_lengths, strict=True)]
        spans = [(first, _at_least_one(count)) for first, count in call.kv_spans or whole]
        index = half_keys(emit, rows, layout, spans)
        here |= {name: emit(aten.index_select.default, given[name], 0, index) for name in ("k", "v")}
        keys = emit.numbers(emit.size(index, 0))
        call = dataclasses.replace(
            call, kv_spans=None, kv_lengths=list(itertools.accumulate(count for _, count in spans))
        )
    if layout.remainder == "first" and paged:
        return call, here
    return _with_padding(emit, rows, layout, call, here, keys)


def _at_least_one(keys: Any) -> Any:
    """A sequence that has no row in this half may have no key either, and the op does not document none."""
    return keys + 1 // (keys + 1)


def _with_padding(
    emit: Emitter, rows: Rows, layout: Zigzag, call: HalfCall, given: dict[str, Any], keys: Any
) -> tuple[HalfCall, dict[str, Any]]:
    """One more sequence: the padding rows of a half, over as many keys and one more, since none is not documented.

    before:  q [3, 5], kv [40, 12]         after, in a half of 8 rows:  q [3, 5, 8], kv [40, 12, 4]
    """
    assert call.q_lengths is not None and call.kv_lengths is not None
    size = layout.local_rows // 2 if layout.remainder == "balanced" else call.rows
    padding = size - call.q_lengths[-1]
    last = keys if keys is not None else padding + 1
    table = given["block_table"]
    if table is not None:
        given = given | {"block_table": _padded_table(emit, rows, table, size, given["block_size"])}
    call = dataclasses.replace(call, rows=size, q_lengths=[*call.q_lengths, size], kv_lengths=[*call.kv_lengths, last])
    return call, given


def _padded_table(emit: Emitter, rows: Rows, table: fx.Node, size: Any, block_size: int) -> fx.Node:
    """A row more, of page 0, and as many columns as a half full of padding needs."""
    width = emit.size(table, 1)
    if isinstance(size, int) and isinstance(width, int):
        more: Any = max(0, -(-(size + 1) // block_size) - width)
    else:
        more = node_of((emit.numbers(node_of(size)) + block_size) // block_size)  # at least so many

    def make() -> fx.Node:
        wide = _with_zeros(emit, table, 1, more) if more != 0 else table
        return _with_zeros(emit, wide, 0, 1)

    return rows.once(("padded table", table, more), make)


def _with_zeros(emit: Emitter, x: fx.Node, dim: int, more: Any) -> fx.Node:
    """[.., n, ..] -> [.., n + more, ..]. No constant_pad_nd: GE converts it with known sizes alone."""
    sizes = [more if d == dim else emit.size(x, d) for d in range(x.meta["val"].dim())]
    value = x.meta["val"]
    zeros = emit(aten.full.default, sizes, 0, dtype=value.dtype, device=value.device)
    return emit(aten.cat.default, [x, zeros], dim)
