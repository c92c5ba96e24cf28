"""The rewritten graph of fused-infer-attention sites: as text, and what must not be in it."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from npu.fused_snippets import BLOCK, MASK, WRITES, D, Snippet, check, fused, nd_update_on_a_view, paged, rand
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.graph_text import graph_text

G = 1
CALL, GATHER, SELECT = "npu.npu_fused_infer_attention_score_v2.default", "all_gather_into_tensor", "index_select"


def functional(run: Any, inputs: Any) -> fx.GraphModule:
    """As a compiler hands it over: writes in place are copies at the end."""
    with torch.no_grad():
        gm = make_fx(torch.func.functionalize(run, remove="mutations"), tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    names = [name for name, p in inspect.signature(run).parameters.items() if p.kind is not p.VAR_POSITIONAL]
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), names, strict=False):
        node.target = name
    gm.recompile()
    return gm


def lowered(run: Any, inputs: Any, cp_size: int = 2) -> fx.Graph:
    gm = functional(run, inputs)
    assert cppass.run_pass(gm, inputs, cp_size=cp_size).status == "rewritten"
    return gm.graph


def count(graph: fx.Graph, part: str) -> int:
    return sum(part in str(n.target) for n in graph.nodes if n.op == "call_function")


def users(graph: fx.Graph, position: int) -> Counter[str]:
    placeholder = [n for n in graph.nodes if n.op == "placeholder"][position]
    return Counter(re.sub(r"view|reshape|_unsafe_view", "view", str(n.target)) for n in placeholder.users)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Many tiny calls: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- text --------------------------------------------------------------------------------------------------------------


def paged_site(q, k, v, kc, vc, slots, table, mask):  # type: ignore[no-untyped-def]
    """Causal, 32 tokens in the cache."""
    nd_update_on_a_view(kc, vc, slots, k, v)
    pages = [c.view(-1, BLOCK, G * D) for c in (kc, vc)]
    lengths = {"actual_seq_qlen": [q.shape[0]], "actual_seq_kvlen": [q.shape[0] + 32]}
    shape = {"input_layout": "TND", "block_table": table, "block_size": BLOCK}
    causal = {"sparse_mode": 3, "atten_mask": mask}
    return fused("v2", q, *pages, 2, G, **lengths, **shape, **causal)[0]


def site_inputs(tokens: int) -> tuple[Tensor, ...]:
    fresh = [rand(tokens, n, D) for n in (2, G, G)]
    caches = [rand(2, BLOCK, G, D) for _ in "kv"]
    return (*fresh, *caches, (torch.arange(tokens) + 32).int(), torch.tensor([[0, 1]]).int(), MASK)


SAME = (
    *("num_query_heads", "num_key_value_heads", "softmax_scale", "input_layout", "block_size", "inner_precise"),
    *("pre_tokens", "next_tokens", "return_softmax_lse"),
)
SHORT = {
    r"npu_fused_infer_attention_score_v2": "fia",
    r"actual_seq_(q|kv)len": r"\1",
    r"(atten_)?mask=mask, ": "",
    rf", ({'|'.join(SAME)})=[^,)\n]+": "",
    r"lift_fresh_copy.* = .*\n|attribute.* = .*\n": "",
    r"lift_fresh_copy": "rows",
}


def short(graph: fx.Graph) -> str:
    """Without the options that every call has alike, and without what makes constants tensors of the graph."""
    text = graph_text(graph)
    for pattern, said in SHORT.items():
        text = re.sub(pattern, said, text)
    return text


def test_a_paged_site() -> None:
    assert_expected_inline(
        short(functional(paged_site, site_inputs(8)).graph),
        """\
