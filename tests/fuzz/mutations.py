"""Ways of breaking a rewritten graph, each at a random place: what a faulty rule, plan or rewriter might leave behind.

A mutation edits a graph in place. It returns False where the graph has no place for it.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from fuzz.editing import before, calls, kind_of, of, one_of, replace_operand, set_named
from torch import fx

from cppass.ops import CANONICAL, named_arguments
from cppass.rules import name_of, tensor_operands, writes

aten, canonical = torch.ops.aten, torch.ops.cppass
Mutate = Callable[[fx.Graph, random.Random], bool]

ATTENTION = {
    canonical.attention.default,
    canonical.fused_attention.default,
    canonical.fused_attention_sharded.default,
}
GATHERS = {canonical.gather.default, canonical.gather_sharded.default}
PICKS = {canonical.gather_rows.default, canonical.gather_rows_at.default, canonical.look_up_sharded.default}
CACHE_WRITES = {
    *("aten::index_copy", "aten::index_put", "aten::slice_scatter", "aten::cat", "aten::scatter"),
    *("npu::npu_scatter_nd_update", "npu::npu_scatter_pa_kv_cache_functional", "npu::scatter_update"),
}


# -- operands ----------------------------------------------------------------------------------------------------------


def swap_operands(graph: fx.Graph, r: random.Random) -> bool:
    def like(node: fx.Node) -> list[tuple[int, int]]:
        xs = tensor_operands(node)
        return [
            (i, j)
            for i in range(len(xs))
            for j in range(i)
            if xs[i] is not xs[j]
            and all(isinstance(x.meta["val"], torch.Tensor) for x in (xs[i], xs[j]))
            and kind_of(xs[i]) == kind_of(xs[j])
        ]

    node = one_of(r, [n for n in calls(graph) if like(n)])
    if node is None:
        return False
    i, j = r.choice(like(node))
    a, b = tensor_operands(node)[i], tensor_operands(node)[j]
    replace_operand(node, i, b)
    replace_operand(node, j, a)
    return True


def another_operand(graph: fx.Graph, r: random.Random) -> bool:
    """Another value of the same shape and dtype."""
    node = one_of(r, [n for n in graph.nodes if n.op in ("call_function", "output") and tensor_operands(n)])
    operands = tensor_operands(node)
    place = r.randrange(len(operands))
    old = operands[place]
    if not isinstance(old.meta["val"], torch.Tensor):
        return False
    others = [x for x in before(graph, node) if x is not old and kind_of(x) == kind_of(old)]
    if not others:
        return False
    replace_operand(node, place, r.choice(others))
    return True


def operand_of_other_rows(graph: fx.Graph, r: random.Random) -> bool:
    """A value with another number of rows: local for whole, whole for local."""
    node = one_of(r, [n for n in calls(graph) if tensor_operands(n)])
    operands = tensor_operands(node)
    place = r.randrange(len(operands))
    old = operands[place]
    if not isinstance(old.meta["val"], torch.Tensor):
        return False

    def one_size_off(x: fx.Node) -> bool:
        a, b = x.meta["val"], old.meta["val"]
        return a.dtype == b.dtype and a.dim() == b.dim() and sum(m != n for m, n in zip(a.shape, b.shape)) == 1  # noqa: B905

    others = [x for x in before(graph, node) if one_size_off(x)]
    if not others:
        return False
    replace_operand(node, place, r.choice(others))
    return True


def swap_keys_and_values(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, ATTENTION))
    if node is None:
        return False
    given = named_arguments(node)
    set_named(node, k=given["v"], v=given["k"])
    return given["k"] is not given["v"]


def swap_inside_a_gather(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, [n for n in of(graph, GATHERS) if len(named_arguments(n)["xs"]) > 1])
    if node is None:
        return False
    first, second, *rest = named_arguments(node)["xs"]
    set_named(node, xs=[second, first, *rest])
    return True


def another_query(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, ATTENTION))
    if node is None:
        return False
    query = named_arguments(node)["q"]
    others = [x for x in before(graph, node) if x is not query and kind_of(x) == kind_of(query)]
    if not others:
        return False
    set_named(node, q=r.choice(others))
    return True


# -- collectives and shards --------------------------------------------------------------------------------------------


def drop_a_gather(graph: fx.Graph, r: random.Random) -> bool:
    gathered = [n for n in calls(graph) if n.target is operator.getitem and n.args[0].target in GATHERS]  # type: ignore[union-attr]
    node = one_of(r, [n for n in gathered if n.users])
    if node is None:
        return False
    local = named_arguments(node.args[0])["xs"][node.args[1]]
    user = r.choice(list(node.users))
    user.replace_input_with(node, local)
    return True


def drop_a_shard(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, {canonical.shard.default, canonical.gathered_order.default}))
    if node is None:
        return False
    whole = named_arguments(node)["x"]
    for user in list(node.users) if r.random() < 0.5 else [r.choice(list(node.users))]:
        user.replace_input_with(node, whole)
    return True


def gather_another_value(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, GATHERS | PICKS))
    if node is None:
        return False
    old = one_of(r, tensor_operands(node))
    others = [x for x in before(graph, node) if x is not old and kind_of(x) == kind_of(old)]
    if not others:
        return False
    node.replace_input_with(old, r.choice(others))
    return True


def another_layout(graph: fx.Graph, r: random.Random) -> bool:
    """Lengths, ranks, evenness, remainder of one canonical op."""
    node = one_of(r, of(graph, set(CANONICAL)))
    given = named_arguments(node)
    name = r.choice([x for x in ("lengths", "cp_size", "even", "q_lengths", "remainder") if given.get(x) is not None])
    if name == "cp_size":
        set_named(node, cp_size=given[name] + r.choice([-1, 1]))
    elif name == "even":
        set_named(node, even=not given[name])
    elif name == "remainder":
        set_named(node, remainder="first" if given[name] == "balanced" else "balanced")
    else:
        lengths = list(given[name])
        at = r.randrange(len(lengths))
        lengths[at] = lengths[at] + r.choice([-1, 1])
        set_named(node, **{name: lengths})
    return True


def another_axis(graph: fx.Graph, r: random.Random) -> bool:
    """Of a canonical op: the dimension with the tokens, or their factor."""
    node = one_of(r, [n for n in of(graph, set(CANONICAL)) if {"dim", "dims"} & named_arguments(n).keys()])
    if node is None:
        return False
    given = named_arguments(node)
    if "dims" in given:
        place = r.randrange(len(given["dims"]))
        name = r.choice(["dims", "inners"])
        changed = list(given[name])
        changed[place] = changed[place] + 1 if name == "dims" else changed[place] * 2
        set_named(node, **{name: changed})
    elif "inner" in given and r.random() < 0.3:
        set_named(node, inner=given["inner"] * 2)
    else:
        set_named(node, dim=(given["dim"] + r.choice([1, 2])) % named_arguments(node)["x"].meta["val"].dim())
    return True


def other_rows_picked(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, {canonical.gather_rows.default}))
    if node is None:
        return False
    given = named_arguments(node)
    set_named(node, start=given["start"] + r.choice([-1, 1]))
    return True


def unmarked_order(graph: fx.Graph, r: random.Random) -> bool:
    """Gathered rows are taken for rows in natural order, or the other way round."""
    node = one_of(r, of(graph, {canonical.gather.default}))
    if node is None:
        return False
    set_named(node, natural=not named_arguments(node)["natural"])
    return True


# -- attention ---------------------------------------------------------------------------------------------------------


def another_prefix(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, ATTENTION))
    if node is None:
        return False
    given = named_arguments(node)
    if "kv_lengths" in given:
        if given["kv_lengths"] is None:
            return False
        set_named(node, kv_lengths=[n - 1 for n in given["kv_lengths"]])
    elif given["prefix_tensor"] is not None and r.random() < 0.5:
        set_named(node, prefix_tensor=None)
    else:
        set_named(node, prefix=given["prefix"] + r.choice([-1, 1]))
    return True


def another_option_of_attention(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, ATTENTION))
    if node is None:
        return False
    given = named_arguments(node)
    if "window" in given:
        changes: list[dict[str, Any]] = [
            {"window": given["window"] + 1},
            {"scale": 0.1},
            {"causal": not given["causal"]},
            {"mask": None, "causal": given["mask"] is not None or given["causal"]},
        ]
    else:
        changes = [{"scale": given["scale"] * 2}, {"sparse_mode": 0}, {"sparse_mode": 4, "pre_tokens": 1}]
    set_named(node, **r.choice(changes))
    return True


# -- caches ------------------------------------------------------------------------------------------------------------


def _written(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in calls(graph) if name_of(n) in CACHE_WRITES and isinstance(n.meta["val"], torch.Tensor)]


def drop_a_write(graph: fx.Graph, r: random.Random) -> bool:
    """What read the written cache reads the one before."""
    node = one_of(r, [n for n in _written(graph) if kind_of(n) == kind_of(tensor_operands(n)[0]) and n.users])
    if node is None:
        return False
    for user in list(node.users) if r.random() < 0.5 else [r.choice(list(node.users))]:
        user.replace_input_with(node, tensor_operands(node)[0])
    return True


def write_twice(graph: fx.Graph, r: random.Random) -> bool:
    """The same rows once more, on top of what was written."""
    node = one_of(r, [n for n in _written(graph) if kind_of(n) == kind_of(tensor_operands(n)[0]) and n.users])
    if node is None:
        return False
    with graph.inserting_after(node):
        again = graph.node_copy(node)
    node.replace_all_uses_with(again)
    replace_operand(again, 0, node)
    return True


def exchange_writes(graph: fx.Graph, r: random.Random) -> bool:
    """Two inputs take each other's values."""
    copies = [n for n in calls(graph) if writes(n) and len(tensor_operands(n)) == 2]
    if len(copies) < 2:
        return False
    a, b = r.sample(copies, 2)
    first, second = tensor_operands(a)[1], tensor_operands(b)[1]
    replace_operand(a, 1, second)
    replace_operand(b, 1, first)
    return kind_of(first) == kind_of(second) and first is not second


