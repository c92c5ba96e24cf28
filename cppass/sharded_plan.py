"""Graphs whose token-wise inputs arrive sharded: which values are local rows, what is gathered, and why not.

A model runner has cut the rows (cppass/runner.py), so the graph is a rank's graph already, but for three things: keys
and values travel, attention runs as two halves, and rows picked by number come from their owners. Nothing is sharded or
restored inside. So planning is typing: every value is a rank's own rows (it has a state) or the same on every rank,
and an op that would mix the two, or rows of one rank as if they were all, is refused.

before:  ids [m] local, slots [P * m] in gathered order, cu_q of all tokens
         cache = npu_scatter_nd_update(cache, slots, k [m])            attention(q [m], cache, actual_seq_qlen=cu_q)
after:   k, v = cppass.gather_sharded([k, v])                          one collective, [P * m] each
         cache = npu_scatter_nd_update(cache, slots, k)                cppass.fused_attention_sharded(q, cache, cu_q)
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import op_of, refuse
from cppass.layout import Zigzag
from cppass.match.kv import Write, write_of
from cppass.op_rules import rule_of
from cppass.rules import argument, is_tensor, shape_of, tensor_operands
from cppass.shard import numbers_rows
from cppass.sharded_ops import layout_of
from cppass.site import AttentionSite, Lengths, Rewrite
from cppass.tokens import Size, State, Tokens

aten = torch.ops.aten

ROWS = Tokens(0)  # TND: tokens in dimension 0
LOOKUPS = (aten.index_select.default, aten.index.Tensor)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows that `index` names by their natural number."""

    source: fx.Node
    index: fx.Node


@dataclasses.dataclass(frozen=True)
class ShardedPlan:
    """What to do with a graph of local rows. Rank-free.

    Attributes:
        sites: the attention sites, in graph order.
        cp_size, remainder: of the layout.
        ends: cumulative query lengths of the step, as ints or nodes; () where the graph has no site.
        rows: local rows m.
        entering: the inputs that arrive as local rows, with their state.
        groups: values that travel in one collective.
        writes: KV writes that take gathered rows: node -> the rows' sources.
        lookups: rows picked by number.
        states: of the values that are local rows; others are the same on every rank.
        refusals: why this graph cannot be rewritten; the rest means nothing then.
    """

    sites: tuple[AttentionSite, ...]
    cp_size: int
    remainder: str
    ends: Lengths
    rows: Size
    entering: dict[fx.Node, Tokens]
    groups: tuple[tuple[fx.Node, ...], ...]
    writes: dict[fx.Node, tuple[fx.Node, ...]]
    lookups: dict[fx.Node, Lookup]
    states: dict[fx.Node, State]
    refusals: tuple[Refusal, ...]


def make_sharded_plan(
    graph: fx.Graph, sites: tuple[AttentionSite, ...], entering: Mapping[fx.Node, Tokens], cp_size: int, remainder: str
) -> ShardedPlan:
    return _Planner(graph, sites, dict(entering), cp_size, remainder).plan()


