"""What print(cppass.explain(...)) says of a model that is rewritten, refused, left alone or broken in two."""

from __future__ import annotations

import re

import pytest
import torch
from expecttest import assert_expected_inline
from explain.models import Decoder, explained, ids
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass.errors import OptionError


def text(found: cppass.Report) -> str:
    """Without where files are on this machine, and line numbers."""
    return re.sub(r"(from +)/\S+/(\w+\.py):\d+", r"\1\2", str(found)) + "\n"


def test_rewritten() -> None:
    assert_expected_inline(
        text(explained()),
        """\
graph 0/0: rewritten: Decoder, 16 tokens on 2 ranks
  2 ranks share the tokens: 3 attention sites, 4 collectives in a forward, 3.1 kB received per rank.
attention: 3 sites
  3 x scaled_dot_product_attention (CPU flash), no cache, causal; two zigzag halves
    in       layers.0.attention to layers.2.attention
    from     models.py in forward: out = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
4 collectives in one forward: 3.1 kB received per rank
  3 x K and V of a site: 1.0 kB each (first: getitem_1, getitem_2)
  1 x 1 selected rows: 64 B (first: slice_1)
values: 115 nodes; 122 afterwards
  70 local, 37 full, 6 gathered, 1 sharded, 1 fetched
    slice_1 (aten.slice.Tensor): a few rows, fetched
layout: 16 tokens in 4 blocks, 8 rows a rank
  rank 0   #..#  0..3, 12..15  50.0% of the attention
  rank 1   .##.  4..7, 8..11  50.0% of the attention
cost on host-core: predicted, not measured
  16 tokens: one device 2.94 us, 2 ranks 1.52 ms (0.00193x)
  it pays from 1,476 tokens on
  a token: 12.3 kFLOP in matmuls, 384 B of K and V to send; weights 24.6 kB
modules: nodes, and where their rows are
  embed (Embedding): 2 nodes: 1 full, 1 local
  layers: 105 nodes: 30 full, 69 local, 6 gathered
    layers.0 .. 2 (Layer): 3 x same, each 35 nodes: 10 full, 23 local, 2 gathered
  head (Linear): 5 nodes: 5 full
""",
    )


def test_an_explanation_is_a_report() -> None:
    found = explained()
    assert isinstance(found, cppass.Report)
    assert (found.status, found.tokens, len(found.sites), found.collectives) == ("rewritten", 16, 3, 4)
    assert found.sites[2].module == "layers.2.attention"
    assert repr(found) == "<Explanation of Decoder: rewritten, graphs: 1, sites: 3>"
    assert found.graph_view.report.gathers == found.gathers


def test_refused() -> None:
    """Dropout in every layer: said once, with all of them counted."""
    found = explained(dropout=0.5)
    assert len(found.refusals) == 3
    assert_expected_inline(
        text(found),
        """\
graph 0/0: refused: Decoder, 2 ranks
  3 refusals; nothing is rewritten, and torch.compile(backend="npu_cp") raises an error that says so.
refused
  3 x [CP102] attention with dropout: ranks would drop different weights than one device
    why      Dropout draws random numbers, and ranks would draw other ones than one device. Inference needs none.
    at       node _safe_softmax (aten._safe_softmax.default) of layers.0.attention and 2 more
    from     models.py in forward: out = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
    way out  call model.eval(), or set the model's attention_dropout to 0
    or       options={'on_refusal': 'fallback'} runs this graph whole on every rank, with a warning: right numbers, and no gain
""",  # noqa: E501
    )


class Several(nn.Module):
    """Three things that are wrong: attention with dropout, noise, and an attention whose form nobody knows."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = scaled_dot_product_attention(q, k, v, is_causal=True)
        second = scaled_dot_product_attention(first, k, v, dropout_p=0.1, is_causal=True)
        third = torch.linalg.vecdot(first @ first.transpose(2, 3), k @ k.transpose(2, 3))
        return first + torch.rand_like(first), second, third


def test_every_refusal_is_found_not_the_first_alone() -> None:
    q, k, v = torch.ones(3, 1, 2, 16, 8)
    found = cppass.explain(Several(), q, k, v, cp_size=2)
    assert {r.code for r in found.refusals} >= {"CP102", "CP203"}
    assert found.reason == found.refusals[0].why
    assert all(r.hint for r in found.refusals)


def test_left_alone() -> None:
    found = explained(layers=1, tokens=3)
    assert_expected_inline(
        text(found),
        """\
graph 0/0: left alone: Decoder, 3 tokens on 2 ranks
  The graph stays as it is and runs whole on every rank: 3 tokens, fewer than 2 * cp_size = 4.
