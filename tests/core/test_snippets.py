"""run_pass on snippets: the graph before and after, as text; and what is left alone or not accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.snippets import SNIPPETS, causal, qkv, traced
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.graph_text import graph_text
from cppass.ops import CANONICAL

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def rewritten(gm: fx.GraphModule, inputs: Any, **options: Any) -> str:
    """The canonical graph for two ranks."""
    report = cppass.run_pass(gm, inputs, cp_size=2, lower=False, **options)
    assert report.status == "rewritten"
    return graph_text(gm.graph)


def test_causal() -> None:
    gm = traced(SNIPPETS["causal"], 8)
    assert_expected_inline(
        graph_text(gm.graph),
        """\
flash_for_cpu = aten.flash_for_cpu(q_1, k_1, v_1, 0.0, True)
getitem[1, 4, 8, 8] = getitem(flash_for_cpu, 0)
getitem_1[1, 4, 8] = getitem(flash_for_cpu, 1)
return getitem
""",
    )
    assert_expected_inline(
        rewritten(gm, qkv(8)),
        """\
shard[1, 4, 4, 8] = cppass.shard(q_1, 2, 1, [8], 2, True)
shard_1[1, 4, 4, 8] = cppass.shard(k_1, 2, 1, [8], 2, True)
shard_2[1, 4, 4, 8] = cppass.shard(v_1, 2, 1, [8], 2, True)
gather = cppass.gather([shard_1, shard_2], [2, 2], [1, 1], [8], 2, True, True)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
attention[1, 4, 4, 8] = cppass.attention(shard, getitem, getitem_1, None, None, 0, [8], 2, True, True, 0, None)
gather_1 = cppass.gather([attention], [2], [1], [8], 2, True, True)
getitem_2[1, 4, 8, 8] = getitem(gather_1, 0)
clone[1, 4, 8, 8] = aten.clone(getitem_2, memory_format=torch.contiguous_format)
return clone
""",
    )


def test_cache_with_a_length() -> None:
    """The mask is read as causal behind n rows and goes; the writes stay, on gathered rows."""
    snippet = SNIPPETS["cache"]
    gm = traced(snippet, 8)
    assert_expected_inline(
        graph_text(gm.graph),
        """\
arange[8] = aten.arange(8)
add[8] = aten.add.Tensor(arange, n_1)
index_copy[1, 4, 13, 8] = aten.index_copy(kc_1, 2, add, k_1)
index_copy_1[1, 4, 13, 8] = aten.index_copy(vc_1, 2, add, v_1)
arange_1[13] = aten.arange(13)
arange_2[8] = aten.arange(8)
add_1[8] = aten.add.Tensor(arange_2, n_1)
unsqueeze[8, 1] = aten.unsqueeze(add_1, 1)
le[8, 13] = aten.le.Tensor(arange_1, unsqueeze)
scalar_tensor[] = aten.scalar_tensor(-inf, dtype=torch.float32)
scalar_tensor_1[] = aten.scalar_tensor(0.0, dtype=torch.float32)
where[8, 13] = aten.where.self(le, scalar_tensor_1, scalar_tensor)
flash_for_cpu = aten.flash_for_cpu(q_1, index_copy, index_copy_1, attn_mask=where)
getitem[1, 4, 8, 8] = getitem(flash_for_cpu, 0)
getitem_1[1, 4, 8] = getitem(flash_for_cpu, 1)
return [getitem, index_copy, index_copy_1]
""",
    )
    assert_expected_inline(
        rewritten(gm, snippet.inputs(8)),
        """\