class _Planner:
    def __init__(
        self,
        graph: fx.Graph,
        sites: tuple[AttentionSite, ...],
        entering: dict[fx.Node, Tokens],
        cp_size: int,
        remainder: str,
    ) -> None:
        self.graph, self.sites, self.entering = graph, sites, entering
        self.cp_size, self.remainder = cp_size, remainder
        self.site_of = {site.node: site for site in sites}
        self.states: dict[fx.Node, State] = dict(entering)
        self.rows = _rows_of(entering)
        self.written = _slot_writes(graph)
        self.traveling: dict[fx.Node, None] = {}
        self.writes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.lookups: dict[fx.Node, Lookup] = {}
        self.refusals: list[Refusal] = []

    def plan(self) -> ShardedPlan:
        self._check_sites()
        for node in self.graph.nodes:
            if self.refusals:
                break  # what follows from a refused value says nothing new
            if node.op == "call_function" and is_tensor(node):
                state = self._state(node)
                if state is not None:
                    self.states[node] = state
        return ShardedPlan(
            self.sites,
            self.cp_size,
            self.remainder,
            self.sites[0].ends if self.sites else (),
            self.rows,
            self.entering,
            self._groups(),
            self.writes,
            self.lookups,
            self.states,
            tuple(self.refusals),
        )

    # -- one node --

    def _state(self, node: fx.Node) -> State | None:
        if node in self.site_of:
            return self._site(self.site_of[node])
        operands = tensor_operands(node)
        given = tuple(self.states.get(x) for x in operands)
        if not any(given):
            return None
        if node in self.written:
            return self._write(node, operands)
        if node.target is operator.getitem and node.args[0] in self.site_of:
            return ROWS
        found = self._by_rule(node, operands, given)
        if found is not None:
            return found
        if self._look_up(node):
            return None
        return self._refuse_mixing(node, operands, given)

    def _by_rule(self, node: fx.Node, operands: list[fx.Node], given: tuple[State | None, ...]) -> State | None:
        rule = rule_of(node)
        schema = getattr(node.target, "_schema", None)
        if rule is None or (schema is not None and schema.is_mutable):
            return None
        for slot, state in enumerate(given):
            transfer = rule.forward(node, slot, state, self.rows) if state is not None else None
            if transfer is None:
                continue
            wanted = zip(operands, given, transfer.operands, strict=True)
            if all(have == want or (have is None and _counts_rows(x, want)) for x, have, want in wanted):
                return transfer.out
        return None

    def _site(self, site: AttentionSite) -> State | None:
        """Local queries; keys and values that travel, or whole ones from a cache that they are written to."""
        if self.states.get(site.query) != ROWS:
            return self._refuse_whole(site.node, site.query, "query")
        for part, read in ((site.key_fresh, site.key), (site.value_fresh, site.value)):
            if self.states.get(part.source) != ROWS:
                return self._refuse_whole(site.node, part.source, "key or value of this step")
            if not part.writes and read is not part.source:
                return self._refuse_form(site.node, "attention over a view of keys or values that no cache holds")
            self.traveling[part.source] = None
        return ROWS

    def _write(self, node: fx.Node, operands: list[fx.Node]) -> State | None:
        """Rows of all ranks go to slots in gathered order, into a cache that is the same on every rank."""
        writes = self.written[node]
        sources = tuple(w.rows for w in writes)
        for write in writes:
            if write.slots is None or write.dim != 0:
                return self._refuse_form(node, f"a KV write by {write.form}, which names no slot for each row")
            if self.states.get(write.rows) != ROWS:
                return self._refuse_whole(node, write.rows, "source of the KV write")
            if write.slots in self.states or not _equal(write.slots, 0, self.cp_size, self._local_rows()):
                return self._refuse(
                    "CP313",
                    node,
                    f"the KV write has {shape_of(write.slots)[0]} slots; gathered rows are {self.cp_size} ranks * "
                    f"{self.rows} local rows",
                    "hand the model the slot mapping in gathered order, padding included: plan.slot_mapping",
                )
        if any(x in self.states for x in operands if x not in sources):
            return self._refuse_whole(node, operands[0], "cache", "one that holds all rows")
        self.writes[node] = sources
        self.traveling.update(dict.fromkeys(sources))
        return None

    def _local_rows(self) -> Any:
        """m, as an int or a SymInt."""
        node = next(iter(self.entering))
        return node.meta["val"].shape[self.entering[node].dim]

    def _look_up(self, node: fx.Node) -> bool:
        """index_select(hidden, 0, rows), hidden[rows]: rows by their natural number."""
        if node.target not in LOOKUPS or not self.sites:
            return False
        source = tensor_operands(node)[0]
        if node.target is aten.index.Tensor:
            indices = argument(node, 1, "indices")
            index = indices[0] if len(indices) == 1 else None
        else:
            index = argument(node, 2, "index") if argument(node, 1, "dim") == 0 else None
        if not isinstance(index, fx.Node) or index in self.states or len(shape_of(index)) != 1:
            return False
        if self.states.get(source) != ROWS or index.meta["val"].dtype not in (torch.int32, torch.int64):
            return False
        self.lookups[node] = Lookup(source, index)
        return True

    # -- the step --

    def _check_sites(self) -> None:
        for site in self.sites:
            fused = site.fused
            if site.rewrite is not Rewrite.FUSED or fused is None or fused.input_layout != "TND" or not site.ends:
                self._refuse_form(site.node, f"attention of the form {site.form}")
                return
            if _values(site.ends) != _values(self.sites[0].ends):
                why = "attention over two sets of query lengths in one graph"
                self._refuse("CP105", site.node, why, "compile the parts on their own")
                return
            if fused.block_table is None and not _same_lengths(site.ends, fused.kv_lengths):
                self._refuse_form(site.node, "attention over packed keys that are more than this step's")
                return
        if self.sites and self.remainder == "balanced" and bool(self._local_rows() % 2 != 0):
            why = f"{self.rows} local rows cannot be two halves of as many rows (remainder='balanced')"
            self._refuse("CP114", self.sites[0].node, why, "shard by a plan with the remainder policy of the model")
        elif self.sites and not self._fits():
            ends = _values(self.sites[0].ends)
            self._refuse(
                "CP114",
                self.sites[0].node,
                f"a step of {ends[-1]} tokens does not fit {self.cp_size} ranks * {self.rows} local rows "
                f"(remainder={self.remainder!r})",
                "plan the step with a larger bucket, and hand the model the lengths of all tokens",
            )

    def _fits(self) -> bool:
        """Rank 0 has as many rows as any. The comparison is a guard: a later step that does not fit comes back here."""
        rows = self._local_rows()
        ends = _values(self.sites[0].ends)
        if self.remainder == "balanced":
            return bool(ends[-1] <= self.cp_size * rows)
        layout: Zigzag = layout_of(ends, self.cp_size, "first", rows)
        return bool(layout.real_rows(0) <= rows)

    def _groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        """Keys and values of a site in one collective, other written rows in one of their own; one per dtype."""
        groups: list[tuple[fx.Node, ...]] = []
        left = dict(self.traveling)
        for site in self.sites:
            pair = dict.fromkeys(x for x in (site.key_fresh.source, site.value_fresh.source) if x in left)
            groups += _by_dtype(list(pair))
            left = {node: None for node in left if node not in pair}
        return (*groups, *((node,) for node in left))

    # -- refusals --

    def _refuse(self, code: str, node: fx.Node, why: str, hint: str) -> State | None:
        self.refusals.append(refuse(code, node, why, hint))
        return None

    def _refuse_form(self, node: fx.Node, what: str) -> State | None:
        return self._refuse(
            "CP113",
            node,
            f"inputs='sharded' does not take {what}",
            "fused-infer-attention in TND with query lengths as a list of ints, and a KV write with one slot a row "
            "(npu_scatter_nd_update_, npu_scatter_pa_kv_cache); or inputs='replicated'",
        )

    def _refuse_whole(self, node: fx.Node, value: fx.Node, role: str, meant: str = "local rows") -> State | None:
        seen = self.states.get(value) or "the same on every rank"
        return self._refuse(
            "CP311",
            node,
            f"the {role} ({value.name}) is {seen}, where {meant} is meant",
            "name every token-wise input, and no other, in sharded_inputs; of this graph: "
            + ", ".join(str(n.target) for n in self.entering),
        )

    def _refuse_mixing(self, node: fx.Node, operands: list[fx.Node], given: tuple[State | None, ...]) -> State | None:
        seen = ", ".join(f"{x.name}: {s or 'whole'}" for x, s in zip(operands, given, strict=True))
        what = "has no rule" if rule_of(node) is None else "mixes rows of different ranks"
        return self._refuse(
            "CP310",
            node,
            f"{op_of(node)} {what}, and with inputs='sharded' nothing but K and V is gathered ({seen})",
            "pick rows by index_select(hidden, 0, cu_q - 1), hand token-wise inputs in by sharded_inputs, or leave the "
            "op to the runner",
        )


