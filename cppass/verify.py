"""Is the rewritten graph a legal one? Checked from the graph itself, not from the plan that made it.

Every value of the rewritten graph is typed again, Full or Local, from the canonical ops alone: `shard` makes Local
values, `gather` and `gather_rows` make Full ones, `attention` takes Local queries and Full keys. In between the rules
must allow every op exactly the states its operands have. A Local value where a Full one is meant cannot pass.
That these rows are rows of the right values is checked against the original graph (cppass/values.py).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from cppass.errors import VerifyError
from cppass.explain_node import op_of
from cppass.fused_op import LSE_DIM, TOKEN_DIM
from cppass.layout import Zigzag
from cppass.match.kv import SCATTER_PA
from cppass.op_rules import rule_of
from cppass.ops import CANONICAL, named_arguments
from cppass.plan import CPPlan
from cppass.rules import Transfer, is_tensor, name_of, shape_of, starts_collective, tensor_operands, waits, writes
from cppass.shard import numbers_rows
from cppass.site import AttentionSite, Rewrite
from cppass.tokens import Size, State, Tokens, divide, size_of
from cppass.values import difference

canonical = torch.ops.cppass

FUSED = (canonical.fused_attention.default, canonical.fused_attention_sharded.default)

GATHERED = "gathered rows"
"""Order of Full rows as an all-gather leaves them, rank after rank."""

SLOT_WRITES = {
    "npu::npu_scatter_nd_update": {1, 2},
    SCATTER_PA: {0, 1, 4},
    "aten::index_put": {1, 2},
    "aten::index_copy": {1, 2},
}
"""Writes of rows to slots -> which tensor operands are rows or slots."""


def verify(graph: fx.Graph, plan: CPPlan) -> None:
    """Raises VerifyError where the rewritten graph is not legal, or a site was found and not rewritten."""
    _coverage(graph, plan)
    check_waits(graph)
    typing = _ReplicatedTyping(plan.step.layout)
    states = typing.run(graph)
    for node in graph.nodes:
        if node.op == "output" or (node.op == "call_function" and not is_tensor(node) and node.target not in CANONICAL):
            _all_full(node, states)
    if plan.sites:
        typing.compare(plan.sites, graph)


def states_of(graph: fx.Graph, plan: CPPlan) -> dict[fx.Node, State]:
    """The states of the Local values of a rewritten graph; values that are not in it are Full."""
    return _ReplicatedTyping(plan.step.layout).run(graph)


def _coverage(graph: fx.Graph, plan: CPPlan) -> None:
    found = sum(site.rewrite is not Rewrite.ROWWISE for site in plan.sites)
    attention = (canonical.attention.default, canonical.fused_attention.default)
    rewritten = sum(node.target in attention for node in graph.nodes)
    if found != rewritten:
        raise VerifyError(
            "CP402", f"{found} attention sites were found and {rewritten} rewritten", "please report this"
        )


def check_waits(graph: fx.Graph) -> None:
    """A collective that was started is read by its wait alone: before it, its rows may not be there yet."""
    for node in graph.nodes:
        if not starts_collective(node):
            continue
        started = [user for user in node.users if user.target is operator.getitem] or [node]
        readers = [user for value in started for user in value.users if not waits(user)]
        if readers:
            raise illegal(readers[0], f"reads {node.name} before it has arrived")


def _all_full(node: fx.Node, states: dict[fx.Node, State]) -> None:
    for operand in tensor_operands(node):
        if operand in states:
            raise illegal(node, f"takes {operand.name}, {states[operand]}, where the whole value is meant")


def illegal(node: fx.Node, why: str) -> VerifyError:
    return VerifyError("CP403", f"illegal rewrite: {node.name} ({op_of(node)}) {why}", "please report this")


class Typing:
    """States of the Local values of a rewritten graph; values that are not in it are Full."""

    def __init__(self, rows: Size = 0) -> None:
        self.rows = rows  # local ones
        self.states: dict[fx.Node, State] = {}
        self.taken: dict[fx.Node, Transfer] = {}  # how each Local value is computed

    def run(self, graph: fx.Graph) -> dict[fx.Node, State]:
        for node in graph.nodes:
            if node.op == "call_function" and is_tensor(node):
                state = self._state(node)
                if state is not None:
                    self.states[node] = state
        return self.states

    def _state(self, node: fx.Node) -> State | None:
        name = CANONICAL.get(node.target)
        if name is not None:
            state: State | None = getattr(self, f"_{name}")(node)
            return state
        if node.target is operator.getitem and node.args[0].target in FUSED:  # type: ignore[union-attr,operator]
            return self._element(node)
        operands = tensor_operands(node)
        given = tuple(self.states.get(x) for x in operands)
        if not any(given):
            return None
        if writes(node):
            raise illegal(node, "writes a Local value into an input")
        in_order = any(isinstance(s, Tokens) and s.order == GATHERED for s in given)
        if in_order and name_of(node) in SLOT_WRITES:
            self.slot_write(node, operands, given)
            return None
        rule, rows = rule_of(node), self.gathered_rows() if in_order else self.rows
        for slot, state in enumerate(given):
            transfer = rule.forward(node, slot, state, rows) if rule is not None and state is not None else None
            if transfer is not None and self._agree(operands, given, transfer.operands):
                self.taken[node] = transfer
                return transfer.out
        raise illegal(node, f"mixes rows: operands are {[str(s) if s else 'Full' for s in given]}")

    def _element(self, node: fx.Node) -> State | None:
        """Output or log-sum-exp of a fused attention."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        layout = str(named_arguments(source).get("input_layout", "TND"))
        return self.states[source] if node.args[1] == 0 else Tokens(LSE_DIM[layout])

    def compare(self, sites: tuple[AttentionSite, ...], graph: fx.Graph, sharded: bool = False) -> None:
        """Raise where values are not those of the graph that the sites are in."""
        found = difference(sites[0].node.graph, graph, sites, self.original_shape, self._counted, sharded)
        if found is not None:
            raise illegal(*found)

    def _counted(self, node: fx.Node, place: int) -> Size | None:
        """The size that an arange of local rows has in the original graph, where it is this operand of a node."""
        transfer = self.taken.get(node)
        wanted = transfer.operands[place] if transfer is not None else None
        operand = tensor_operands(node)[place]
        if operand in self.states or not isinstance(wanted, Tokens) or not numbers_rows(operand, wanted):
            return None
        return wanted.outer * self.original_rows() * wanted.inner

    def original_shape(self, node: fx.Node) -> tuple[Size, ...]:
        """The shape that a value has in the original graph."""
        raise NotImplementedError

    def original_rows(self) -> Size:
        """Rows of one pass over the tokens in the original graph."""
        raise NotImplementedError

    def gathered_rows(self) -> Size:
        """Rows that all ranks have together."""
        raise NotImplementedError

    def slot_write(self, node: fx.Node, operands: list[fx.Node], given: tuple[State | None, ...]) -> None:
        """Raise where rows in gathered order are not written to slots in gathered order."""
        raise NotImplementedError

    def _agree(
        self, operands: list[fx.Node], given: tuple[State | None, ...], wanted: tuple[State | None, ...]
    ) -> bool:
        for operand, have, want in zip(operands, given, wanted, strict=True):
            if have is None and want is not None and numbers_rows(operand, want) and isinstance(want, Tokens):
                if shape_of(operand) != (want.outer * self.rows * want.inner,):
                    return False
            elif have != want:
                return False
        return True


