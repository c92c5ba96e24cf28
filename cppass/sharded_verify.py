"""Is a rewritten graph of sharded inputs a legal one? Typed again from the canonical ops, as cppass/verify.py does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from cppass.errors import VerifyError
from cppass.match.kv import fresh_behind_views
from cppass.ops import named_arguments
from cppass.rules import is_tensor, name_of, shape_of, tensor_operands
from cppass.sharded_plan import ROWS, ShardedPlan
from cppass.tokens import Size, State, Tokens, size_of
from cppass.verify import GATHERED, SLOT_WRITES, Typing, check_waits, illegal

canonical = torch.ops.cppass
ALL_RANKS = Tokens(0, order=GATHERED)


def verify_sharded(graph: fx.Graph, plan: ShardedPlan) -> None:
    """Raises VerifyError where the rewritten graph is not legal, or a site was found and not rewritten."""
    rewritten = sum(node.target is canonical.fused_attention_sharded.default for node in graph.nodes)
    if rewritten != len(plan.sites):
        raise VerifyError(
            "CP402", f"{len(plan.sites)} attention sites were found and {rewritten} rewritten", "please report this"
        )
    check_waits(graph)
    typing = _typing(graph, plan)
    states = typing.run(graph)
    for node in graph.nodes:
        if node.op == "output":
            _no_gathered_rows(node, states)
    if plan.sites:
        typing.compare(plan.sites, graph, sharded=True)


def states_of(graph: fx.Graph, plan: ShardedPlan) -> dict[fx.Node, State]:
    """The states of the local and gathered rows of a rewritten graph; other values are the same on every rank."""
    return _typing(graph, plan).run(graph)


def _typing(graph: fx.Graph, plan: ShardedPlan) -> _ShardedTyping:
    names = {node.name: state for node, state in plan.entering.items()}
    entering = {n: names[n.name] for n in graph.nodes if n.op == "placeholder" and n.name in names}
    return _ShardedTyping(plan, entering)


def _no_gathered_rows(node: fx.Node, states: Mapping[fx.Node, State]) -> None:
    for operand in tensor_operands(node):
        if states.get(operand) == ALL_RANKS:
            raise illegal(node, f"takes {operand.name} in gathered order, padding included")


class _ShardedTyping(Typing):
    """States of local rows; gathered rows may go to slots and to attention alone."""

    def __init__(self, plan: ShardedPlan, entering: Mapping[fx.Node, Tokens]) -> None:
        super().__init__(plan.rows)
        self.plan = plan
        self.states.update(entering)

    def gathered_rows(self) -> Size:
        return self.plan.cp_size * self.plan.rows

    def original_rows(self) -> Size:
        return self.plan.rows

    def original_shape(self, node: fx.Node) -> tuple[Size, ...]:
        """The original is a rank's graph, too: only what is gathered has more rows."""
        shape = shape_of(node)
        return (self.plan.rows, *shape[1:]) if self.states.get(node) == ALL_RANKS else shape

    def slot_write(self, node: fx.Node, operands: list[fx.Node], given: tuple[State | None, ...]) -> None:
        """Rows in gathered order go to as many slots, which the runner gives in that order, into a whole cache."""
        for i, (operand, state) in enumerate(zip(operands, given, strict=True)):
            if i in SLOT_WRITES[name_of(node)]:
                fits = state == ALL_RANKS or (state is None and shape_of(operand)[0] == self.gathered_rows())
            else:
                fits = state is None
            if not fits:
                raise illegal(node, f"writes {operand.name}, {state or 'Full'}, as an operand of a KV write")

    def _same_step(self, node: fx.Node) -> None:
        given = named_arguments(node)
        ends = [size_of(n.meta["val"] if isinstance(n, fx.Node) else n) for n in given["q_lengths"]]
        meant = [size_of(n.meta["val"] if isinstance(n, fx.Node) else n) for n in self.plan.ends]
        if (ends, given["cp_size"], given["remainder"]) != (meant, self.plan.cp_size, self.plan.remainder):
            raise illegal(node, "lays out another step than the plan says")

    def _gather_sharded(self, node: fx.Node) -> State:
        xs, cp_size = node.args
        for x in xs:  # type: ignore[union-attr]
            if self.states.get(x) != ROWS or cp_size != self.plan.cp_size:  # type: ignore[arg-type]
                raise illegal(node, f"gathers {x}, which is {self.states.get(x) or 'Full'}")  # type: ignore[arg-type]
        return ALL_RANKS

    def _look_up_sharded(self, node: fx.Node) -> None:
        self._same_step(node)
        x, index = node.args[:2]
        if self.states.get(x) != ROWS or index in self.states:  # type: ignore[arg-type]
            raise illegal(node, f"looks up rows of {x}, which is {self.states.get(x) or 'Full'}")  # type: ignore[arg-type]

    def _fused_attention_sharded(self, node: fx.Node) -> State:
        self._same_step(node)
        given = named_arguments(node)
        dense = ALL_RANKS if given["block_table"] is None else None
        wanted = {"q": ROWS, "k": dense, "v": dense, "mask": None, "block_table": None, "sink": None}
        for name, state in wanted.items():
            value = given[name]
            if isinstance(value, fx.Node) and is_tensor(value) and self.states.get(value) != state:
                seen = self.states.get(value) or "Full"
                raise illegal(node, f"has a {name} that is {seen}, not {state or 'Full'}")
        for name in ("k", "v") if dense is None else ():
            written = fresh_behind_views(given[name], 0)
            if not written.writes or self.states.get(written.source) != ALL_RANKS:
                raise illegal(node, f"reads a cache as {name} that this step's rows are not written to before")
        return ROWS