arange[8] = aten.arange(8)
add[8] = aten.add.Tensor(arange, n_1)
gathered_order[8] = cppass.gathered_order(add, [8], 2, True)
shard[1, 4, 4, 8] = cppass.shard(k_1, 2, 1, [8], 2, True)
shard_1[1, 4, 4, 8] = cppass.shard(v_1, 2, 1, [8], 2, True)
gather = cppass.gather([shard, shard_1], [2, 2], [1, 1], [8], 2, True, False)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
index_copy[1, 4, 13, 8] = aten.index_copy(kc_1, 2, gathered_order, getitem)
index_copy_1[1, 4, 13, 8] = aten.index_copy(vc_1, 2, gathered_order, getitem_1)
shard_2[1, 4, 4, 8] = cppass.shard(q_1, 2, 1, [8], 2, True)
attention[1, 4, 4, 8] = cppass.attention(shard_2, index_copy, index_copy_1, None, n_1, 0, [8], 2, True, True, 0, None)
gather_1 = cppass.gather([attention], [2], [1], [8], 2, True, True)
getitem_2[1, 4, 8, 8] = getitem(gather_1, 0)
clone[1, 4, 8, 8] = aten.clone(getitem_2, memory_format=torch.contiguous_format)
return [clone, index_copy, index_copy_1]
""",
    )


def test_in_place_writes_become_copies() -> None:
    """before: kc.index_copy_(2, at, k)        after: kc.copy_(index_copy(kc, 2, at, gathered k))"""
    snippet = SNIPPETS["cache, in place"]
    gm = traced(snippet, 8)
    assert "index_copy_(" in graph_text(gm.graph)
    assert_expected_inline(
        rewritten(gm, snippet.inputs(8)),
        """\
arange[8] = aten.arange(8)
add[8] = aten.add.Tensor(arange, n_1)
gathered_order[8] = cppass.gathered_order(add, [8], 2, True)
shard[1, 4, 4, 8] = cppass.shard(k_1, 2, 1, [8], 2, True)
shard_1[1, 4, 4, 8] = cppass.shard(v_1, 2, 1, [8], 2, True)
gather = cppass.gather([shard, shard_1], [2, 2], [1, 1], [8], 2, True, False)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
index_copy[1, 4, 13, 8] = aten.index_copy(kc_1, 2, gathered_order, getitem)
index_copy_1[1, 4, 13, 8] = aten.index_copy(vc_1, 2, gathered_order, getitem_1)
shard_2[1, 4, 4, 8] = cppass.shard(q_1, 2, 1, [8], 2, True)
attention[1, 4, 4, 8] = cppass.attention(shard_2, index_copy, index_copy_1, None, n_1, 0, [8], 2, True, True, 0, None)
copy_[1, 4, 13, 8] = aten.copy_(kc_1, index_copy)
copy__1[1, 4, 13, 8] = aten.copy_(vc_1, index_copy_1)
gather_1 = cppass.gather([attention], [2], [1], [8], 2, True, True)
getitem_2[1, 4, 8, 8] = getitem(gather_1, 0)
clone[1, 4, 8, 8] = aten.clone(getitem_2, memory_format=torch.contiguous_format)
return clone
""",
    )


def test_a_mask_of_data_is_built_for_local_rows() -> None:
    snippet = SNIPPETS["padding mask"]
    assert_expected_inline(
        rewritten(traced(snippet, 8), snippet.inputs(8)),
        """\
arange[8] = aten.arange(8)
shard[4] = cppass.shard(arange, 0, 1, [8], 2, True)
add[4] = aten.add.Tensor(shard, 0)
unsqueeze[4, 1] = aten.unsqueeze(add, 1)
le[4, 8] = aten.le.Tensor(arange, unsqueeze)
bitwise_and[4, 8] = aten.bitwise_and.Tensor(le, pad_1)
scalar_tensor[] = aten.scalar_tensor(-inf, dtype=torch.float32)
scalar_tensor_1[] = aten.scalar_tensor(0.0, dtype=torch.float32)
where[4, 8] = aten.where.self(bitwise_and, scalar_tensor_1, scalar_tensor)
shard_1[1, 4, 4, 8] = cppass.shard(q_1, 2, 1, [8], 2, True)
shard_2[1, 4, 4, 8] = cppass.shard(k_1, 2, 1, [8], 2, True)
shard_3[1, 4, 4, 8] = cppass.shard(v_1, 2, 1, [8], 2, True)
gather = cppass.gather([shard_2, shard_3], [2, 2], [1, 1], [8], 2, True, True)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
attention[1, 4, 4, 8] = cppass.attention(shard_1, getitem, getitem_1, where, None, 0, [8], 2, True, False, 0, None)
gather_1 = cppass.gather([attention], [2], [1], [8], 2, True, True)
getitem_2[1, 4, 8, 8] = getitem(gather_1, 0)
clone[1, 4, 8, 8] = aten.clone(getitem_2, memory_format=torch.contiguous_format)
return clone
""",
    )


def test_written_out_attention_runs_row_by_row() -> None:
    snippet = SNIPPETS["written out"]
    assert_expected_inline(
        rewritten(traced(snippet, 8), snippet.inputs(8)),
        """\