def lose_a_write(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, [n for n in calls(graph) if writes(n) and not n.users])
    if node is None:
        return False
    graph.erase_node(node)
    return True


# -- ordinary ops ------------------------------------------------------------------------------------------------------

ALIKE = {
    aten.add.Tensor: aten.sub.Tensor,
    aten.sub.Tensor: aten.add.Tensor,
    aten.mul.Tensor: aten.add.Tensor,
    aten.cos.default: aten.sin.default,
    aten.sin.default: aten.cos.default,
    aten.rsqrt.default: aten.sqrt.default,
    aten.silu.default: aten.gelu.default,
    aten.le.Tensor: aten.lt.Tensor,
    aten.amax.default: aten.amin.default,
    aten.maximum.default: aten.minimum.default,
}


def another_op(graph: fx.Graph, r: random.Random) -> bool:
    node = one_of(r, of(graph, set(ALIKE)))
    if node is None:
        return False
    node.target = ALIKE[node.target]
    return True


def another_number(graph: fx.Graph, r: random.Random) -> bool:
    """A dimension, start, size or factor among the arguments of an ordinary op."""

    def numbers(node: fx.Node) -> list[int]:
        return [i for i, a in enumerate(node.args) if type(a) in (int, float)]

    node = one_of(r, [n for n in calls(graph) if n.target not in CANONICAL and numbers(n)])
    if node is None:
        return False
    place = r.choice(numbers(node))
    changed = node.args[place] + r.choice([-1, 1])  # type: ignore[operator]
    node.args = (*node.args[:place], changed, *node.args[place + 1 :])
    return True


