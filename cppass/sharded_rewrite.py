"""Follow a plan for sharded inputs: the graph as it is, but for gathers, sites and rows picked by number.

before:  cache = npu_scatter_nd_update(cache, slots, k)
         out = fused_infer_attention(q, cache, ..., actual_seq_qlen=cu_q)
         last = index_select(hidden, 0, cu_q - 1)
after:   k, v = cppass.gather_sharded([k, v], P)
         cache = npu_scatter_nd_update(cache, slots, k)
         out = cppass.fused_attention_sharded(q, cache, ..., cu_q, P, ...)
         last = cppass.look_up_sharded(hidden, cu_q - 1, cu_q, P, ...)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import cppass.ops  # noqa: F401  (defines torch.ops.cppass)
from cppass.builder import Builder
from cppass.rules import is_tensor
from cppass.sharded_plan import ShardedPlan
from cppass.site import AttentionSite, readers

OPTIONS = (
    *("num_heads", "num_key_value_heads", "scale", "sparse_mode", "pre_tokens", "next_tokens"),
    *("block_size", "inner_precise", "lse"),
)


def rewrite_sharded(graph: fx.Graph, plan: ShardedPlan) -> fx.Graph:
    """The graph that `plan` asks for: canonical ops, metadata filled in, dead code gone.

    Numerics: every row is computed by the ops that the model has, over a rank's rows; gathers move bits unchanged.
    """
    rewritten = _Rewriter(graph, plan).build()
    rewritten.eliminate_dead_code()
    rewritten.lint()
    return rewritten


class _Rewriter(Builder):
    def __init__(self, graph: fx.Graph, plan: ShardedPlan) -> None:
        super().__init__(graph)
        self.plan = plan
        self.site_of = {site.node: site for site in plan.sites}
        self.reader_of = readers(plan.sites)
        self.group_of = {node: group for group in plan.groups for node in group}
        self.values: dict[fx.Node, fx.Node] = {}
        self.gathered: dict[fx.Node, fx.Node] = {}

    def build(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "output":
                self.new.output(fx.map_arg(node.args[0], self.value))
            elif node.op == "placeholder" or node.users or node.is_impure():
                self.value(node)
        return self.new

    def value(self, node: fx.Node) -> fx.Node:
        """What stands for a node in the new graph; made on demand, since a gather may need a later value first."""
        if node not in self.values:
            outer, self.origin = self.origin, node
            self.values[node] = self._made(node)
            self.origin = outer
        return self.values[node]

    def _made(self, node: fx.Node) -> fx.Node:
        if node in self.site_of:
            return self._attention(self.site_of[node])
        if node in self.plan.lookups:
            return self._looked_up(node)
        sources = self.plan.writes.get(node, ())
        return self.new.node_copy(node, lambda x: self.whole(x) if x in sources else self.value(x))

    def whole(self, source: fx.Node) -> fx.Node:
        """Rows of all ranks, in gathered order: all members of its group travel in one collective."""
        if source not in self.gathered:
            group = self.group_of[source]
            values = [self.value(member) for member in group]
            outer, self.origin = self.origin, self.reader_of.get(source, self.origin)
            made = self.emit(torch.ops.cppass.gather_sharded.default, (values, self.plan.cp_size))
            for i, member in enumerate(group):
                self.gathered[member] = self.emit(operator.getitem, (made, i))
            self.origin = outer
        return self.gathered[source]

    def _attention(self, site: AttentionSite) -> fx.Node:
        """Both results of the op, for this rank's rows."""
        fused = site.fused
        assert fused is not None
        parts = ((site.key, site.key_fresh), (site.value, site.value_fresh))
        key, value = (self.value(read) if part.writes else self.whole(part.source) for read, part in parts)
        tensors = [None if x is None else self.value(x) for x in (site.mask, fused.block_table, fused.sink)]
        options = [getattr(fused, name) for name in OPTIONS]
        given = (self.value(site.query), key, value, *tensors, self._numbers(fused.q_lengths))
        return self.emit(
            torch.ops.cppass.fused_attention_sharded.default,
            (*given, self._numbers(fused.kv_lengths), *self._layout()[1:], str(fused.op), *options),
        )

    def _looked_up(self, node: fx.Node) -> fx.Node:
        rows = self.plan.lookups[node]
        given = self.value(rows.source), self.value(rows.index), *self._layout()
        return self.emit(torch.ops.cppass.look_up_sharded.default, given)

    def _layout(self) -> tuple[list[Any], int, str]:
        return self._numbers(self.plan.ends), self.plan.cp_size, self.plan.remainder

    def _numbers(self, lengths: Any) -> list[Any]:
        assert isinstance(lengths, tuple) and not any(is_tensor(n) for n in lengths if isinstance(n, fx.Node))
        return [self.value(n) if isinstance(n, fx.Node) else n for n in lengths]