transpose[1, 4, 8, 8] = aten.transpose.int(k_1, 2, 3)
shard[1, 4, 4, 8] = cppass.shard(q_1, 2, 1, [8], 2, True)
expand[1, 4, 4, 8] = aten.expand(shard, [1, 4, 4, 8])
reshape[4, 4, 8] = aten.reshape(expand, [4, 4, 8])
expand_1[1, 4, 8, 8] = aten.expand(transpose, [1, 4, 8, 8])
view[4, 8, 8] = aten.view(expand_1, [4, 8, 8])
bmm[4, 4, 8] = aten.bmm(reshape, view)
reshape_1[1, 4, 4, 8] = aten.reshape(bmm, [1, 4, 4, 8])
tanh[1, 4, 4, 8] = aten.tanh(reshape_1)
mul[1, 4, 4, 8] = aten.mul.Tensor(tanh, 5)
arange[8] = aten.arange(8)
add[8] = aten.add.Tensor(arange, 0)
unsqueeze[8, 1] = aten.unsqueeze(add, 1)
le[8, 8] = aten.le.Tensor(arange, unsqueeze)
shard_1[4, 8] = cppass.shard(le, 0, 1, [8], 2, True)
scalar_tensor[] = aten.scalar_tensor(-inf, dtype=torch.float32)
where[1, 4, 4, 8] = aten.where.self(shard_1, mul, scalar_tensor)
_softmax[1, 4, 4, 8] = aten._softmax(where, -1, False)
expand_2[1, 4, 4, 8] = aten.expand(_softmax, [1, 4, 4, 8])
reshape_2[4, 4, 8] = aten.reshape(expand_2, [4, 4, 8])
expand_3[1, 4, 8, 8] = aten.expand(v_1, [1, 4, 8, 8])
view_1[4, 8, 8] = aten.view(expand_3, [4, 8, 8])
bmm_1[4, 4, 8] = aten.bmm(reshape_2, view_1)
reshape_3[1, 4, 4, 8] = aten.reshape(bmm_1, [1, 4, 4, 8])
gather = cppass.gather([reshape_3], [2], [1], [8], 2, True, True)
getitem[1, 4, 8, 8] = getitem(gather, 0)
clone[1, 4, 8, 8] = aten.clone(getitem, memory_format=torch.contiguous_format)
gather_1 = cppass.gather([_softmax], [2], [1], [8], 2, True, True)
getitem_1[1, 4, 8, 8] = getitem(gather_1, 0)
clone_1[1, 4, 8, 8] = aten.clone(getitem_1, memory_format=torch.contiguous_format)
return [clone, clone_1]
""",
    )


def test_a_layer_sends_its_last_token_only() -> None:
    snippet = SNIPPETS["a layer"]
    assert_expected_inline(
        rewritten(traced(snippet, 8), snippet.inputs(8)),
        """\
