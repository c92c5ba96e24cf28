"""What fused-infer-attention may ask for that is not rewritten: the code, the feature's name and a way out."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from npu.fused_snippets import BLOCK, MASK, D, Snippet, dense, fused, npu, paged, rand, traced
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass

G, S = 2, 16
Given = dict[str, Any]


def refusal(snippet: Snippet, how: Callable[[Snippet], fx.GraphModule] = traced) -> cppass.RefusedError:
    """The error; the graph must be as it was."""
    gm = how(snippet)
    before = str(gm.graph)
    with pytest.raises(cppass.RefusedError) as caught:
        cppass.run_pass(gm, snippet.inputs, cp_size=2)
    assert str(gm.graph) == before
    assert "way out: " in str(caught.value)
    return caught.value


def built(op: Any, options: Given) -> Callable[[Snippet], fx.GraphModule]:
    """The call as a graph with metadata: features that no meta function takes on its own can be looked at, too."""

    def build(snippet: Snippet) -> fx.GraphModule:
        mode, graph = torch._subclasses.FakeTensorMode(), fx.Graph()
        fake = [mode.from_tensor(x) for x in snippet.inputs]
        nodes = [graph.placeholder(f"x{i}") for i in range(len(fake))]
        for node, value in zip(nodes, fake, strict=True):
            node.meta["val"] = value
        given = {n: nodes[x] if isinstance(x, int) and n in TENSORS else x for n, x in options.items()}
        call = graph.call_function(op, (nodes[0], nodes[1], nodes[1]), given)
        call.meta["val"] = (fake[0], fake[0])
        out = graph.call_function(operator.getitem, (call, 0))
        out.meta["val"] = fake[0]
        graph.output(out)
        return fx.GraphModule(torch.nn.Module(), graph)

    return build


V1, V2 = npu.npu_fused_infer_attention_score.default, npu.npu_fused_infer_attention_score_v2.default
TENSORS = {a.name for op in (V1, V2) for a in op._schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")}
KNOWN = {"query", "key", "value", "atten_mask", "block_table", "learnable_sink"}
PARTS = {
    "shared_prefix": "a shared prefix",
    "rope": "MLA rope",
    "pse": "a positional bias",
    "padding_size": "left padding",
    "quant": "quantised",
}
ASKED = [(op, name) for op in (V1, V2) for name in (a.name for a in op._schema.arguments) if name in TENSORS - KNOWN]


@pytest.mark.parametrize(("op", "name"), ASKED, ids=[f"{'v2' if op is V2 else 'v1'} {name}" for op, name in ASKED])
def test_every_tensor_that_is_not_understood_is_refused(op: Any, name: str) -> None:
    """Whatever a version of the op takes beside what a site reads is a feature, named in the error."""
    heads = {"num_query_heads" if op is V2 else "num_heads": 4}
    snippet = Snippet(lambda *x: x, (rand(1, S, 4 * D), rand(1, S, 4 * D), torch.ones(1)))
    error = refusal(snippet, built(op, {"input_layout": "BSH", name: 2, **heads}))
    assert isinstance(error, NotImplementedError)
    assert error.code == "CP110"
    assert f"({name})" in str(error) and "fused" in str(error)
    assert next(text for part, text in PARTS.items() if part in name) in str(error)


@pytest.mark.parametrize(
    ("op", "name", "value", "said"),
    [
        (V1, "antiquant_mode", 1, "a quantised cache"),
        (V1, "key_antiquant_mode", 1, "a quantised cache"),
        (V1, "value_antiquant_mode", 1, "a quantised cache"),
        (V1, "actual_shared_prefix_len", [4], "a shared prefix"),
        (V2, "query_quant_mode", 1, "quantised attention"),
        (V2, "key_quant_mode", 1, "quantised attention"),
        (V2, "value_quant_mode", 1, "quantised attention"),
        (V2, "out_dtype", 5, "data types given by number"),
        (V1, "sparse_mode", 5, "sparse_mode 5"),
        (V2, "sparse_mode", 8, "sparse_mode 8"),
        (V1, "input_layout", "BNSD_BSND", "input_layout 'BNSD_BSND'"),
        (V2, "input_layout", "NTD", "input_layout 'NTD'"),
    ],
)
def test_a_named_option_is_refused(op: Any, name: str, value: Any, said: str) -> None:
    snippet = Snippet(lambda *x: x, (rand(1, S, 4 * D), rand(1, S, 4 * D)))
    error = refusal(snippet, built(op, {"input_layout": "BSH", name: value}))
    assert isinstance(error, NotImplementedError)
    assert error.code == "CP110"
    assert said in str(error)


def test_a_quantised_cache_is_refused_by_its_dtype() -> None:
    cache = torch.zeros(1, S, 4 * D, dtype=torch.int8)
    error = refusal(Snippet(lambda *x: x, (rand(1, S, 4 * D), cache)), built(V1, {"input_layout": "BSH"}))
    assert isinstance(error, NotImplementedError)
    assert "a quantised cache (query torch.float32, key torch.int8)" in str(error)


def test_a_cache_of_five_dimensions_is_refused() -> None:
    cache, table = rand(2, G, D // 16, BLOCK, 16), torch.tensor([[0, 1]]).int()
    lengths = {"actual_seq_lengths": [S], "actual_seq_lengths_kv": [S]}
    options = {"input_layout": "TND", "block_table": 2, "block_size": BLOCK, "num_heads": 4, **lengths}
    error = refusal(Snippet(lambda *x: x, (rand(S, 4, D), cache, table)), built(V1, options))
    assert isinstance(error, NotImplementedError)
    assert f"NZ layout [2, {G}, 1, {BLOCK}, 16]" in str(error)


@pytest.mark.parametrize("mode", [{}, {"cache_mode": "PA_NZ"}], ids=["by default", "asked for"])
def test_a_write_in_nz_layout_is_refused(mode: Given) -> None:
    def write(kc: Tensor, vc: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        npu.npu_scatter_pa_kv_cache(k, v, kc, vc, slots, **mode)
        return kc, vc

    error = refusal(paged([S], write=write))
    assert isinstance(error, NotImplementedError)
    assert error.code == "CP110"
    assert "npu_scatter_pa_kv_cache" in str(error) and "NZ layout" in str(error)


# -- masks and lengths -------------------------------------------------------------------------------------------------

OWN = torch.ones(S, S, dtype=torch.bool).triu(1)
WRONG: dict[str, tuple[Snippet, str, str]] = {
    "band into the future": (
        dense("BSND", 1, S, sparse_mode=4, pre_tokens=5, next_tokens=2, atten_mask=MASK),
        "rows see later tokens",
        "next_tokens=0",
    ),
    "band without a limit ahead": (
        dense("BSH", 1, S, sparse_mode=4, pre_tokens=5, atten_mask=MASK),
        "rows see later tokens",
        "next_tokens=0",
    ),
    "TND with a mask of its own": (
        paged([S], fresh=True, sparse_mode=0),
        "TND with a mask of its own (sparse_mode 0)",
        "sparse_mode=3",
    ),
    "a mask and a band": (
        dense("BNSD", 1, S, pre_tokens=4, atten_mask=OWN),
        "with a mask and pre_tokens",
        "put the band into the mask",
    ),
    "top-left over a prefix": (
        dense("BSND", 1, S, sparse_mode=2, atten_mask=MASK, actual_seq_qlen=[8], actual_seq_kvlen=[S]),
        "more or fewer keys than queries",
        "sparse_mode=3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_wrong_is_refused(name: str) -> None:
    snippet, why, way_out = WRONG[name]
    error = refusal(snippet)
    assert error.code == "CP103"
    assert why in str(error) and way_out in str(error).partition("way out: ")[2]
    assert "npu_fused_infer_attention_score_v2" in str(error)


# -- writes that are one op with something else ------------------------------------------------------------------------


def beside_attention(write: Callable[..., Any]) -> Snippet:
    """Attention over fresh rows, and a write of them that the pass cannot take apart."""

    def run(x, w, kc, vc, slots, mask):  # type: ignore[no-untyped-def]
        rows = (x @ w).view(-1, G, D)
        ends = {"actual_seq_qlen": [S], "actual_seq_kvlen": [S]}
        causal = {"input_layout": "TND", "sparse_mode": 3, "atten_mask": mask}
        out = fused("v2", rows, rows, rows, G, G, **ends, **causal)[0]
        return out, write(rows, kc, vc, slots)

    caches = [rand(2, BLOCK, G, D, seed=s) for s in (1, 2)]
    return Snippet(run, (rand(S, 32), rand(32, G * D), *caches, torch.arange(S).int(), MASK))


def norm_rope_cache(rows: Tensor, kc: Tensor, vc: Tensor, slots: Tensor) -> Any:
    gamma, table = torch.ones(D), torch.ones(S, D)
    qkv, q_out = rows.new_ones(S, 3 * G * D), rows.new_ones(S, G * D)
    return npu.npu_qkv_rms_norm_rope_cache_functional(
        qkv, gamma, gamma, table, table, slots.long(), q_out, kc, vc, [1, S, 3 * G, D], [G, G, G]
    )[0]


def kv_norm_rope_cache(rows: Tensor, kc: Tensor, vc: Tensor, slots: Tensor) -> Any:
    kv, table = rows.new_ones(1, 1, S, 2 * D), rows.new_ones(1, 1, S, D)
    return npu.npu_kv_rmsnorm_rope_cache(kv, torch.ones(D), table, table, slots.long().view(1, S), kc, vc)[0]


FUSED_WRITES = {
    "npu_qkv_rms_norm_rope_cache_functional": (norm_rope_cache, "npu_rms_norm, npu_apply_rotary_pos_emb"),
    "npu_kv_rmsnorm_rope_cache": (kv_norm_rope_cache, "npu_rms_norm, npu_apply_rotary_pos_emb"),
}


@pytest.mark.parametrize("name", FUSED_WRITES)
def test_a_write_that_is_part_of_another_op_is_refused(name: str) -> None:
    write, way_out = FUSED_WRITES[name]
    error = refusal(beside_attention(write))
    assert isinstance(error, NotImplementedError)
    assert error.code == "CP111"
    assert name in str(error) and way_out in str(error).partition("way out: ")[2]


def test_a_write_without_a_functional_twin_is_refused() -> None:
    """atb._npu_reshape_and_cache: torch.compile wraps it in auto_functionalized, and the error names the op inside."""

    def write(rows: Tensor, kc: Tensor, vc: Tensor, slots: Tensor) -> Tensor:
        torch.ops.atb._npu_reshape_and_cache(rows, rows, kc, vc, slots)
        return kc.sum()

    snippet = beside_attention(write)
    (found,) = cppass.explain(snippet.run, *snippet.inputs, cp_size=2).refusals
    assert found.code == "CP111"
    assert "atb._npu_reshape_and_cache" in found.why
    assert found.hint == "use npu_scatter_pa_kv_cache or npu_scatter_nd_update_"


def test_padded_sequences_of_symbolic_sizes_are_refused() -> None:
    """The halves' query lengths would need the smaller of two symbolic numbers, which compilers do not convert."""
    snippet = dense("BSND", 2, 16, actual_seq_qlen=[16, 12], actual_seq_kvlen=[16, 12], sparse_mode=3, atten_mask=MASK)
    with torch.no_grad():
        gm = make_fx(snippet.run, tracing_mode="symbolic")(*snippet.inputs)
    with pytest.raises(cppass.RefusedError, match=r"(?s)\[CP103\].*query lengths and symbolic sizes.*way out"):
        cppass.run_pass(gm, snippet.inputs, cp_size=2)


def test_a_graph_whose_attention_is_elsewhere_says_so() -> None:
    """Lengths in a device tensor break attention out of the graph; what is left writes the cache."""

    def left(rows: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        return npu.npu_scatter_nd_update(cache, slots, rows)

    inputs = (torch.ones(16, 4), torch.zeros(32, 4), torch.arange(16)[:, None])
    gm = make_fx(left, tracing_mode="fake")(*inputs)
    report = cppass.run_pass(gm, inputs, cp_size=2)
    assert report.status == "left alone"
    assert "no attention is: it broke out of the graph and runs unsharded" in report.notes[0]