attention: 1 site, not rewritten
  1 x scaled_dot_product_attention (CPU flash), no cache, causal; two zigzag halves
    in       layers.0.attention
    from     models.py in forward: out = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
values: 45 nodes
  45 full
cost on host-core: predicted, not measured
  3 tokens: one device 0.826 us, 2 ranks 505 us (0.00164x)
  it pays from 1,476 tokens on
  a token: 4.1 kFLOP in matmuls, 128 B of K and V to send; weights 8.2 kB
modules: nodes, and where their rows are
  embed (Embedding): 2 nodes: 2 full
  layers: 35 nodes: 35 full
    layers.0 (Layer): 35 nodes: 35 full
  head (Linear): 5 nodes: 5 full
""",
    )


def test_a_gate_says_from_where_on_it_pays() -> None:
    found = cppass.explain(Decoder(1).eval(), ids(), cp_size=2, options={"min_tokens": "auto"})
    assert found.status == "left alone"
    least = found.graph_view.cost.break_even
    assert f"fewer than min_tokens = {least}, the break-even predicted for host-core" in found.reason
    assert f"it pays from {least:,} tokens on" in str(found)


def test_graph_breaks_list_the_other_graphs() -> None:
    found = explained(layers=2, breaks=True)
    assert (len(found.graphs), found.main) == (2, 0)
    assert found.notes == ("another graph: left alone, 0 sites no attention in this graph",)
    assert "other graphs of the model: 1\n  graph 1/0: left alone, 0 sites, " in str(found)
    assert len(found.breaks) == 1 and "graph break: " in str(found)


def test_a_refused_graph_decides_for_the_model() -> None:
    """Two good sites in the first graph, one that is refused behind the break."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = Decoder(2), Decoder(1, dropout=0.5)

        def forward(self, ids: Tensor) -> Tensor:
            good = self.good(ids)
            torch._dynamo.graph_break()
            return good + self.bad(ids)

    found = cppass.explain(Broken(), ids(), cp_size=2)
    assert [v.report.status for v in found.graphs] == ["rewritten", "refused"]
    assert (found.status, found.main) == ("refused", 1)


def test_symbolic_sizes_are_told_in_symbols_and_in_this_call() -> None:
    found = explained(layers=1, dynamic=True)
    assert isinstance(found.tokens, str) and found.received_bytes is None
    view = found.graph_view
    assert view.layout is not None and view.layout.tokens == 16
    static = explained(layers=1).graph_view
    assert view.gather_bytes == static.gather_bytes != ()