slice[32, 32] = aten.slice.Tensor(w_1, 1, 0, 32)
shard[1, 4, 32] = cppass.shard(x_1, 1, 1, [8], 2, True)
reshape[4, 32] = aten.reshape(shard, [4, 32])
mm[4, 32] = aten.mm(reshape, slice)
reshape_1[1, 4, 32] = aten.reshape(mm, [1, 4, 32])
reshape_2[1, 4, 4, 8] = aten.reshape(reshape_1, [1, 4, 4, 8])
transpose[1, 4, 4, 8] = aten.transpose.int(reshape_2, 1, 2)
slice_1[32, 32] = aten.slice.Tensor(w_1, 1, 32, 64)
mm_1[4, 32] = aten.mm(reshape, slice_1)
reshape_3[1, 4, 32] = aten.reshape(mm_1, [1, 4, 32])
reshape_4[1, 4, 4, 8] = aten.reshape(reshape_3, [1, 4, 4, 8])
transpose_1[1, 4, 4, 8] = aten.transpose.int(reshape_4, 1, 2)
slice_2[32, 32] = aten.slice.Tensor(w_1, 1, 64, 96)
mm_2[4, 32] = aten.mm(reshape, slice_2)
reshape_5[1, 4, 32] = aten.reshape(mm_2, [1, 4, 32])
reshape_6[1, 4, 4, 8] = aten.reshape(reshape_5, [1, 4, 4, 8])
transpose_2[1, 4, 4, 8] = aten.transpose.int(reshape_6, 1, 2)
arange[8] = aten.arange(8)
add[8] = aten.add.Tensor(arange, n_1)
gathered_order[8] = cppass.gathered_order(add, [8], 2, True)
gather = cppass.gather([transpose_1, transpose_2], [2, 2], [1, 1], [8], 2, True, False)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
index_copy[1, 4, 13, 8] = aten.index_copy(kc_1, 2, gathered_order, getitem)
index_copy_1[1, 4, 13, 8] = aten.index_copy(vc_1, 2, gathered_order, getitem_1)
attention[1, 4, 4, 8] = cppass.attention(transpose, index_copy, index_copy_1, None, n_1, 0, [8], 2, True, True, 0, None)
transpose_3[1, 4, 4, 8] = aten.transpose.int(attention, 1, 2)
reshape_7[1, 4, 32] = aten.reshape(transpose_3, [1, 4, 32])
slice_3[32, 32] = aten.slice.Tensor(w_1, 1, 96, 9223372036854775807)
reshape_8[4, 32] = aten.reshape(reshape_7, [4, 32])
mm_3[4, 32] = aten.mm(reshape_8, slice_3)
reshape_9[1, 4, 32] = aten.reshape(mm_3, [1, 4, 32])
add_1[1, 4, 32] = aten.add.Tensor(shard, reshape_9)
gather_rows[1, 1, 32] = cppass.gather_rows(add_1, 1, -1, 1, [8], 2, True)
select[1, 32] = aten.select.int(gather_rows, 1, 0)
copy_[1, 4, 13, 8] = aten.copy_(kc_1, index_copy)
copy__1[1, 4, 13, 8] = aten.copy_(vc_1, index_copy_1)
return select
""",
    )


def test_experts_sort_their_own_rows() -> None:
    """Between the sort and its inverse everything is local; `ends`, an output, is counted again over all tokens."""
    snippet = SNIPPETS["experts"]
    assert_expected_inline(
        rewritten(traced(snippet, 8), snippet.inputs(8)),
        """\
