"""verify notices every way of breaking a rewritten graph that we could think of; the graph as it is passes.

Each mutation is an edit that keeps the graph well-formed: values of the right kind in the wrong place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core import toy_transformer as toy
from core.snippets import SNIPPETS, Snippet, rand, traced
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from cppass.capture import capture
from cppass.errors import VerifyError
from cppass.match import find_sites
from cppass.ops import CANONICAL, SCHEMAS
from cppass.plan import CPPlan, make_plan
from cppass.prepare import prepare
from cppass.rewrite import rewrite
from cppass.shard import propagate
from cppass.step import Step, step_of
from cppass.torch_private import fake_mode_of
from cppass.verify import check_waits, verify

aten, canonical = torch.ops.aten, torch.ops.cppass
decoder = functools.cache(toy.traced)  # nothing below changes it: prepare copies
TOKENS = 16  # also the hidden size of the toy: a wrong dimension would divide just as well


def rewritten(gm: fx.GraphModule, cp_size: int = 2) -> tuple[fx.Graph, CPPlan]:
    """The pipeline without its last step."""
    graph = prepare(gm)
    sites = find_sites(graph).sites
    step = step_of(sites, cp_size)
    assert isinstance(step, Step)
    plan = make_plan(graph, sites, propagate(graph, sites), step, False)
    assert not plan.refusals
    return rewrite(graph, plan), plan


# -- editing -----------------------------------------------------------------------------------------------------------

LAYOUT = ([TOKENS], 2, True)  # as canonical ops name it


class Graph:
    """A rewritten graph, with short names for what mutations need."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def of(self, target: Any, at: int = 0) -> fx.Node:
        return [n for n in self.graph.nodes if n.target == target][at]

    @property
    def output(self) -> fx.Node:
        return self.graph.find_nodes(op="output")[0]

    def local_of(self, gathered: fx.Node) -> fx.Node:
        """The local operand behind an element of a gather."""
        gather, i = gathered.args
        return gather.args[0][i]  # type: ignore[union-attr,index,return-value]

    def make(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A new node with metadata."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        with fake_mode_of(self.graph):  # type: ignore[union-attr]
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def gathered(self, before: fx.Node, local: fx.Node, dim: int, inner: int = 1) -> fx.Node:
        made = self.make(before, canonical.gather.default, [local], [dim], [inner], *LAYOUT)
        return self.make(before, operator.getitem, made, 0)

    def set_arg(self, node: fx.Node, position: int, value: Any) -> None:
        node.args = (*node.args[:position], value, *node.args[position + 1 :])


def attention(g: Graph, at: int = 0) -> fx.Node:
    return g.of(canonical.attention.default, at)


Mutate = Callable[[Graph], None]


def drop_a_gather(g: Graph) -> None:
    """Write this rank's keys into the cache."""
    write = g.of(aten.index_copy.default)
    g.set_arg(write, 3, g.local_of(write.args[3]))  # type: ignore[arg-type]


def local_keys(g: Graph) -> None:
    """Attend over this rank's keys."""
    write = g.of(aten.index_copy.default)
    g.set_arg(attention(g), 1, g.local_of(write.args[3]))  # type: ignore[arg-type]


def local_values(g: Graph) -> None:
    write = g.of(aten.index_copy.default, 1)
    g.set_arg(attention(g), 2, g.local_of(write.args[3]))  # type: ignore[arg-type]


def full_query(g: Graph) -> None:
    node = attention(g)
    g.set_arg(node, 0, g.gathered(node, node.args[0], 2))  # type: ignore[arg-type]


def local_prefix(g: Graph) -> None:
    g.set_arg(attention(g), 4, g.of(canonical.shard.default, 1))


def bypass_the_shard_of_ids(g: Graph) -> None:
    shard = g.of(canonical.shard.default)
    shard.replace_all_uses_with(shard.args[0])  # type: ignore[arg-type]


def bypass_the_shard_of_positions(g: Graph) -> None:
    shard = g.of(canonical.shard.default, 1)
    shard.replace_all_uses_with(shard.args[0])  # type: ignore[arg-type]


def bypass_every_shard(g: Graph) -> None:
    bypass_the_shard_of_ids(g)
    bypass_the_shard_of_positions(g)


def shard_the_batch(g: Graph) -> None:
    g.set_arg(g.of(canonical.shard.default), 1, 0)


def shard_for_more_ranks(g: Graph) -> None:
    """Another number of local rows than everywhere else."""
    shard = g.of(canonical.shard.default, 1)
    made = g.make(shard, canonical.shard.default, *shard.args[:4], 4, *shard.args[5:])
    shard.replace_all_uses_with(made)


def shard_twice(g: Graph) -> None:
    shard = g.of(canonical.shard.default)
    made = g.make(shard.next, canonical.shard.default, shard, 1, 1, *LAYOUT)
    shard.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def return_a_local_value(g: Graph) -> None:
    g.output.args = (attention(g),)


def return_local_keys(g: Graph) -> None:
    g.output.args = ((g.output.args[0], g.local_of(g.of(aten.index_copy.default).args[3])),)  # type: ignore[arg-type]


def gather_along_another_dim(g: Graph) -> None:
    g.set_arg(g.of(canonical.gather.default), 1, [3, 2])


def gather_with_another_inner(g: Graph) -> None:
    g.set_arg(g.of(canonical.gather.default), 2, [2, 1])


def gather_a_full_value(g: Graph) -> None:
    gather = g.of(canonical.gather.default, 1)
    g.set_arg(gather, 0, [g.of(aten.index_copy.default), gather.args[0][1]])  # type: ignore[index]


def pick_rows_of_a_full_value(g: Graph) -> None:
    rows = g.of(canonical.gather_rows.default)
    g.set_arg(rows, 0, g.gathered(rows, rows.args[0], 1))  # type: ignore[arg-type]


def pick_rows_along_another_dim(g: Graph) -> None:
    """[1, 8, 16]: the hidden size divides by ranks, too."""
    g.set_arg(g.of(canonical.gather_rows.default), 1, 2)


def pick_rows_bypassed(g: Graph) -> None:
    """The last local row instead of the last token."""
    rows = g.of(canonical.gather_rows.default)
    rows.replace_all_uses_with(g.make(rows, aten.slice.Tensor, rows.args[0], 1, -1, 2**63 - 1))


def copy_local_rows_into_a_cache(g: Graph) -> None:
    copy, write = g.of(aten.copy_.default), g.of(aten.index_copy.default)
    made = g.make(copy, aten.slice_scatter.default, write.args[0], g.local_of(write.args[3]), 2, 0, 8)  # type: ignore[arg-type]
    g.set_arg(copy, 1, made)


def copy_a_local_value(g: Graph) -> None:
    g.set_arg(g.of(aten.copy_.default), 1, attention(g))


def remove_an_attention(g: Graph) -> None:
    node = attention(g, 1)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    g.graph.erase_node(node)


def add_the_whole_residual(g: Graph) -> None:
    """Hidden states of all tokens, added to those of this rank's rows."""
    add = next(n for n in g.graph.nodes if n.target is aten.add.Tensor and n.meta["val"].shape == (1, 8, toy.F))
    g.set_arg(add, 0, g.gathered(add, add.args[0], 1))  # type: ignore[arg-type]


def normalise_over_rows(g: Graph) -> None:
    """The mean over tokens instead of the hidden size."""
    mean = g.of(aten.mean.dim)
    g.set_arg(mean, 1, [1])


def flip_local_rows(g: Graph) -> None:
    node = attention(g)
    flipped = g.make(node, aten.flip.default, node.args[0], [2])
    g.set_arg(node, 0, flipped)


def transpose_the_query(g: Graph) -> None:
    """[1, 2, 8, 8]: as many local rows as elements of a head."""
    node = attention(g)
    g.set_arg(node, 0, g.make(node, aten.transpose.int, node.args[0], 2, 3))


def an_op_without_a_rule(g: Graph) -> None:
    node = attention(g)
    g.set_arg(node, 0, g.make(node, aten.roll.default, node.args[0], [1], [2]))


def slots_in_natural_order(g: Graph) -> None:
    """Rows come as the all-gather leaves them, and are written where natural rows go."""
    write = next(n for n in g.graph.nodes if n.target is aten.index_copy.default)
    g.set_arg(write, 2, write.args[2].args[0])


MUTATIONS: dict[str, tuple[Mutate, str, str]] = {
    f.__name__: (f, code, says)
    for f, code, says in [
        (drop_a_gather, "CP403", "index_copy"),
        (local_keys, "CP403", "attends over"),
        (local_values, "CP403", "attends over"),
        (full_query, "CP403", "query that is Full"),
        (local_prefix, "CP403", "attends over"),
        (bypass_the_shard_of_ids, "CP403", "mixes rows"),
        (bypass_the_shard_of_positions, "CP403", "mixes rows"),
        (bypass_every_shard, "CP403", "Full"),
        (shard_the_batch, "CP403", "does not carry 16 tokens"),
        (shard_for_more_ranks, "CP403", "over 4 ranks; the plan says"),
        (shard_twice, "CP403", "shards a Local value"),
        (return_a_local_value, "CP403", "where the whole value is meant"),
        (return_local_keys, "CP403", "where the whole value is meant"),
        (gather_along_another_dim, "CP403", "along dim 3"),
        (gather_with_another_inner, "CP403", "gathers"),
        (gather_a_full_value, "CP403", "which is Full"),
        (pick_rows_of_a_full_value, "CP403", "which is Full"),
        (pick_rows_along_another_dim, "CP403", "picks rows"),
        (pick_rows_bypassed, "CP403", "mixes rows"),
        (copy_local_rows_into_a_cache, "CP403", "slice_scatter"),
        (copy_a_local_value, "CP403", "writes a Local value into an input"),
        (remove_an_attention, "CP402", "2 attention sites were found and 1 rewritten"),
        (add_the_whole_residual, "CP403", "mixes rows"),
        (normalise_over_rows, "CP403", "mixes rows"),
        (flip_local_rows, "CP403", "mixes rows"),
        (transpose_the_query, "CP403", "query that is Local(dim 3"),
        (an_op_without_a_rule, "CP403", "mixes rows"),
        (slots_in_natural_order, "CP403", "writes rows and slots in different order"),
    ]
}


def test_the_graph_as_it_is_passes() -> None:
    verify(*rewritten(decoder(TOKENS)))


@pytest.mark.parametrize("name", SNIPPETS)
@pytest.mark.parametrize(("tokens", "cp_size"), [(8, 2), (13, 3)])
def test_snippets_as_they_are_pass(name: str, tokens: int, cp_size: int) -> None:
    snippet = SNIPPETS[name]
    verify(*rewritten(capture(traced(snippet, tokens), snippet.inputs(tokens)), cp_size))


@pytest.mark.parametrize(("mutate", "code", "says"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_graph_is_noticed(mutate: Mutate, code: str, says: str) -> None:
    graph, plan = rewritten(decoder(TOKENS))
    mutate(Graph(graph))
    graph.lint()
    with pytest.raises(VerifyError) as caught:
        verify(graph, plan)
    assert caught.value.code == code
    assert says in str(caught.value)


# -- masks -------------------------------------------------------------------------------------------------------------


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def with_mask(*shape: int) -> tuple[Graph, CPPlan]:
    inputs = (rand(1, 2, TOKENS, 8), rand(1, 2, TOKENS, 8), rand(1, 2, TOKENS, 8), rand(*shape))
    graph, plan = rewritten(traced(Snippet(masked, lambda tokens: inputs), TOKENS))
    verify(graph, plan)
    return Graph(graph), plan


def test_a_whole_mask_where_local_rows_are_meant() -> None:
    g, plan = with_mask(TOKENS, TOKENS)
    node = attention(g)
    g.set_arg(node, 3, node.args[3].args[0])  # type: ignore[union-attr]
    with pytest.raises(VerifyError, match=r"has a mask that is Full, not Local\(dim 0"):
        verify(g.graph, plan)


def test_a_mask_cut_along_its_keys() -> None:
    g, plan = with_mask(TOKENS, TOKENS)
    node = attention(g)
    g.set_arg(node, 3, g.make(node, canonical.shard.default, node.args[3].args[0], 1, 1, *LAYOUT))  # type: ignore[union-attr]
    with pytest.raises(VerifyError, match=r"has a mask that is Local\(dim 1 = tokens\), not Local\(dim 0"):
        verify(g.graph, plan)


def test_local_keys_of_a_mask_that_all_rows_share() -> None:
    g, plan = with_mask(1, 1, 1, TOKENS)
    node = attention(g)
    g.set_arg(node, 3, g.make(node, canonical.shard.default, node.args[3], 3, 1, *LAYOUT))
    with pytest.raises(VerifyError, match=r"has a mask that is Local\(dim 3 = tokens\), not Full"):
        verify(g.graph, plan)


# -- numbers that must agree -------------------------------------------------------------------------------------------

NUMBERS = {
    "gather: tokens": (canonical.gather.default, 3, [TOKENS - 1]),
    "gather: ranks": (canonical.gather.default, 4, 4),
    "gather: even": (canonical.gather.default, 5, False),
    "gather_rows: tokens": (canonical.gather_rows.default, 4, [TOKENS - 1]),
    "gather_rows: ranks": (canonical.gather_rows.default, 5, 4),
    "gather_rows: even": (canonical.gather_rows.default, 6, False),
    "attention: tokens": (canonical.attention.default, 6, [TOKENS - 1]),
    "attention: ranks": (canonical.attention.default, 7, 4),
    "attention: even": (canonical.attention.default, 8, False),
    "shard: tokens": (canonical.shard.default, 3, [TOKENS // 2]),
    "shard: ranks": (canonical.shard.default, 4, 4),
    "shard: even": (canonical.shard.default, 5, False),
}


@pytest.mark.parametrize(("op", "position", "value"), NUMBERS.values(), ids=NUMBERS.keys())
def test_every_op_has_the_tokens_and_ranks_of_the_plan(op: Any, position: int, value: Any) -> None:
    """One layout in a graph: an op that cuts or joins by another one gives wrong rows."""
    graph, plan = rewritten(decoder(TOKENS))
    g = Graph(graph)
    g.set_arg(g.of(op), position, value)
    with pytest.raises(VerifyError):
        verify(graph, plan)


# -- canonical ops on their own --------------------------------------------------------------------------------------

x = rand(1, 2, 8, 4)
CALLS: dict[str, Callable[[], Any]] = {
    "shard": lambda: canonical.shard(x, 2, 1, [8], 2, True),
    "gather": lambda: canonical.gather([x], [2], [1], [16], 2, True),
    "gather_rows": lambda: canonical.gather_rows(x, 2, -1, 1, [16], 2, True),
    "gather_rows_at": lambda: canonical.gather_rows_at(x, 2, torch.tensor([3]), [16], 2, True),
    "gathered_order": lambda: canonical.gathered_order(torch.arange(8), [8], 2, True),
    "fused_attention": lambda: canonical.fused_attention(
        x, x, x, *[None] * 7, [8], 2, True, "op", "BNSD", 2, 2, 1.0, 3, 0, 0, 0, 0, False
    ),
    "gather_sharded": lambda: canonical.gather_sharded([x], 2),
    "look_up_sharded": lambda: canonical.look_up_sharded(x, torch.tensor([3]), [16], 2, "first"),
    "fused_attention_sharded": lambda: canonical.fused_attention_sharded(
        x, x, x, None, None, None, [16], [16], 2, "first", "op", 2, 2, 1.0, 3, 0, 0, 0, 0, False
    ),
    "attention": lambda: canonical.attention(x, x, x, None, None, 0, [16], 2, True, True, 0, None),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_canonical_op_does_not_run(name: str) -> None:
    with pytest.raises(VerifyError, match=f"cppass::{name} ran without being lowered") as caught:
        CALLS[name]()
    assert caught.value.code == "CP401"
    assert "simulate" in caught.value.hint


def test_nor_does_a_graph_of_them() -> None:
    graph, _ = rewritten(traced(SNIPPETS["causal"], 8))
    assert any(n.target in CANONICAL for n in graph.nodes)
    with pytest.raises(VerifyError, match="CP401"):
        fx.GraphModule({}, graph)(*SNIPPETS["causal"].inputs(8))


def test_a_collective_is_not_read_before_its_wait() -> None:
    """Negative control of tests/composition/test_sequence_parallel.py: rows cut from what may not have arrived."""
    c10d = torch.ops._c10d_functional

    def run(x: Tensor) -> Tensor:
        return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, "tp")) + 1

    graph = make_fx(run, tracing_mode="fake")(torch.ones(4, 2)).graph
    check_waits(graph)
    started = next(n for n in graph.nodes if n.target is c10d.all_gather_into_tensor.default)
    waited = next(iter(started.users))
    waited.replace_all_uses_with(started)
    with pytest.raises(VerifyError, match=r"\[CP403\].*reads all_gather_into_tensor\S* before it has arrived"):
        check_waits(graph)