view[256, 1, 16] = aten.view(kc, [-1, 1, 16])
view_1[8, 1] = aten.view(slots, [-1, 1])
npu_scatter_nd_update[256, 1, 16] = npu.npu_scatter_nd_update(view, view_1, k)
view_2[2, 128, 1, 16] = aten.view(npu_scatter_nd_update, [2, 128, 1, 16])
view_3[256, 1, 16] = aten.view(vc, [-1, 1, 16])
view_4[8, 1] = aten.view(slots, [-1, 1])
npu_scatter_nd_update_1[256, 1, 16] = npu.npu_scatter_nd_update(view_3, view_4, v)
view_5[2, 128, 1, 16] = aten.view(npu_scatter_nd_update_1, [2, 128, 1, 16])
view_6[2, 128, 16] = aten.view(view_2, [-1, 128, 16])
view_7[2, 128, 16] = aten.view(view_5, [-1, 128, 16])
fia = npu.fia(q, view_6, view_7, q=[8], kv=[40], block_table=table, sparse_mode=3)
getitem[8, 2, 16] = getitem(fia, 0)
copy_[2, 128, 1, 16] = aten.copy_(kc, view_2)
copy__1[2, 128, 1, 16] = aten.copy_(vc, view_5)
return getitem
""",
    )


def test_a_paged_site_lowered_for_rank_0() -> None:
    """Slots in gathered order, keys and values as they arrive; two calls that differ in rows and key lengths."""
    assert_expected_inline(
        short(lowered(paged_site, site_inputs(8))),
        """\
