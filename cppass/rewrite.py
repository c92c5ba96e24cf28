"""Follow a plan: build the rank-free graph with canonical ops. The only editor of graphs in cppass.

before:  out = attention(q, index_copy(cache, 2, pos, k), index_copy(cache_v, 2, pos, v), mask)
after:   k_full, v_full = cppass.gather([k, v])                       k, v, q computed from sharded token ids
         out = cppass.attention(q, index_copy(cache, 2, pos, k_full), index_copy(cache_v, 2, pos, v_full), prefix)
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import Any

import sympy
import torch
from torch import fx

import cppass.ops  # noqa: F401  (defines torch.ops.cppass)
from cppass.arithmetic import Numbers, node_of
from cppass.builder import Builder
from cppass.errors import Unsupported
from cppass.layout import Zigzag
from cppass.match.kv import VIEWS
from cppass.plan import SIZES, CPPlan, Full, Local
from cppass.rules import Transfer, is_tensor, iter_nodes, name_of, shape_of, tensor_operands
from cppass.site import AttentionSite, FusedAttention, Lengths, Rewrite, readers
from cppass.tokens import Size, State, Tokens, size_of, sizes_of

aten = torch.ops.aten
DENSE = {"memory_format": torch.contiguous_format}
OWN_LIBRARIES = ("", "aten", "prims", "_c10d_functional", "npu", "atb")
"""Of torch and torch_npu: their ops take any strides, or ask for what they need."""
FUSED_OPTIONS = (
    *("input_layout", "num_heads", "num_key_value_heads", "scale", "sparse_mode", "pre_tokens", "next_tokens"),
    *("block_size", "inner_precise", "lse"),
)


def rewrite(graph: fx.Graph, plan: CPPlan) -> fx.Graph:
    """The graph that `plan` asks for: canonical ops, metadata filled in, dead code gone.

    Numerics: rows are computed by the same ops as before, over fewer rows, so the last bits of matrix products may
    differ; gathers and shards move bits unchanged.
    """
    rewritten = _Rewriter(graph, plan).build()
    rewritten.eliminate_dead_code()
    rewritten.lint()
    return rewritten


class _Rewriter(Builder):
    def __init__(self, graph: fx.Graph, plan: CPPlan) -> None:
        super().__init__(graph)
        self.plan = plan
        self.full_nodes: dict[fx.Node, fx.Node] = {}
        self.local_nodes: dict[tuple[fx.Node, State], fx.Node] = {}
        self.group_of = {node: group for group in plan.groups for node, _ in group}
        self.gathered: dict[fx.Node, fx.Node] = {}
        self.gathering: set[fx.Node] = set()  # members of the merged gather that is being built
        self.site_of = {site.node: site for site in plan.sites}
        self.reader_of = readers(plan.sites)
        self.sizes: dict[Size, fx.Node] = {}  # symbolic sizes by value, as new nodes
        self.local_size: dict[Size, Any] = {}
        self.in_order = {source for write in plan.slot_writes.values() for source in write.sources}
        self.slots: dict[fx.Node, fx.Node] = {}  # slots of all layers, in gathered order
        self.numbers = Numbers(self.emit)
        self._zigzag: Zigzag | None = None

    def build(self) -> fx.Graph:
        for node in self.old.nodes:
            self.origin = node
            if node.op == "placeholder":
                copied = self.new.node_copy(node)
                self.full_nodes[node] = copied
                self._remember_size(node, copied)
            elif node.op == "output":
                self.new.output(fx.map_arg(node.args[0], lambda x: self._as_dense(x, self.full(x))))
            elif node.op == "get_attr" or (node.op == "call_function" and not is_tensor(node)):
                if node.users or node.op == "call_function":
                    self.full(node)
            else:
                if self.plan.full.get(node) in (Full.COMPUTE, Full.ROWS, Full.LOOKUP):
                    self.full(node)
                for state in self.plan.local.get(node, ()):
                    self.local(node, state)
        return self.new

    def _remember_size(self, old: fx.Node, new: fx.Node) -> None:
        value = old.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.sizes.setdefault(size_of(value), new)

    # -- Full values --

    def full(self, node: fx.Node) -> fx.Node:
        if node in self.group_of and node not in self.gathering and self.plan.full.get(node) is Full.GATHER:
            return self._gathered(node)
        if node in self.full_nodes:
            return self.full_nodes[node]
        if node.target in SIZES and not all(self._is_whole(x) for x in tensor_operands(node)):
            return self.number(size_of(node.meta["val"]))  # type: ignore[return-value]
        outer, self.origin = self.origin, node
        how = self.plan.full.get(node)
        if how is Full.GATHER:
            (result,) = self._gather(((node, self.plan.gather_states[node]),))
            result = self._as_dense(node, result)
        elif how is Full.ROWS:
            result = self._rows(node)
        elif how is Full.LOOKUP:
            result = self._looked_up(node)
        else:
            result = self._computed(node)
        self.full_nodes[node] = result
        self.origin = outer
        return result

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether the Full value of a node is to be had without a collective."""
        return self.plan.full.get(node) in (Full.GIVEN, Full.COMPUTE) or node.op in ("placeholder", "get_attr")

    def _computed(self, node: fx.Node) -> fx.Node:
        """The node as it was, on Full operands. Views become reshapes where an operand's strides changed."""
        if node in self.plan.slot_writes:
            return self._slot_write(node)
        operands = [(x, self.full(x)) for x in iter_nodes((node.args, node.kwargs))]
        if node.op != "call_function" or all(_same_layout(a, b) for a, b in operands):
            copied = self.new.node_copy(node, self.full)
            self._remember_size(node, copied)
            return copied
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._with_bodies(node, operands)
        laid_out = {a: self._as_dense(a, b) if _is_foreign(node) else b for a, b in operands}
        args, kwargs = fx.map_arg((node.args, node.kwargs), laid_out.__getitem__)
        return self.emit(aten.reshape.default if node.target in VIEWS else node.target, args, dict(kwargs))

    def _with_bodies(self, node: fx.Node, operands: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
        """A branch or loop, on dense operands where they lay otherwise in memory: any view inside takes dense ones."""
        laid_out = {a: b if _same_layout(a, b) else self.emit(aten.clone.default, (b,), DENSE) for a, b in operands}
        return self.new.node_copy(node, laid_out.__getitem__)

    def _as_dense(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """The new value without gaps where the old one had none: outputs that are viewed, ops that ask for it.

        before:  logits [B, S, V] dense in memory        gathered:  [B, S, V] as [S, B, V]        after:  dense
        """
        was, now = old.meta.get("val"), new.meta.get("val")
        if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor) or not _dense(was) or _dense(now):
            return new
        return self.emit(aten.clone.default, (new,), DENSE)

    def _slot_write(self, node: fx.Node) -> fx.Node:
        """A write of rows in gathered order: to slots in gathered order, which all layers share."""
        slots = self.plan.slot_writes[node].slots
        if slots not in self.slots:
            self.slots[slots] = self.emit(torch.ops.cppass.gathered_order.default, (self.full(slots), *self.layout()))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: self.slots[slots] if x is slots else self.full(x))
        return self.emit(node.target, args, dict(kwargs))

    def _gathered(self, node: fx.Node) -> fx.Node:
        """A member of a merged gather: all members are computed, then one collective brings them all."""
        if node not in self.gathered:
            group = self.group_of[node]
            outer, self.origin = self.origin, self.reader_of[node]
            self.gathering.update(n for n, _ in group)
            for (member, _), result in zip(group, self._gather(group), strict=True):
                self.gathered[member] = result
            self.gathering.difference_update(n for n, _ in group)
            self.origin = outer
        return self.gathered[node]

    def _gather(self, group: tuple[tuple[fx.Node, Tokens], ...]) -> list[fx.Node]:
        """One collective for all members.

        before:  k [B, H, m, D], v [B, H, m, D] local
        after:   gather([k, v], dims, inners, tokens, P) -> k [B, H, S, D], v [B, H, S, D]
        """
        values = [self.local(node, state) for node, state in group]
        dims = [state.dim for _, state in group]
        inners = [self.number(state.inner) for _, state in group]
        natural = not all(node in self.in_order for node, _ in group)
        args = (values, dims, inners, *self.layout(), natural)
        gathered = self.emit(torch.ops.cppass.gather.default, args)
        return [self.emit(operator.getitem, (gathered, i)) for i in range(len(group))]

    def _rows(self, node: fx.Node) -> fx.Node:
        rows = self.plan.selections[node]
        source = self.local(rows.source, rows.state)
        picked = self.emit(
            torch.ops.cppass.gather_rows.default,
            (source, rows.state.dim, rows.start, rows.count, *self.layout()),
        )
        if node.target is aten.select.int:
            return self.emit(aten.select.int, (picked, rows.state.dim, 0))
        return picked

    def _looked_up(self, node: fx.Node) -> fx.Node:
        rows = self.plan.lookups[node]
        source, index = self.local(rows.source, rows.state), self.full(rows.index)
        return self.emit(torch.ops.cppass.gather_rows_at.default, (source, rows.state.dim, index, *self.layout()))

    # -- Local values --

    def local(self, node: fx.Node, state: State) -> fx.Node:
        key = (node, state)
        if key not in self.local_nodes:
            outer, self.origin = self.origin, node
            self.local_nodes[key] = self._local(node, state)
            self.origin = outer
        return self.local_nodes[key]

    def _local(self, node: fx.Node, state: State) -> fx.Node:
        how = self.plan.local[node][state]
        if how is Local.SITE:
            site = self.site_of[node]
            return self._attention(site) if site.fused is None else self._fused(site, site.fused)
        if isinstance(how, Local):
            assert isinstance(state, Tokens)
            if how is Local.NUMBER:
                return self.emit(node.target, (self._local_extent(state),), dict(node.kwargs))
            given = self.full_nodes[node] if node.op in ("placeholder", "get_attr") else self.full(node)
            inner = self.number(state.inner)
            return self.emit(torch.ops.cppass.shard.default, (given, state.dim, inner, *self.layout()))
        return self._by_way(node, how)

    def _by_way(self, node: fx.Node, way: Transfer) -> fx.Node:
        """The node's op on local rows: each operand in the state the way names, explicit sizes made local."""
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in self.site_of:
            if self.site_of[source].rewrite is Rewrite.FUSED:
                return self.emit(operator.getitem, (self.local(source, way.operands[0]), node.args[1]))  # type: ignore[arg-type]
            if self.site_of[source].rewrite is Rewrite.ZIGZAG:
                return self.local(source, way.out)  # the canonical op returns the output alone
        states = iter(way.operands)

        def operand(x: fx.Node) -> fx.Node:
            if not is_tensor(x):
                return self.full(x)
            state = next(states)
            value = self.full(x) if state is None else self.local(x, state)
            return self._as_dense(x, value) if _is_foreign(node) else value

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        if way.size_arg is not None and isinstance(way.out, Tokens):
            sizes: list[Any] = list(args[way.size_arg])  # type: ignore[arg-type]
            if not (isinstance(sizes[way.out.dim], int) and sizes[way.out.dim] == -1):
                sizes[way.out.dim] = self._local_extent(way.out)
            args = (*args[: way.size_arg], sizes, *args[way.size_arg + 1 :])
        kwargs = {**kwargs, **way.kwargs}
        return self.emit(aten.reshape.default if node.target in VIEWS else node.target, args, kwargs)

    def _attention(self, site: AttentionSite) -> fx.Node:
        """This rank's rows of the output. The canonical op has heads first; [B, S, H, D] is turned and turned back."""
        query = self.local(site.query, Tokens(site.query_dim))
        key, value = self.full(site.key), self.full(site.value)
        mask: fx.Node | None = None
        prefix: Any = 0
        prefix_tensor: fx.Node | None = None
        if site.causal is not None:
            prefix = site.causal.constant
            for term in site.causal.terms:
                if is_tensor(term):
                    here = self.full(term)
                    prefix_tensor = here if prefix_tensor is None else self.emit(aten.add.Tensor, (prefix_tensor, here))
                else:
                    prefix = self.numbers(self.full(term)) + prefix
        elif site.mask is not None:
            state = site.mask_state
            mask = self.full(site.mask) if state is None else self.local(site.mask, state)
        self.origin = site.node
        turned = site.query_dim == 1
        if turned:
            query, key, value = (self.emit(aten.transpose.int, (x, 1, 2)) for x in (query, key, value))
        out = self.emit(
            torch.ops.cppass.attention.default,
            (
                query,
                key,
                value,
                mask,
                prefix_tensor,
                node_of(prefix),
                *self.layout(),
                site.causal is not None,
                site.causal.window if site.causal else 0,
                site.scale,
            ),
        )
        return self.emit(aten.transpose.int, (out, 1, 2)) if turned else out

    def _fused(self, site: AttentionSite, fused: FusedAttention) -> fx.Node:
        """Both results of the op, for this rank's rows.

        before:  out, lse = npu_fused_infer_attention_score(q [T, N, D], cache, cache, actual_seq_lengths=[T], ...)
        after:   out, lse = cppass.fused_attention(q [m, N, D], cache, cache, ..., [T], ..., lengths, P, even, ...)
        """
        query = self.local(site.query, Tokens(site.query_dim))
        mask = site.mask
        if mask is not None:
            mask = self.full(mask) if site.mask_state is None else self.local(mask, site.mask_state)
        q_tensor, q_lengths = self._lengths(fused.q_lengths)
        kv_tensor, kv_lengths = self._lengths(fused.kv_lengths)
        tensors = [None if x is None else self.full(x) for x in (fused.block_table, fused.sink)]
        self.origin = site.node
        given = (query, self.full(site.key), self.full(site.value), mask, *tensors, q_tensor, kv_tensor)
        options = [getattr(fused, name) for name in FUSED_OPTIONS]
        return self.emit(
            torch.ops.cppass.fused_attention.default,
            (*given, q_lengths, kv_lengths, *self.layout(), str(fused.op), *options),
        )

    def _lengths(self, lengths: Lengths | fx.Node | None) -> tuple[fx.Node | None, list[Any] | None]:
        """(as a tensor, as a list)."""
        if isinstance(lengths, fx.Node):
            return self.full(lengths), None
        if lengths is None:
            return None, None
        return None, [self.full(n) if isinstance(n, fx.Node) else n for n in lengths]

    # -- sizes --

    def layout(self) -> tuple[list[Any], int, bool]:
        """The arguments by which every canonical op names the layout."""
        layout = self.zigzag()
        return [node_of(length) for length in layout.lengths], layout.cp_size, layout.even

    def zigzag(self) -> Zigzag:
        """The layout with its lengths as ints and numbers of the new graph."""
        if self._zigzag is None:
            planned, ends = self.plan.step.layout, self.plan.step.ends
            if ends:
                given = [0, *(self.numbers(self.full(e) if isinstance(e, fx.Node) else e) for e in ends)]
                lengths = tuple(end - start for start, end in itertools.pairwise(given))
            else:
                lengths = (self.numbers(self.number(planned.tokens)),)
            self._zigzag = dataclasses.replace(planned, lengths=lengths)
        return self._zigzag

    def number(self, size: Size) -> int | fx.Node:
        """A size as an int or as a node that computes it."""
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            self.sizes[size] = self._size_node(size)
        return self.sizes[size]

    def _size_node(self, size: sympy.Expr) -> fx.Node:
        for node in self.old.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and size_of(value) == size and node in self.full_nodes:
                return self.full_nodes[node]
            if node.op == "placeholder" and isinstance(value, torch.Tensor):
                for dim, extent in enumerate(shape_of(node)):
                    if extent == size:
                        return self.emit(aten.sym_size.int, (self.full_nodes[node], dim))
        if isinstance(size, sympy.Mul) or (isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0):
            factors = size.args if isinstance(size, sympy.Mul) else [size.base] * int(size.exp)
            result: Any = 1
            for factor in factors:
                result = self.numbers(int(factor) if factor.is_Integer else self.number(factor)) * result
            return node_of(result)  # type: ignore[no-any-return]
        raise Unsupported(
            "CP302",
            f"the size {size} is not one of any input of the graph",
            "compile with dynamic=False, or pass the token ids to the compiled model",
        )

    def _local_extent(self, state: Tokens) -> int | fx.Node:
        """Size of the token dimension of a Local value: outer * m * inner."""
        key = state.outer * state.inner
        if key not in self.local_size:
            self.local_size[key] = node_of(self.zigzag().local_rows * self.numbers(self.number(key)))
        return self.local_size[key]  # type: ignore[no-any-return]


def _same_layout(old: fx.Node, new: fx.Node | int) -> bool:
    """Whether a node may keep the metadata it had with this operand: equal sizes and strides, or no tensor."""
    if isinstance(new, int):
        return True  # a size that turned out to be known
    before, after = old.meta.get("val"), new.meta.get("val")
    if before is after or not isinstance(before, (torch.Tensor, tuple, list)):
        return True
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return sizes_of(before.shape) == sizes_of(after.shape) and _strides(before) == _strides(after)


def _strides(x: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size_of(s) for s in x.stride())


def _dense(x: torch.Tensor) -> bool:
    """is_contiguous, which would install guards on symbolic sizes."""
    step: Size = 1
    for size, stride in zip(reversed(sizes_of(x.shape)), reversed(_strides(x)), strict=True):
        if size != 1:
            if sympy.expand(stride - step) != 0:
                return False
            step = size * step
    return True


def _is_foreign(node: fx.Node) -> bool:
    """An op of another library: its kernel may read memory as if there were no gaps."""
    return name_of(node).partition("::")[0] not in OWN_LIBRARIES
