"""verify_sharded notices edits of a rewritten graph that put rows of one rank where rows of all are meant, and such.

Each mutation keeps the graph well-formed: values of the right kind in the wrong place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runner.sharded_snippets import BATCH, CP, NAMED, PLAN, Layer, attend, layer_of, rows_of, traced
from torch import Tensor, fx

from cppass.capture import capture
from cppass.errors import VerifyError
from cppass.match import find_sites
from cppass.ops import named_arguments
from cppass.prepare import prepare
from cppass.sharded_inputs import entering_inputs
from cppass.sharded_plan import ShardedPlan, make_sharded_plan
from cppass.sharded_rewrite import rewrite_sharded
from cppass.sharded_verify import verify_sharded
from cppass.torch_private import fake_mode_of

aten, canonical = torch.ops.aten, torch.ops.cppass
GATHER, LOOK_UP = canonical.gather_sharded.default, canonical.look_up_sharded.default
ATTENTION, WRITE = canonical.fused_attention_sharded.default, torch.ops.npu.npu_scatter_nd_update.default


class Graph:
    """A rewritten graph, with short names for what mutations need."""

    def __init__(self, packed: bool) -> None:
        inputs = (PLAN.shard(rows_of(BATCH)), *layer_of(BATCH, PLAN).tensors)

        def run(x: Tensor, *tensors: Tensor) -> Tensor:
            layer = Layer(*tensors)
            return attend(x, layer, packed=packed).index_select(0, layer.last - 1)

        graph = prepare(capture(traced(run, inputs), inputs))
        entering = entering_inputs(graph, NAMED.items(), None)
        self.plan: ShardedPlan = make_sharded_plan(graph, find_sites(graph).sites, entering, CP, "balanced")
        assert not self.plan.refusals
        self.graph = rewrite_sharded(graph, self.plan)

    def of(self, target: Any, at: int = 0) -> fx.Node:
        return self.graph.find_nodes(op="call_function", target=target)[at]

    @property
    def output(self) -> fx.Node:
        return self.graph.find_nodes(op="output")[0]

    def gathered(self, at: int = 0) -> fx.Node:
        """Rows of all ranks: keys, values."""
        return next(n for n in self.of(GATHER).users if n.args[1] == at)

    def local(self, at: int = 0) -> fx.Node:
        """Rows of this rank: keys, values."""
        return self.of(GATHER).args[0][at]  # type: ignore[index,return-value]

    def make(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        with fake_mode_of(self.graph):  # type: ignore[union-attr]
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def set(self, node: fx.Node, **given: Any) -> None:
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        values = named_arguments(node) if node.target is not WRITE else dict(zip(names, node.args, strict=False))
        assert given.keys() <= values.keys()
        node.args, node.kwargs = tuple((values | given)[name] for name in names if name in values), {}


Mutate = Callable[[Graph], None]


def local_rows_in_a_write(g: Graph) -> None:
    g.set(g.of(WRITE), updates=g.local())


def local_rows_in_the_other_write(g: Graph) -> None:
    g.set(g.of(WRITE, 1), updates=g.local(1))


def slots_of_one_rank(g: Graph) -> None:
    write = g.of(WRITE)
    g.set(write, indices=g.make(write, aten.slice.Tensor, write.args[1], 0, 0, PLAN.rows))


def a_cache_of_local_rows(g: Graph) -> None:
    """Local rows as the cache that is written."""
    g.set(g.of(WRITE), input=g.local())


def whole_queries(g: Graph) -> None:
    node = g.of(ATTENTION)
    q = g.make(node, GATHER, [named_arguments(node)["q"]], CP)
    g.set(node, q=g.make(node, operator.getitem, q, 0))


def queries_of_nobody(g: Graph) -> None:
    """Queries that are the same on every rank."""
    node = g.of(ATTENTION)
    q = named_arguments(node)["q"]
    value = q.meta["val"]
    g.set(node, q=g.make(node, aten.full.default, list(value.shape), 1.0))


def local_keys(g: Graph) -> None:
    g.set(g.of(ATTENTION), k=g.local())


def local_values(g: Graph) -> None:
    g.set(g.of(ATTENTION), v=g.local(1))


def keys_of_a_gather_of_a_gather(g: Graph) -> None:
    first = g.gathered()
    again = g.make(first.next, GATHER, [first], CP)
    g.set(g.of(WRITE), updates=g.make(again.next, operator.getitem, again, 0))


def a_gather_of_whole_rows(g: Graph) -> None:
    gather = g.of(GATHER)
    whole = g.make(gather, aten.full.default, list(g.local().meta["val"].shape), 1.0)
    g.set(gather, xs=[whole, g.local(1)])


def a_gather_over_more_ranks(g: Graph) -> None:
    g.set(g.of(GATHER), cp_size=2 * CP)


def attention_of_more_ranks(g: Graph) -> None:
    g.set(g.of(ATTENTION), cp_size=2 * CP)


def attention_of_another_policy(g: Graph) -> None:
    g.set(g.of(ATTENTION), remainder="first")


def attention_of_another_step(g: Graph) -> None:
    g.set(g.of(ATTENTION), q_lengths=[14, 63, 64])


def rows_looked_up_in_another_step(g: Graph) -> None:
    g.set(g.of(LOOK_UP), q_lengths=[14, 63, 64])


def rows_looked_up_among_more_ranks(g: Graph) -> None:
    g.set(g.of(LOOK_UP), cp_size=2 * CP)


def rows_looked_up_by_another_policy(g: Graph) -> None:
    g.set(g.of(LOOK_UP), remainder="first")


def rows_looked_up_on_this_rank(g: Graph) -> None:
    """A plain look-up where the owners are to be asked."""
    node = g.of(LOOK_UP)
    node.replace_all_uses_with(g.make(node, aten.index_select.default, node.args[0], 0, node.args[1]))


def rows_looked_up_by_local_numbers(g: Graph) -> None:
    node = g.of(LOOK_UP)
    x = node.args[0]
    g.set(node, index=g.make(node, aten.argmax.default, x, 1))


def rows_looked_up_among_whole_ones(g: Graph) -> None:
    node = g.of(LOOK_UP)
    x = node.args[0]
    g.set(node, x=g.make(node, aten.full.default, list(x.meta["val"].shape), 1.0))  # type: ignore[union-attr]


def rows_in_gathered_order_leave(g: Graph) -> None:
    g.output.args = (g.gathered(),)


def rows_made_of_gathered_ones_leave(g: Graph) -> None:
    g.output.args = (g.make(g.output, aten.mul.Tensor, g.gathered(), 2.0),)


def rows_summed_over_ranks(g: Graph) -> None:
    g.output.args = (g.make(g.output, aten.sum.dim_IntList, g.gathered(), [0]),)


def attention_is_lost(g: Graph) -> None:
    node = g.of(ATTENTION)
    rows = g.make(node, aten.clone.default, named_arguments(node)["q"])
    for user in list(node.users):
        user.replace_all_uses_with(rows)
        g.graph.erase_node(user)
    g.graph.erase_node(node)


EVERYWHERE: list[Mutate] = [
    local_rows_in_a_write,
    local_rows_in_the_other_write,
    slots_of_one_rank,
    a_cache_of_local_rows,
    whole_queries,
    queries_of_nobody,
    keys_of_a_gather_of_a_gather,
    a_gather_of_whole_rows,
    a_gather_over_more_ranks,
    attention_of_more_ranks,
    attention_of_another_policy,
    attention_of_another_step,
    local_keys,
    local_values,
    rows_looked_up_in_another_step,
    rows_looked_up_among_more_ranks,
    rows_looked_up_by_another_policy,
    rows_looked_up_on_this_rank,
    rows_looked_up_by_local_numbers,
    rows_looked_up_among_whole_ones,
    rows_in_gathered_order_leave,
    rows_made_of_gathered_ones_leave,
    rows_summed_over_ranks,
]


@pytest.mark.parametrize("packed", [False, True], ids=["paged", "packed"])
def test_a_rewritten_graph_is_legal(packed: bool) -> None:
    """Control."""
    g = Graph(packed)
    verify_sharded(g.graph, g.plan)


@pytest.mark.parametrize("packed", [False, True], ids=["paged", "packed"])
@pytest.mark.parametrize("mutate", EVERYWHERE, ids=lambda f: f.__name__)
def test_an_illegal_graph_is_noticed(mutate: Mutate, packed: bool) -> None:
    g = Graph(packed)
    mutate(g)
    g.graph.lint()
    with pytest.raises(VerifyError, match="CP403"):
        verify_sharded(g.graph, g.plan)


def test_a_site_that_is_lost_is_noticed() -> None:
    g = Graph(False)
    attention_is_lost(g)
    with pytest.raises(VerifyError, match=r"CP402.*1 attention sites were found and 0 rewritten"):
        verify_sharded(g.graph, g.plan)


def swapped_operands_of_a_gather(g: Graph) -> None:
    """Keys travel as values and values as keys."""
    g.set(g.of(GATHER), xs=[g.local(1), g.local()])


def attention_over_the_cache_before_the_write(g: Graph) -> None:
    write = g.of(WRITE)
    write.replace_all_uses_with(write.args[0])  # type: ignore[arg-type]


def test_attention_reads_the_cache_that_was_written() -> None:
    g = Graph(False)
    attention_over_the_cache_before_the_write(g)
    with pytest.raises(VerifyError, match=r"\[CP403\].*reads a cache as k that this step's rows are not written to"):
        verify_sharded(g.graph, g.plan)


@pytest.mark.parametrize("packed", [False, True], ids=["paged", "packed"])
def test_keys_and_values_keep_their_places(packed: bool) -> None:
    """Rows of the right kind, of the wrong value: types cannot notice, the model's values do (cppass/values.py)."""
    g = Graph(packed)
    swapped_operands_of_a_gather(g)
    with pytest.raises(VerifyError, match=r"\[CP403\].*(does not have there|has together)"):
        verify_sharded(g.graph, g.plan)