def test_the_graph_before_and_after() -> None:
    """Layers that are the same are shown once; names of the graph after are the rewriter's affair."""
    found = explained(layers=2)
    before, after = found.graph_text().split("\nafter\n")
    assert_expected_inline(
        before,
        """\
before
  arg0_1[32, 16] = input embed.weight  # full
  arg1_1[1, 16] = input ids  # full, cut in dim 1
  arg2_1[48, 16] = input layers.0.attention.qkv.weight  # full
  arg3_1[16, 16] = input layers.0.attention.out.weight  # full
  arg4_1[32, 16] = input layers.0.mlp.0.weight  # full
  arg5_1[32] = input layers.0.mlp.0.bias  # full
  arg6_1[16, 32] = input layers.0.mlp.2.weight  # full
  arg7_1[16] = input layers.0.mlp.2.bias  # full
  # 6 nodes of layers.1, the same as layers.0
  arg14_1[32, 16] = input head.weight  # full
  embedding[1, 16, 16] = aten.embedding(arg0_1, arg1_1)  # local in dim 1
  t[16, 48] = aten.t(arg2_1)  # full
  view[16, 16] = aten.view(embedding, [16, 16])  # local in dim 0
  mm[16, 48] = aten.mm(view, t)  # local in dim 0
  _unsafe_view[1, 16, 48] = aten._unsafe_view(mm, [1, 16, 48])  # local in dim 1
  view_1[1, 16, 3, 2, 8] = aten.view(_unsafe_view, [1, 16, 3, 2, 8])  # local in dim 1
  permute[3, 1, 2, 16, 8] = aten.permute(view_1, [2, 0, 3, 1, 4])  # local in dim 3
  unbind([1, 2, 16, 8], [1, 2, 16, 8], [1, 2, 16, 8]) = aten.unbind.int(permute)  # local in dim 2
  getitem[1, 2, 16, 8] = getitem(unbind, 0)  # local in dim 2
  getitem_1[1, 2, 16, 8] = getitem(unbind, 1)  # gather; local in dim 2, gathered
  getitem_2[1, 2, 16, 8] = getitem(unbind, 2)  # gather; local in dim 2, gathered
  _scaled_dot_product_flash_attention_for_cpu([1, 2, 16, 8], [1, 2, 16]) = aten.flash_for_cpu(getitem, getitem_1, getitem_2, 0.0, True)  # attention; local in dim 2
  getitem_3[1, 2, 16, 8] = getitem(_scaled_dot_product_flash_attention_for_cpu, 0)  # local in dim 2
  transpose[1, 16, 2, 8] = aten.transpose.int(getitem_3, 1, 2)  # local in dim 1
  view_2[1, 16, 16] = aten.view(transpose, [1, 16, 16])  # local in dim 1
  t_1[16, 16] = aten.t(arg3_1)  # full
  view_3[16, 16] = aten.view(view_2, [16, 16])  # local in dim 0
  mm_1[16, 16] = aten.mm(view_3, t_1)  # local in dim 0
  _unsafe_view_1[1, 16, 16] = aten._unsafe_view(mm_1, [1, 16, 16])  # local in dim 1
  add[1, 16, 16] = aten.add.Tensor(embedding, _unsafe_view_1)  # local in dim 1
  view_4[16, 16] = aten.view(add, [16, 16])  # local in dim 0
  t_2[16, 32] = aten.t(arg4_1)  # full
  addmm[16, 32] = aten.addmm(arg5_1, view_4, t_2)  # local in dim 0
  view_5[1, 16, 32] = aten.view(addmm, [1, 16, 32])  # local in dim 1
  silu[1, 16, 32] = aten.silu(view_5)  # local in dim 1
  view_6[16, 32] = aten.view(silu, [16, 32])  # local in dim 0
  t_3[32, 16] = aten.t(arg6_1)  # full
  addmm_1[16, 16] = aten.addmm(arg7_1, view_6, t_3)  # local in dim 0
  view_7[1, 16, 16] = aten.view(addmm_1, [1, 16, 16])  # local in dim 1
  add_1[1, 16, 16] = aten.add.Tensor(add, view_7)  # local in dim 1
  # 29 nodes of layers.1, the same as layers.0
  slice_1[1, 1, 16] = aten.slice.Tensor(add_3, 1, -1, 9223372036854775807)  # gather; a few rows, fetched
  t_8[16, 32] = aten.t(arg14_1)  # full
  view_16[1, 16] = aten.view(slice_1, [1, 16])  # full
  mm_4[1, 32] = aten.mm(view_16, t_8)  # full
  _unsafe_view_4[1, 1, 32] = aten._unsafe_view(mm_4, [1, 1, 32])  # full
  return [_unsafe_view_4]
""",  # noqa: E501
    )
    named = [node.name for node in found.graph_view.after if node.module.startswith("layers.0.") and node.op != "input"]
    assert all(f"  {name}" in after for name in named)
    assert "nodes of layers.1, the same as layers.0" in after


def test_the_graph_after() -> None:
    """Where the rows are in the first attention, from its projections to the output projection."""
    nodes = explained(layers=2).graph_view.after
    inside = [n for n in nodes if n.module == "layers.0.attention" and n.op != "input"]
    lines = [f"{n.op} {n.shape}: {n.role + '; ' if n.role else ''}{n.state.text}" for n in inside]
    assert_expected_inline(
        "\n".join(lines) + "\n",
        """\
aten.reshape.default [1, 8, 3, 2, 8]: local in dim 1
aten.permute.default [3, 1, 2, 8, 8]: local in dim 3
aten.unbind.int ([1, 2, 8, 8], [1, 2, 8, 8], [1, 2, 8, 8]): local in dim 2
getitem [1, 2, 8, 8]: local in dim 2
getitem [1, 2, 8, 8]: local in dim 2
getitem [1, 2, 8, 8]: local in dim 2
cppass.gather.default ([1, 2, 16, 8], [1, 2, 16, 8]): gather; full
getitem [1, 2, 16, 8]: full
getitem [1, 2, 16, 8]: full
cppass.attention.default [1, 2, 8, 8]: attention; local in dim 2
aten.transpose.int [1, 8, 2, 8]: local in dim 1
aten.reshape.default [1, 8, 16]: local in dim 1
""",
    )


def test_a_model_of_one_rank_is_left_alone() -> None:
    found = explained(layers=1, cp_size=1)
    assert (found.status, found.graph_view.cost) == ("left alone", None)
    assert "one rank: there is nothing to share" in str(found)


def test_unknown_hardware_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"\[CP003\] hardware 'abacus' is not known"):
        cppass.explain(Decoder(1), ids(), cp_size=2, hardware="abacus")