class _ReplicatedTyping(Typing):
    """The canonical ops of graphs that shard their inputs."""

    def __init__(self, layout: Zigzag) -> None:
        super().__init__()
        self.layout = layout

    def gathered_rows(self) -> Size:
        return self.layout.tokens

    def slot_write(self, node: fx.Node, operands: list[fx.Node], given: tuple[State | None, ...]) -> None:
        """Rows in gathered order go to slots in gathered order, all of them, into a whole cache."""
        dims = dict.fromkeys(SLOT_WRITES[name_of(node)], 0)
        if name_of(node) == "aten::index_copy":
            dims[2] = int(node.args[1]) % len(shape_of(operands[2]))  # type: ignore[arg-type]
        wanted = tuple(Tokens(dims[i], order=GATHERED) if i in dims else None for i in range(len(operands)))
        if given != wanted:
            raise illegal(node, f"writes rows and slots in different order: {[str(s) if s else 'Full' for s in given]}")

    def _state(self, node: fx.Node) -> State | None:
        if node.target in CANONICAL:
            self._same_layout(node)
        state = super()._state(node)
        if node in self.taken and any(node.kwargs.get(k) != v for k, v in self.taken[node].kwargs.items()):
            raise illegal(node, f"has {dict(node.kwargs)}; local rows need {dict(self.taken[node].kwargs)}")
        return state

    def original_rows(self) -> Size:
        tokens: Size = self.layout.tokens
        return tokens

    def original_shape(self, node: fx.Node) -> tuple[Size, ...]:
        shape, state = list(shape_of(node)), self.states.get(node)
        if isinstance(state, Tokens) and state.order != GATHERED:
            shape[state.dim] = state.outer * self.original_rows() * state.inner
        return tuple(shape)

    def _same_layout(self, node: fx.Node) -> None:
        """Every canonical op cuts and joins by the plan's token count and ranks."""
        given = named_arguments(node)
        lengths, cp_size, even = given["lengths"], given["cp_size"], given["even"]
        seen = Zigzag(tuple(_size(n) for n in lengths), cp_size, even)
        if seen != self.layout:
            raise illegal(node, f"lays out {_text(seen)}; the plan says {_text(self.layout)}")

    def _shard(self, node: fx.Node) -> State:
        x, dim, inner = node.args[:3]
        assert isinstance(x, fx.Node) and isinstance(dim, int)
        if x in self.states:
            raise illegal(node, "shards a Local value")
        tokens = self.layout.tokens
        outer = divide(shape_of(x)[dim], tokens * _size(inner))
        rows = None if outer is None else divide(shape_of(node)[dim], outer * _size(inner))
        known = isinstance(rows, int) and isinstance(tokens, int)
        if outer is None or rows is None or (known and rows != self.layout.local_rows):
            raise illegal(node, f"shards dim {dim} of {list(shape_of(x))}, which does not carry {tokens} tokens")
        if self.rows not in (0, rows):
            raise illegal(node, f"has {rows} local rows where others have {self.rows}")
        self.rows = rows
        return Tokens(dim, outer, _size(inner))

    def _gather(self, node: fx.Node) -> State | None:
        xs, dims, inners, *_ = node.args
        natural = named_arguments(node)["natural"]
        for x, dim, inner in zip(xs, dims, inners, strict=True):  # type: ignore[arg-type]
            state = self.states.get(x)
            fits = isinstance(state, Tokens) and state.plain and (state.dim, state.inner) == (dim, _size(inner))
            if not fits or not (natural or state == Tokens(dim)):
                raise illegal(node, f"gathers {x.name}, which is {state or 'Full'}, along dim {dim}")
        if not natural and not (self.layout.even and len(set(dims)) == 1 and set(inners) == {1}):  # type: ignore[arg-type]
            raise illegal(node, "leaves rows in gathered order where there is padding, or in an inner dimension")
        return None if natural else Tokens(dims[0], order=GATHERED)  # type: ignore[index,arg-type]

    def _gather_rows(self, node: fx.Node) -> None:
        x, dim = node.args[:2]
        if self.states.get(x) != Tokens(dim):  # type: ignore[arg-type]
            raise illegal(node, f"picks rows of {x}, which is {self.states.get(x) or 'Full'}")  # type: ignore[arg-type]

    def _gather_rows_at(self, node: fx.Node) -> None:
        x, dim, index = node.args[:3]
        if self.states.get(x) != Tokens(dim) or index in self.states:  # type: ignore[arg-type]
            raise illegal(node, f"looks up rows of {x}, which is {self.states.get(x) or 'Full'}")  # type: ignore[arg-type]

    def _gathered_order(self, node: fx.Node) -> State:
        x = node.args[0]
        if x in self.states or not self.layout.even or shape_of(x)[0] != self.layout.tokens:  # type: ignore[arg-type]
            raise illegal(node, f"puts {x} in gathered order")
        return Tokens(0, order=GATHERED)

    def _fused_attention(self, node: fx.Node) -> State:
        given = named_arguments(node)
        dim = TOKEN_DIM[given["input_layout"]]
        if self.states.get(given["q"]) != Tokens(dim):
            raise illegal(node, f"has a query that is {self.states.get(given['q']) or 'Full'}")
        own_mask = given["sparse_mode"] in (0, 1)
        for name in ("k", "v", "mask", "block_table", "sink", "q_tensor", "kv_tensor"):
            value = given[name]
            if not isinstance(value, fx.Node):
                continue
            wanted = Tokens(len(shape_of(value)) - 2) if name == "mask" and own_mask else None
            if self.states.get(value) != wanted:
                raise illegal(node, f"has a {name} that is {self.states.get(value) or 'Full'}, not {wanted or 'Full'}")
        return Tokens(dim)

    def _attention(self, node: fx.Node) -> State:
        q, k, v, mask, prefix_tensor = node.args[:5]
        if self.states.get(q) != Tokens(2):  # type: ignore[arg-type]
            raise illegal(node, f"has a query that is {self.states.get(q) or 'Full'}")  # type: ignore[arg-type]
        for whole in (k, v, prefix_tensor):
            if isinstance(whole, fx.Node) and whole in self.states:
                raise illegal(node, f"attends over {whole.name}, which is {self.states[whole]}")
        if isinstance(mask, fx.Node):
            ndim = len(shape_of(mask))
            wanted = None if shape_of(mask)[ndim - 2] == 1 else Tokens(ndim - 2)
            if self.states.get(mask) != wanted:
                raise illegal(node, f"has a mask that is {self.states.get(mask) or 'Full'}, not {wanted or 'Full'}")
        return Tokens(2)


def _text(layout: Zigzag) -> str:
    """before: Zigzag((8,), 2, True)            after: "8 tokens over 2 ranks" """
    lengths = " + ".join(str(n) for n in layout.lengths)
    return f"{lengths} tokens{'' if layout.even else ' (uneven)'} over {layout.cp_size} ranks"


def _size(value: object) -> Size:
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    assert isinstance(value, (int, torch.SymInt))
    return size_of(value)