shard[1, 4, 4, 8] = cppass.shard(q_1, 2, 1, [8], 2, True)
shard_1[1, 4, 4, 8] = cppass.shard(k_1, 2, 1, [8], 2, True)
shard_2[1, 4, 4, 8] = cppass.shard(v_1, 2, 1, [8], 2, True)
gather = cppass.gather([shard_1, shard_2], [2, 2], [1, 1], [8], 2, True, True)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
attention[1, 4, 4, 8] = cppass.attention(shard, getitem, getitem_1, None, None, 0, [8], 2, True, True, 0, None)
transpose[1, 4, 4, 8] = aten.transpose.int(attention, 1, 2)
clone[1, 4, 4, 8] = aten.clone(transpose, memory_format=torch.contiguous_format)
reshape[4, 32] = aten.reshape(clone, [4, 32])
mm[4, 4] = aten.mm(reshape, router_1)
_softmax[4, 4] = aten._softmax(mm, -1, False)
topk = aten.topk(_softmax, 2)
getitem_2[4, 2] = getitem(topk, 0)
getitem_3[4, 2] = getitem(topk, 1)
reshape_1[8] = aten.reshape(getitem_3, [-1])
gather_1 = cppass.gather([reshape_1], [0], [2], [8], 2, True, True)
getitem_4[16] = getitem(gather_1, 0)
sort = aten.sort(getitem_4)
sort_1 = aten.sort(reshape_1)
getitem_5[16] = getitem(sort, 0)
getitem_6[8] = getitem(sort_1, 0)
getitem_7[8] = getitem(sort_1, 1)
floor_divide[8] = aten.floor_divide(getitem_7, 2)
index[8, 32] = aten.index.Tensor(reshape, [floor_divide])
_to_copy[16] = aten._to_copy(getitem_5, dtype=torch.float32)
_to_copy_1[8] = aten._to_copy(getitem_6, dtype=torch.float32)
histc[4] = aten.histc(_to_copy, 4, 0, 3)
histc_1[4] = aten.histc(_to_copy_1, 4, 0, 3)
cumsum[4] = aten.cumsum(histc, 0, dtype=torch.int32)
cumsum_1[4] = aten.cumsum(histc_1, 0, dtype=torch.int32)
_to_copy_2[8, 32] = aten._to_copy(index, dtype=torch.bfloat16)
_to_copy_3[4, 32, 16] = aten._to_copy(up_1, dtype=torch.bfloat16)
_grouped_mm[8, 16] = aten._grouped_mm(_to_copy_2, _to_copy_3, cumsum_1)
_to_copy_4[8, 16] = aten._to_copy(_grouped_mm, dtype=torch.float32)
silu[8, 16] = aten.silu(_to_copy_4)
_to_copy_5[8, 16] = aten._to_copy(silu, dtype=torch.bfloat16)
_to_copy_6[4, 16, 32] = aten._to_copy(down_1, dtype=torch.bfloat16)
_grouped_mm_1[8, 32] = aten._grouped_mm(_to_copy_5, _to_copy_6, cumsum_1)
_to_copy_7[8, 32] = aten._to_copy(_grouped_mm_1, dtype=torch.float32)
reshape_2[8] = aten.reshape(getitem_2, [-1])
index_1[8] = aten.index.Tensor(reshape_2, [getitem_7])
unsqueeze[8, 1] = aten.unsqueeze(index_1, 1)
mul[8, 32] = aten.mul.Tensor(_to_copy_7, unsqueeze)
empty_like[8] = aten.empty_like(getitem_7)
arange[8] = aten.arange(8)
index_put[8] = aten.index_put(empty_like, [getitem_7], arange)
index_2[8, 32] = aten.index.Tensor(mul, [index_put])
reshape_3[4, 2, 32] = aten.reshape(index_2, [-1, 2, 32])
sum[4, 32] = aten.sum.dim_IntList(reshape_3, [1])
add[4, 32] = aten.add.Tensor(reshape, sum)
gather_2 = cppass.gather([add], [0], [1], [8], 2, True, True)
getitem_8[8, 32] = getitem(gather_2, 0)
return [getitem_8, cumsum]
""",
    )


# -- graphs as callers have them -------------------------------------------------------------------------------------


def bare_graph() -> fx.GraphModule:
    """Written by hand: no metadata on any node."""
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    graph.output(graph.call_function(aten.scaled_dot_product_attention.default, (q, k, v, None, 0.0, True)))
    return fx.GraphModule({}, graph)


def nested_graph(layers: int = 2) -> fx.GraphModule:
    inner = traced(SNIPPETS["causal"], 8)
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    for _ in range(layers):
        q = graph.call_module("layer", (q, k, v))
    graph.output(q)
    return fx.GraphModule({"layer": inner}, graph)


def test_a_graph_without_metadata() -> None:
    gm = bare_graph()
    assert_expected_inline(
        rewritten(gm, qkv(8)),
        """\
shard[1, 4, 4, 8] = cppass.shard(q, 2, 1, [8], 2, True)
shard_1[1, 4, 4, 8] = cppass.shard(k, 2, 1, [8], 2, True)
shard_2[1, 4, 4, 8] = cppass.shard(v, 2, 1, [8], 2, True)
gather = cppass.gather([shard_1, shard_2], [2, 2], [1, 1], [8], 2, True, True)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
attention[1, 4, 4, 8] = cppass.attention(shard, getitem, getitem_1, None, None, 0, [8], 2, True, True, 0, None)
gather_1 = cppass.gather([attention], [2], [1], [8], 2, True, True)
getitem_2[1, 4, 8, 8] = getitem(gather_1, 0)
clone[1, 4, 8, 8] = aten.clone(getitem_2, memory_format=torch.contiguous_format)
return clone
""",
    )
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["q", "k", "v"]


def test_nested_modules_are_inlined() -> None:
    """Two layers share k and v: they travel once."""
    assert_expected_inline(
        rewritten(nested_graph(), qkv(8)),
        """\