index_select[4, 1, 16] = aten.index_select(k, 0, rows)
index_select_1[4, 1, 16] = aten.index_select(v, 0, rows)
reshape[4, 16] = aten.reshape(index_select, [4, -1])
reshape_1[4, 16] = aten.reshape(index_select_1, [4, -1])
cat[4, 32] = aten.cat([reshape, reshape_1], 1)
all_gather_into_tensor[8, 32] = _c10d_functional.all_gather_into_tensor(cat, 2, cppass_no_group)
view[256, 1, 16] = aten.view(kc, [-1, 1, 16])
view_1[8, 1] = aten.view(slots, [-1, 1])
index_select_2[8, 1] = aten.index_select(view_1, 0, rows_1)
view_2[256, 1, 16] = aten.view(vc, [-1, 1, 16])
index_select_3[4, 2, 16] = aten.index_select(q, 0, rows)
slice[2, 2, 16] = aten.slice.Tensor(index_select_3, 0, 0, 2)
slice_1[2, 2, 16] = aten.slice.Tensor(index_select_3, 0, 2, 4)
wait_tensor[8, 32] = _c10d_functional.wait_tensor(all_gather_into_tensor)
slice_2[8, 16] = aten.slice.Tensor(wait_tensor, 1, 0, 16)
reshape_2[8, 1, 16] = aten.reshape(slice_2, [8, 1, 16])
slice_3[8, 16] = aten.slice.Tensor(wait_tensor, 1, 16, 32)
reshape_3[8, 1, 16] = aten.reshape(slice_3, [8, 1, 16])
npu_scatter_nd_update[256, 1, 16] = npu.npu_scatter_nd_update(view, index_select_2, reshape_2)
view_3[2, 128, 1, 16] = aten.view(npu_scatter_nd_update, [2, 128, 1, 16])
npu_scatter_nd_update_1[256, 1, 16] = npu.npu_scatter_nd_update(view_2, index_select_2, reshape_3)
view_4[2, 128, 1, 16] = aten.view(npu_scatter_nd_update_1, [2, 128, 1, 16])
view_5[2, 128, 16] = aten.view(view_3, [-1, 128, 16])
view_6[2, 128, 16] = aten.view(view_4, [-1, 128, 16])
fia = npu.fia(slice, view_5, view_6, q=[2], kv=[34], block_table=table, sparse_mode=3)
getitem[2, 2, 16] = getitem(fia, 0)
fia_1 = npu.fia(slice_1, view_5, view_6, q=[2], kv=[40], block_table=table, sparse_mode=3)
getitem_1[2, 2, 16] = getitem(fia_1, 0)
cat_1[4, 2, 16] = aten.cat([getitem, getitem_1], 0)
copy_[2, 128, 1, 16] = aten.copy_(kc, view_3)
copy__1[2, 128, 1, 16] = aten.copy_(vc, view_4)
reshape_4[4, 32] = aten.reshape(cat_1, [4, -1])
all_gather_into_tensor_1[8, 32] = _c10d_functional.all_gather_into_tensor(reshape_4, 2, cppass_no_group)
wait_tensor_1[8, 32] = _c10d_functional.wait_tensor(all_gather_into_tensor_1)
index_select_4[8, 32] = aten.index_select(wait_tensor_1, 0, rows_2)
reshape_5[8, 2, 16] = aten.reshape(index_select_4, [8, 2, 16])
return reshape_5
""",
    )


# -- layers ------------------------------------------------------------------------------------------------------------


def two_layers(lengths: list[int], write: Any = nd_update_on_a_view) -> Snippet:
    """x = x + layer(x), twice; the layers have caches of their own and share slots, block table and mask."""
    layer = paged(lengths, write=write)
    x, wq, wk, wv, kc, vc, *rest = layer.inputs

    def run(x, wq, wk, wv, kc, vc, slots, table, mask, kc_2, vc_2):  # type: ignore[no-untyped-def]
        for caches in ((kc, vc), (kc_2, vc_2)):
            x = x + layer.run(x, wq, wk, wv, *caches, slots, table, mask)
        return x

    return Snippet(run, (x, wq, wk, wv, kc, vc, *rest, kc + 1, vc + 1), (4, 5, 9, 10))


@pytest.mark.parametrize("write", ["nd_update", "scatter_pa"])
def test_layers_share_the_slots(write: str) -> None:
    """Even lengths: hidden rows in, slots once for both layers, output rows out. No keys or values are reordered."""
    snippet = two_layers([16, 32], WRITES[write])
    check(snippet, 2, True)
    graph = lowered(snippet.run, snippet.inputs)
    assert (count(graph, GATHER), count(graph, CALL), count(graph, SELECT)) == (3, 4, 3)
    slots = [n for n in graph.nodes if n.op == "placeholder"][6]
    lookups = [_sources(n) for n in graph.nodes if SELECT in str(n.target)]
    reordered = [x for x in lookups if slots in x and not any(str(n.target) == CALL for n in x)]
    assert len(reordered) == 1


def test_layers_of_uneven_lengths() -> None:
    """Padding rows have no slot: keys and values are put in order, in one lookup each."""
    snippet = two_layers([17, 30], WRITES["nd_update"])
    check(snippet, 2, True)
    graph = lowered(snippet.run, snippet.inputs)
    assert (count(graph, GATHER), count(graph, CALL), count(graph, SELECT)) == (3, 4, 6)


def _sources(node: fx.Node) -> set[fx.Node]:
    """What a value is computed from."""
    found, stack = {node}, [node]
    while stack:
        for x in stack.pop().all_input_nodes:
            if x not in found:
                found.add(x)
                stack.append(x)
    return found


@pytest.mark.parametrize("lengths", [[16, 32], [17, 30]], ids=["even", "uneven"])
@pytest.mark.parametrize("write", ["nd_update", "scatter_pa"])
def test_caches_keep_the_users_that_they_had(write: str, lengths: list[int]) -> None:
    """A user more, and every step would copy the whole cache: see the re-inplacing passes of the NPU compilers."""
    snippet = two_layers(lengths, WRITES[write])
    before = functional(snippet.run, snippet.inputs).graph
    after = lowered(snippet.run, snippet.inputs, 4)
    for i in snippet.caches:
        assert users(before, i)["aten.copy_.default"] == 1 and users(before, i).total() == 2
        assert users(after, i) == users(before, i)
    assert count(after, "npu_scatter") == count(before, "npu_scatter") == {"nd_update": 4, "scatter_pa": 2}[write]


def test_no_length_is_read_from_a_tensor() -> None:
    """Lengths of the calls are plain numbers: no copy from device to host."""
    graph = lowered(two_layers([16, 32]).run, two_layers([16, 32]).inputs)
    calls = [n for n in graph.nodes if str(n.target) == CALL]
    assert {tuple(n.kwargs["actual_seq_qlen"]) for n in calls} == {(4, 12)}
    assert [n.kwargs["actual_seq_kvlen"] for n in calls[:2]] == [[4, 8], [16, 32]]
    assert all(n.kwargs["sparse_mode"] == 3 for n in calls)
