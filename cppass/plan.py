"""Two-value token propagation, second half: what is demanded, how each value is made, where rows travel.

Demands run from the end of the graph to its start. Outputs, side effects and ops without a way demand Full values; a
site demands Local queries and gathered keys and values. For every demanded value the plan says how it is made. It
changes nothing: cppass/rewrite.py follows it.

before:  k = rope(view(mm(x, wk)))    cache' = index_copy(cache, 2, positions, k)    attention(q, cache', ...)
plan:    k  Local by its way, Full by GATHER (with v: one collective)
         cache'  Full by COMPUTE        positions  Full by COMPUTE, Local by SHARD (for rope)
         attention  Local, as a site
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

import torch
from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import op_of, refuse
from cppass.match.kv import SAME, VIEWS
from cppass.op_rules import factors, is_matmul, row_selection, rule_of
from cppass.order import SlotWrite, slot_writes
from cppass.rules import Transfer, is_random, is_tensor, shape_of, tensor_operands, writes
from cppass.shard import Propagation, numbers_rows
from cppass.site import AttentionSite, Rewrite
from cppass.step import Step
from cppass.tokens import Size, State, Tokens, divide, product

aten = torch.ops.aten


class Full(enum.Enum):
    """How a Full value is made."""

    GIVEN = "given"  # placeholders and attributes
    COMPUTE = "compute"  # from Full operands, on every rank
    GATHER = "gather"  # from every rank's Local value
    ROWS = "rows"  # a few rows of a Local value (the last token): only they travel
    LOOKUP = "lookup"  # rows of a Local value that an index names (the last token of each sequence)


class Local(enum.Enum):
    """How a Local value is made, where it is not computed by a way."""

    SHARD = "shard"  # this rank's rows of the Full value
    SITE = "site"  # the attention of a site
    NUMBER = "number"  # arange over local rows


@dataclasses.dataclass(frozen=True)
class RowSelection:
    source: fx.Node
    state: Tokens
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class RowLookup:
    source: fx.Node
    state: Tokens
    index: fx.Node


@dataclasses.dataclass(frozen=True)
class Gathered:
    """A value that travels besides the K/V of a site, and why."""

    node: fx.Node
    why: str
    expected: bool  # True for outputs: there is no way around them


@dataclasses.dataclass(frozen=True)
class CPPlan:
    """What to do with every node. Rank-free.

    Attributes:
        sites: the attention sites, in graph order.
        step: the sequences and their layout.
        full: how each demanded Full value is made.
        local: how each demanded Local value is made, per state.
        groups: sets of values whose rows travel in one collective; the first is named by the site.
        gather_states: the Local state each Full.GATHER value is gathered from.
        selections, lookups: details of the Full.ROWS and Full.LOOKUP nodes.
        slot_writes: writes of rows in gathered order: to the rows' slots in the same order (cppass/order.py).
        gathered: what travels besides K/V.
        refusals: why this graph cannot be rewritten; the rest of the plan means nothing then.
    """

    sites: tuple[AttentionSite, ...]
    step: Step
    full: dict[fx.Node, Full]
    local: dict[fx.Node, dict[State, Transfer | Local]]
    groups: tuple[tuple[tuple[fx.Node, Tokens], ...], ...]
    gather_states: dict[fx.Node, Tokens]
    selections: dict[fx.Node, RowSelection]
    lookups: dict[fx.Node, RowLookup]
    slot_writes: dict[fx.Node, SlotWrite]
    gathered: tuple[Gathered, ...]
    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        layout = self.step.layout
        lines = [f"plan: {len(self.sites)} sites, {layout.tokens} tokens over {layout.cp_size} ranks"]
        for node, how in self.full.items():
            if how in (Full.GATHER, Full.ROWS):
                lines.append(f"  {node.name}: {how.value}")
        for node, states in self.local.items():
            lines += [f"  {node.name}: {h.value} {s}" for s, h in states.items() if isinstance(h, Local)]
        return "\n".join(lines)


def make_plan(
    graph: fx.Graph, sites: tuple[AttentionSite, ...], reach: Propagation, step: Step, strict: bool
) -> CPPlan:
    return _Planner(graph, sites, reach, step, strict).plan()


class _Planner:
    def __init__(
        self, graph: fx.Graph, sites: tuple[AttentionSite, ...], reach: Propagation, step: Step, strict: bool
    ) -> None:
        self.graph, self.sites, self.reach, self.step, self.strict = graph, sites, reach, step, strict
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.rewritten = {s.node: s for s in sites if s.rewrite is not Rewrite.ROWWISE}
        self.rowwise = {n for s in sites if s.rewrite is Rewrite.ROWWISE for n in (s.node, s.scores)}
        self.fresh, self.groups = self._groups()
        self.slot_writes = slot_writes(sites, step.layout.even, self.fresh)
        self.site_path = self._paths_to_fresh()
        self.full: dict[fx.Node, Full] = {}
        self.full_wanted: dict[fx.Node, fx.Node] = {}  # node -> the first user that wants it Full
        self.local: dict[fx.Node, dict[State, Transfer | Local]] = {}
        self.local_wanted: dict[fx.Node, dict[State, None]] = {}
        self.gather_states: dict[fx.Node, Tokens] = {}
        self.selections: dict[fx.Node, RowSelection] = {}
        self.lookups: dict[fx.Node, RowLookup] = {}
        self.gathered: list[Gathered] = []
        self.refusals: list[Refusal] = []

    def plan(self) -> CPPlan:
        for node in reversed(self.graph.nodes):
            if node.op == "output" or (node.op == "call_function" and not is_tensor(node) and not node.users):
                self._want_full(node, tensor_operands(node))
            elif node.op == "call_function" and writes(node):
                self.full[node] = Full.COMPUTE
                self._want_full(node, tensor_operands(node))
            elif node.op == "call_function" and not is_tensor(node):
                if node.users and node.target not in SIZES:
                    self._want_full(node, tensor_operands(node))
            else:
                self._decide(node)
        return CPPlan(
            self.sites,
            self.step,
            {n: self.full[n] for n in self.graph.nodes if n in self.full},
            self.local,
            self.groups,
            self.gather_states,
            self.selections,
            self.lookups,
            self.slot_writes,
            tuple(reversed(self.gathered)),
            tuple(reversed(self.refusals)),
        )

    # -- demands --

    def _want_full(self, user: fx.Node, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self.full_wanted.setdefault(node, user)

    def _want_local(self, node: fx.Node, state: State) -> None:
        self.local_wanted.setdefault(node, {})[state] = None

    def _decide(self, node: fx.Node) -> None:
        states = list(self.local_wanted.get(node, ()))
        if node in self.full_wanted or any(self._by_shard(node, state) for state in states):
            self.full[node] = how = self._full(node)
            if how is Full.GATHER:
                local = self.fresh.get(node) or self.reach.plain_state(node)
                assert local is not None
                self.gather_states[node] = local
                states = list(dict.fromkeys([*states, local]))
        for state in states:
            self.local.setdefault(node, {})[state] = self._local(node, state)

    def _by_shard(self, node: fx.Node, state: State) -> bool:
        return self.reach.way(node, state) is None and not numbers_rows(node, state)

    # -- Full values --

    def _full(self, node: fx.Node) -> Full:
        if node in self.fresh:
            return Full.GATHER
        if node.op in ("placeholder", "get_attr"):
            return Full.GIVEN
        if self._select_rows(node):
            return Full.ROWS
        if self._look_up_rows(node):
            return Full.LOOKUP
        state = self.reach.plain_state(node)
        gather = state is not None and node in self.reach.trunk and not isinstance(node.meta["val"], (tuple, list))
        if gather and node not in self.site_path and not self._smaller_above(node):
            self._report(node)
            return Full.GATHER
        if node not in self.site_path:
            self._check_compute(node)
        self._want_full(node, tensor_operands(node))
        return Full.COMPUTE

    def _select_rows(self, node: fx.Node) -> bool:
        """The last token, or the last few: only those rows travel."""
        if node.op != "call_function" or node.target not in (aten.slice.Tensor, aten.select.int):
            return False
        source = tensor_operands(node)[0]
        state = self.reach.plain_state(source)
        if state is None or source not in self.reach.trunk or (state.outer, state.inner) != (1, 1):
            return False
        if source in self.fresh or source in self.full_wanted:
            return False  # the whole of it travels anyway
        if self.reach.plain_state(node) is not None:
            return False  # cuts another dimension
        rows = row_selection(node, state)
        if rows is None or (
            isinstance(self.reach.tokens, int) and rows[1] > self.reach.tokens // self.step.layout.cp_size
        ):
            return False
        self.selections[node] = RowSelection(source, state, *rows)
        self._want_local(source, state)
        return True

    def _look_up_rows(self, node: fx.Node) -> bool:
        """hidden.index_select(0, cu_lengths - 1): the rows that are named travel, not all of them."""
        if node.op != "call_function" or node.target is not aten.index_select.default:
            return False
        source, index = tensor_operands(node)
        state = self.reach.plain_state(source)
        if state is None or source not in self.reach.trunk or (state.outer, state.inner) != (1, 1):
            return False
        if source in self.fresh or source in self.full_wanted or index in self.reach.trunk:
            return False
        many = divide(shape_of(index)[0], self.reach.tokens) is not None
        if many or node.args[1] % len(shape_of(source)) != state.dim:  # type: ignore[operator]
            return False
        self.lookups[node] = RowLookup(source, state, index)
        self._want_local(source, state)
        self._want_full(node, [index])
        return True

    def _smaller_above(self, node: fx.Node) -> bool:
        """A value this one is only a copy of is smaller (repeated KV heads, a float32 copy): gather that one."""
        size, above = _bytes(node), node
        while above.target in COPIES and above.op == "call_function":
            above = tensor_operands(above)[0]
            if self.reach.plain_state(above) is None or above not in self.reach.trunk:
                return False
            ratio = divide(size, _bytes(above))
            if ratio is not None and ratio != 1:
                return True
        return False

    def _check_compute(self, node: fx.Node) -> None:
        """A node that has to run on gathered values: attention and randomness may not, anything else is reported."""
        trunk = [x for x in tensor_operands(node) if x in self.reach.trunk]
        if is_random(node):
            self.refusals.append(
                refuse(
                    "CP203",
                    node,
                    f"{op_of(node)} draws random numbers: ranks would draw different ones than one device",
                    "call model.eval(), or take the op out of the compiled model",
                )
            )
        elif self._mixes_like_attention(node, trunk):
            self.refusals.append(self._unknown_attention(node))

    def _mixes_like_attention(self, node: fx.Node, trunk: list[fx.Node]) -> bool:
        if not trunk or node in self.rowwise:
            return False
        if is_matmul(node):
            return all(x in self.reach.trunk for x in factors(node))
        carry_tokens = {x for x in trunk if self.reach.ways.get(x) or self.reach.seeds.get(x)}
        if node.target in (aten._softmax.default, aten._safe_softmax.default):
            return bool(carry_tokens)
        return rule_of(node) is None and len(carry_tokens) >= 3  # q, k and v of an op nobody described

    def _unknown_attention(self, node: fx.Node) -> Refusal:
        return refuse(
            "CP201",
            node,
            f"{op_of(node)} mixes rows of token-dependent values, as attention does, in a form cppass does not know",
            "use scaled_dot_product_attention (attn_implementation='sdpa'), or on_refusal='fallback' to run unsharded",
        )

    def _report(self, node: fx.Node) -> None:
        user = self.full_wanted.get(node, node)
        expected = user.op == "output" or writes(user)
        if expected:
            why = "an output of the graph"
        elif rule_of(user) is None:
            why = f"{op_of(user)} has no rule"
        else:
            why = f"{op_of(user)} mixes tokens"
        self.gathered.append(Gathered(node, f"{why} (node {user.name})", expected))
        if self.strict and not expected:
            self.refusals.append(
                refuse(
                    "CP202",
                    user,
                    f"{why}; strict=True gathers nothing but K, V and outputs",
                    "strict=False gathers the inputs of such an op and reports it",
                )
            )

    # -- Local values --

    def _local(self, node: fx.Node, state: State) -> Transfer | Local:
        if node in self.rewritten and self.reach.way(node, state) is not None:
            self._want_site(self.rewritten[node])
            return Local.SITE
        if numbers_rows(node, state):
            return Local.NUMBER
        transfer = self.reach.way(node, state)
        if transfer is None or (self._is_at_hand(node) and _can_be_sharded(node, state)):
            return Local.SHARD
        if is_matmul(node) and node not in self.rowwise and self._gathers_a_factor(node, transfer):
            self.refusals.append(self._unknown_attention(node))
        for operand, operand_state in zip(tensor_operands(node), transfer.operands, strict=True):
            if operand_state is None:
                self._want_full(node, [operand])
            else:
                self._want_local(operand, operand_state)
        return transfer

    def _is_at_hand(self, node: fx.Node) -> bool:
        """A Full value that every rank computes anyway."""
        return self.full.get(node) is Full.COMPUTE and node not in self.reach.trunk

    def _gathers_a_factor(self, node: fx.Node, transfer: Transfer) -> bool:
        """Local rows times something that depends on all tokens: scores, unless a matcher says so."""
        needed = zip(tensor_operands(node), transfer.operands, strict=True)
        return any(x in self.reach.trunk and state is None and x in factors(node) for x, state in needed)

    def _want_site(self, site: AttentionSite) -> None:
        self._want_local(site.query, Tokens(site.query_dim))
        self._want_full(site.node, [site.key, site.value])
        if site.causal is not None:
            self._want_full(site.node, [x for x in site.causal.terms if is_tensor(x)])
        elif site.mask is not None:
            state = site.mask_state
            if state is None:
                self._want_full(site.node, [site.mask])
            else:
                self._want_local(site.mask, state)
        if site.fused is not None:
            self._want_full(site.node, site.fused.tensors)

    # -- sites: gathered values, and the path from them to the attention --

    def _groups(self) -> tuple[dict[fx.Node, Tokens], tuple[tuple[tuple[fx.Node, Tokens], ...], ...]]:
        """Fresh K and V of each site, to be gathered together; one group per dtype."""
        fresh: dict[fx.Node, Tokens] = {}
        groups = []
        for site in self.sites:
            group: dict[torch.dtype, list[tuple[fx.Node, Tokens]]] = {}
            for part in (site.key_fresh, site.value_fresh):
                state = self._gatherable(part.source, part.dim, site)
                if state is None or part.source in fresh:
                    continue
                fresh[part.source] = state
                group.setdefault(part.source.meta["val"].dtype, []).append((part.source, state))
            groups += [tuple(members) for members in group.values()]
        return fresh, tuple(groups)

    def _gatherable(self, source: fx.Node, dim: int, site: AttentionSite) -> Tokens | None:
        if not is_tensor(source) or source.meta["val"].dim() == 0:
            return None
        if site.rewrite is Rewrite.ROWWISE:
            return self.reach.plain_state(source)
        state = Tokens(dim)
        enters = source.op == "placeholder" and state in self.reach.seeds.get(source, ())  # k and v of a snippet
        return state if enters or self.reach.way(source, state) else None

    def _paths_to_fresh(self) -> set[fx.Node]:
        """Nodes between gathered K/V and the attention: repeats and cache writes, computed from the gathered rows."""
        path: set[fx.Node] = set()
        for site in self.sites:
            for end, part in ((site.key, site.key_fresh), (site.value, site.value_fresh)):
                if part.source in self.fresh:
                    self._mark_path(end, part.source, path)
        for node in self.graph.nodes:
            if self._made_of_gathered(node, path):
                path.add(node)
        return path - set(self.fresh)

    def _made_of_gathered(self, node: fx.Node, path: set[fx.Node]) -> bool:
        """A cheap value of gathered rows and nothing else that depends on tokens: rows as a cache stores them."""
        if node.op != "call_function" or not self.reach.ways.get(node) or is_matmul(node) or node in self.rewritten:
            return False
        trunk = [x for x in tensor_operands(node) if x in self.reach.trunk]
        return bool(trunk) and node in self.reach.trunk and all(x in self.fresh or x in path for x in trunk)

    def _mark_path(self, end: fx.Node, source: fx.Node, path: set[fx.Node]) -> bool:
        if end is source:
            return True
        if self.order[end] <= self.order[source] or end.op != "call_function":
            return False
        reached = [self._mark_path(x, source, path) for x in tensor_operands(end)]
        if any(reached):
            path.add(end)
        return any(reached)


SIZES = {aten.sym_size.int, aten.sym_numel.default}  # take a shape, no rows

COPIES = {
    *SAME,
    *VIEWS,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.transpose.int,
    aten.permute.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}


def _bytes(node: fx.Node) -> Size:
    return product(shape_of(node)) * node.meta["val"].dtype.itemsize


def _can_be_sharded(node: fx.Node, state: State) -> bool:
    return isinstance(state, Tokens) and state.plain and isinstance(node.meta["val"], torch.Tensor)