shard[1, 4, 4, 8] = cppass.shard(q, 2, 1, [8], 2, True)
shard_1[1, 4, 4, 8] = cppass.shard(k, 2, 1, [8], 2, True)
shard_2[1, 4, 4, 8] = cppass.shard(v, 2, 1, [8], 2, True)
gather = cppass.gather([shard_1, shard_2], [2, 2], [1, 1], [8], 2, True, True)
getitem[1, 4, 8, 8] = getitem(gather, 0)
getitem_1[1, 4, 8, 8] = getitem(gather, 1)
attention[1, 4, 4, 8] = cppass.attention(shard, getitem, getitem_1, None, None, 0, [8], 2, True, True, 0, None)
attention_1[1, 4, 4, 8] = cppass.attention(attention, getitem, getitem_1, None, None, 0, [8], 2, True, True, 0, None)
gather_1 = cppass.gather([attention_1], [2], [1], [8], 2, True, True)
getitem_2[1, 4, 8, 8] = getitem(gather_1, 0)
clone[1, 4, 8, 8] = aten.clone(getitem_2, memory_format=torch.contiguous_format)
return clone
""",
    )


def test_every_new_node_has_metadata() -> None:
    for name, snippet in SNIPPETS.items():
        gm = traced(snippet, 8)
        rewritten(gm, snippet.inputs(8))
        without = [n.name for n in gm.graph.nodes if n.op == "call_function" and "val" not in n.meta]
        assert not without, name


def torch_level() -> fx.GraphModule:
    return fx.symbolic_trace(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v))


class WithModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.norm(q) + k + v


@pytest.mark.parametrize(
    ("gm", "says"),
    [
        (torch_level(), "call_function"),
        (fx.symbolic_trace(WithModule()), "call_module"),
        (fx.symbolic_trace(lambda q, k, v: q.transpose(1, 2) + k + v), "call_method transpose"),
        (torch.nn.Linear(2, 2), "Linear"),
    ],
    ids=["function", "module", "method", "no graph"],
)
def test_torch_level_traces_are_refused(gm: Any, says: str) -> None:
    with pytest.raises(cppass.OptionError, match=says) as caught:
        cppass.run_pass(gm, qkv(8), cp_size=2)
    assert caught.value.code == "CP009"
    assert "make_fx" in caught.value.hint


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_number_of_inputs(count: int) -> None:
    inputs = (*qkv(8), torch.zeros(1))[:count]
    with pytest.raises(cppass.OptionError, match=rf"{count} example inputs for 3 placeholders \(q, k, v\)") as caught:
        cppass.run_pass(bare_graph(), inputs, cp_size=2)
    assert caught.value.code == "CP010"


# -- left alone --------------------------------------------------------------------------------------------------------

LEFT_ALONE = {
    "one rank": (64, {"cp_size": 1}, "one rank"),
    "decode": (1, {"cp_size": 2}, "1 tokens, fewer than 2 * cp_size = 4"),
    "short": (3, {"cp_size": 2}, "3 tokens, fewer than 2 * cp_size = 4"),
    "short for many ranks": (31, {"cp_size": 16}, "31 tokens, fewer than 2 * cp_size = 32"),
    "below min_tokens": (64, {"cp_size": 2, "min_tokens": 65}, "64 tokens, fewer than min_tokens = 65"),
}


@pytest.mark.parametrize(("tokens", "options", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
@pytest.mark.parametrize("name", ["causal", "cache", "written out"])
def test_left_alone(name: str, tokens: int, options: dict[str, Any], reason: str) -> None:
    snippet = SNIPPETS[name]
    gm = traced(snippet, tokens)
    report = cppass.run_pass(gm, snippet.inputs(tokens), **options)
    assert report.status == "left alone"
    assert report.reason.startswith(reason)
    assert report.collectives == 0
    assert not {n.target for n in gm.graph.nodes} & {*CANONICAL, c10d.all_gather_into_tensor.default}


@pytest.mark.parametrize(("tokens", "options"), [(4, {}), (64, {"min_tokens": 64})])
def test_just_long_enough(tokens: int, options: dict[str, Any]) -> None:
    assert cppass.run_pass(traced(SNIPPETS["causal"], tokens), qkv(tokens), cp_size=2, **options).status == "rewritten"


def test_a_graph_without_attention() -> None:
    gm = make_fx(lambda x: x * 2, tracing_mode="fake")(torch.zeros(8))
    report = cppass.run_pass(gm, (torch.zeros(8),), cp_size=2)
    assert (report.status, report.reason) == ("left alone", "no attention in this graph")


UNCHANGED = {
    "plain": (lambda: traced(SNIPPETS["causal"], 8), qkv(8)),
    "equal nodes": (lambda: traced(SNIPPETS["cache"], 8), SNIPPETS["cache"].inputs(8)),
    "nested": (nested_graph, qkv(8)),
    "in place": (lambda: traced(SNIPPETS["cache, in place"], 8), SNIPPETS["cache, in place"].inputs(8)),
}


@pytest.mark.parametrize(("make", "inputs"), UNCHANGED.values(), ids=UNCHANGED.keys())
def test_left_alone_means_unchanged(make: Callable[[], fx.GraphModule], inputs: tuple[Tensor, ...]) -> None:
    """As run_pass says: `gm` is changed only if its status is "rewritten"."""
    gm = make()
    before = graph_text(gm.graph)
    assert cppass.run_pass(gm, inputs, cp_size=1).status == "left alone"
    assert graph_text(gm.graph) == before


# -- lowered or not ----------------------------------------------------------------------------------------------------

COLLECTIVES = {  # one per site and one for the output
    "causal": 2,
    "cache": 2,
    "cache, in place": 2,
    "growing cache, window, grouped heads": 2,
    "padding mask": 2,
    "a layer": 2,
}


@pytest.mark.parametrize(("name", "count"), COLLECTIVES.items())
def test_lowering_leaves_collectives_and_no_canonical_op(name: str, count: int) -> None:
    snippet = SNIPPETS[name]
    gm = traced(snippet, 8)
    report = cppass.run_pass(gm, snippet.inputs(8), cp_size=2, rank=1)
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets.count(c10d.all_gather_into_tensor.default) == count == report.collectives
    assert not set(targets) & set(CANONICAL)


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_canonical_graph_does_not_know_the_rank(name: str) -> None:
    snippet = SNIPPETS[name]
    texts = []
    for rank in (0, 1):
        gm = traced(snippet, 8)
        texts.append(rewritten(gm, snippet.inputs(8), rank=rank))
        assert not any(n.target is c10d.all_gather_into_tensor.default for n in gm.graph.nodes)
    assert texts[0] == texts[1]


def test_the_lowered_graph_does() -> None:
    """Control for the test above."""
    texts = []
    for rank in (0, 1):
        gm = traced(SNIPPETS["causal"], 8)
        cppass.run_pass(gm, qkv(8), cp_size=2, rank=rank)
        texts.append(graph_text(gm.graph))
    assert texts[0] != texts[1]


def test_run_pass_takes_a_config_and_options() -> None:
    gm = traced(SNIPPETS["causal"], 8)
    config = cppass.CPConfig(cp_size=4)
    assert cppass.run_pass(gm, qkv(8), config, min_tokens=9).status == "left alone"
    assert cppass.run_pass(gm, qkv(8), config).cp_size == 4


def test_function_traced_twice_gives_the_same_graph() -> None:
    texts = {rewritten(traced(SNIPPETS["causal"], 8), qkv(8)) for _ in range(2)}
    assert len(texts) == 1
    assert causal(*qkv(8)).shape == (1, 4, 8, 8)