def _rows_of(entering: Mapping[fx.Node, Tokens]) -> Size:
    sizes = [shape_of(node)[state.dim] for node, state in entering.items()]
    return sizes[0] if sizes else 0


def _slot_writes(graph: fx.Graph) -> dict[fx.Node, list[Write]]:
    """KV writes by the node that writes."""
    found: dict[fx.Node, list[Write]] = {}
    for node in graph.nodes:
        write = write_of(node) if is_tensor(node) else None
        if write is not None and write.form != "cat":
            found.setdefault(write.node, []).append(write)
    return found


def _counts_rows(node: fx.Node, state: State | None) -> bool:
    return state is not None and numbers_rows(node, state)


def _equal(node: fx.Node, dim: int, factor: int, rows: Any) -> bool:
    """Whether a size is factor * rows; a guard where it is symbolic."""
    return bool(node.meta["val"].shape[dim] == factor * rows)


def _values(lengths: Any) -> list[Any]:
    return [n.meta["val"] if isinstance(n, fx.Node) else n for n in lengths]


def _same_lengths(ends: Lengths, kv: Any) -> bool:
    return isinstance(kv, tuple) and len(kv) == len(ends) and all(
        bool(a == b) for a, b in zip(_values(ends), _values(kv), strict=True)
    )  # fmt: skip


def _by_dtype(nodes: list[fx.Node]) -> list[tuple[fx.Node, ...]]:
    groups: dict[torch.dtype, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(node.meta["val"].dtype, []).append(node)
    return [tuple(group) for group in groups.values()]