def one_op_more(graph: fx.Graph, r: random.Random) -> bool:
    def floating(node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.is_floating_point() and bool(node.users)

    node = one_of(r, [n for n in calls(graph) if floating(n)])
    user = r.choice(list(node.users))
    with graph.inserting_before(user):
        made = graph.call_function(r.choice([aten.neg.default, aten.relu.default, aten.tanh.default]), (node,))
    user.replace_input_with(node, made)
    return True


def swap_outputs(graph: fx.Graph, r: random.Random) -> bool:
    output = graph.find_nodes(op="output")[0]
    returned = output.args[0]
    if not isinstance(returned, (list, tuple)) or len(returned) < 2:
        return False
    a, b = r.sample(range(len(returned)), 2)
    swapped = list(returned)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    output.args = (type(returned)(swapped),)
    return returned[a] is not returned[b]


MUTATIONS: dict[str, Mutate] = {
    "operands swapped": swap_operands,
    "another operand of that shape": another_operand,
    "local for whole, or whole for local": operand_of_other_rows,
    "keys and values swapped": swap_keys_and_values,
    "swapped inside a gather": swap_inside_a_gather,
    "another query": another_query,
    "a gather dropped": drop_a_gather,
    "a shard dropped": drop_a_shard,
    "another value gathered": gather_another_value,
    "another layout": another_layout,
    "another axis": another_axis,
    "other rows picked": other_rows_picked,
    "order of gathered rows": unmarked_order,
    "another prefix": another_prefix,
    "another option of attention": another_option_of_attention,
    "cache read before its write": drop_a_write,
    "written twice": write_twice,
    "writes exchanged": exchange_writes,
    "a write lost": lose_a_write,
    "another op": another_op,
    "another number": another_number,
    "one op more": one_op_more,
    "outputs swapped": swap_outputs,
}
