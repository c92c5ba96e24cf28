"""Every row of RULES means what it says: the op on local rows gives the local rows of the op.

    transfer:  operands (Tokens(1), None) -> out Tokens(1)
    meaning:   op(shard(x, dim 1), w)  ==  shard(op(x, w), dim 1)         on every rank

And where a rule refuses a dimension, no choice of local and whole operands would have given local rows of the output.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from core.rule_samples import SAMPLES, TOKENS, Sample
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from cppass.layout import zigzag
from cppass.match.kv import VIEWS
from cppass.op_rules import RULES, rule_of
from cppass.ops import MEANINGS
from cppass.rules import Transfer, tensor_operands
from cppass.tokens import Tokens

aten = torch.ops.aten
SIZES = (2, 3)  # numbers of ranks; TOKENS rows are padded for both
COVERED_ELSEWHERE = {operator.getitem: "test_getitem_carries_what_the_tuple_carries"}
ONE_WAY = {aten.floor_divide.default, aten.sort.default, aten.sort.stable}  # tokens never enter behind them


# -- one call, as a node and as numbers ------------------------------------------------------------------------------


@functools.cache
def traced(sample: Sample) -> Call:
    return Call(sample)


class Call:
    """A traced sample: its node, and the tensors behind the node's operands."""

    def __init__(self, sample: Sample) -> None:
        leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def run(*tensors: Tensor) -> Any:
            filled = dict(zip(at, tensors, strict=True))
            args, kwargs = pytree.tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
            return sample.op(*args, **kwargs)

        self.sample = sample
        self.tensors = [leaves[i] for i in at]
        mode = "symbolic" if any(t.dtype == torch.bool for t in self.tensors) else "fake"  # x[bool] has a symbolic size
        graph = make_fx(run, tracing_mode=mode, pre_dispatch=True)(*self.tensors).graph
        self.node = next(n for n in graph.nodes if n.target is sample.op)
        given = dict(zip(graph.find_nodes(op="placeholder"), self.tensors, strict=True))
        self.operands = [given[n] for n in tensor_operands(self.node)]

    def run(self, operands: Sequence[Tensor], sizes: dict[int, list[int]] | None = None) -> list[Tensor]:
        """The op on other operands; `sizes` replaces arguments that are size lists. Always a list of tensors."""
        rest = iter(operands)
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda n: next(rest))
        args = tuple((sizes or {}).get(i, a) for i, a in enumerate(args))
        result = (aten.reshape.default if self.node.target in VIEWS else self.node.target)(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)


def cut(x: Tensor, state: Tokens | None, cp_size: int) -> list[Tensor]:
    """Every rank's part of a value in a state; None is the whole value."""
    if state is None:
        return [x] * cp_size
    even = zigzag((TOKENS,), cp_size).even
    return MEANINGS["shard"]([x] * cp_size, state.dim, int(state.inner), [TOKENS], cp_size, even)


def same(a: list[Tensor], b: list[Tensor], values: bool) -> bool:
    def equal(x: Tensor, y: Tensor) -> bool:
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        return not values or torch.allclose(x.to(torch.complex128), y.to(torch.complex128), 1e-9, 1e-12, equal_nan=True)

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def holds(call: Call, operands: Sequence[Tokens | None], out: Tokens | None, size_arg: int | None) -> bool:
    """Whether the op on local operands gives the local rows of its output, for every rank of every group size."""
    whole = call.run(call.operands)
    if out is not None and any(x.shape[out.dim] != out.outer * TOKENS * out.inner for x in whole):
        return False  # an element that cannot carry it
    for cp_size in SIZES:
        parts = [cut(x, state, cp_size) for x, state in zip(call.operands, operands, strict=True)]
        expected = [cut(x, out, cp_size) for x in whole]
        sizes = {} if size_arg is None or out is None else {size_arg: local_sizes(call, size_arg, out, cp_size)}
        for rank in range(cp_size):
            try:
                seen = call.run([part[rank] for part in parts], sizes)
            except (RuntimeError, IndexError):  # shapes or indices that do not fit
                return False
            if not same(seen, [part[rank] for part in expected], call.sample.values):
                return False
    return True


def local_sizes(call: Call, size_arg: int, out: Tokens, cp_size: int) -> list[int]:
    """An explicit size list with the local size in the token axis, as cppass/rewrite.py writes it."""
    sizes = list(call.node.args[size_arg])  # type: ignore[arg-type]
    if sizes[out.dim] != -1:
        sizes[out.dim] = out.outer * zigzag((TOKENS,), cp_size).local_rows * out.inner
    return sizes


def states(shape: Sequence[int]) -> Iterator[Tokens]:
    """Every way a tensor of that shape could carry TOKENS rows, whether or not it does."""
    for dim, size in enumerate(shape):
        for outer in range(1, size // TOKENS + 1):
            if size % (outer * TOKENS) == 0:
                yield Tokens(dim, outer, size // (outer * TOKENS))


def forward(call: Call, slot: int, state: Tokens) -> Transfer | None:
    rule = rule_of(call.node)
    assert rule is not None
    return rule.forward(call.node, slot, state, TOKENS)


# -- the tests ---------------------------------------------------------------------------------------------------------

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)


def test_every_row_has_a_sample() -> None:
    covered = {s.op for s in SAMPLES} | set(COVERED_ELSEWHERE)
    missing = sorted(str(op) for op in RULES if op not in covered)
    assert not missing, f"add sample calls to tests/core/rule_samples.py for {missing}"


@every_sample
def test_forward_means_what_it_says(sample: Sample) -> None:
    """Whatever operand and dimension the tokens come in by."""
    call = traced(sample)
    for slot, x in enumerate(call.operands):
        for state in states(x.shape):
            transfer = forward(call, slot, state)
            if transfer is None or not transfer.out.plain:
                continue  # refused: below; local sorts: test_moe_rules.py
            assert transfer.operands[slot] == state
            assert isinstance(transfer.out, Tokens)
            assert holds(call, transfer.operands, transfer.out, transfer.size_arg), f"operand {slot}: {transfer}"  # type: ignore[arg-type]


@every_sample
def test_backward_means_what_it_says(sample: Sample) -> None:
    call = traced(sample)
    rule = rule_of(call.node)
    assert rule is not None
    for out in states(call.run(call.operands)[0].shape):
        transfer = rule.backward(call.node, out, TOKENS)
        if transfer is not None:
            assert transfer.out == out
            assert holds(call, transfer.operands, out, transfer.size_arg), f"{transfer}"  # type: ignore[arg-type]


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.op not in ONE_WAY], ids=lambda s: s.name)
def test_backward_knows_what_forward_knows(sample: Sample) -> None:
    call = traced(sample)
    rule = rule_of(call.node)
    assert rule is not None
    for slot, x in enumerate(call.operands):
        for state in states(x.shape):
            there = forward(call, slot, state)
            if there is not None and there.out.plain and isinstance(there.out, Tokens):
                assert rule.backward(call.node, there.out, TOKENS) == there


@every_sample
def test_what_is_refused_would_be_wrong(sample: Sample) -> None:
    """Try every choice of states for the other operands and for the output: none gives local rows, nor the whole."""
    call = traced(sample)
    whole = call.run(call.operands)[0]
    sizes = 1 if sample.op in VIEWS | {aten.expand.default} else None
    for slot, x in enumerate(call.operands):
        for state in states(x.shape):
            if forward(call, slot, state) is not None or (slot, state.dim) in sample.cautious:
                continue
            others = [[state] if i == slot else [None, *states(y.shape)] for i, y in enumerate(call.operands)]
            for operands in itertools.product(*others):
                for out in (None, *states(whole.shape)):
                    assert not holds(call, operands, out, sizes), f"{operands} -> {out} would be right"


def test_getitem_carries_what_the_tuple_carries() -> None:
    def halves(x: Tensor) -> Tensor:
        return aten.split.Tensor(x, 2, 1)[1]

    graph = make_fx(halves)(torch.randn(TOKENS, 4)).graph
    node = next(n for n in graph.nodes if n.target is operator.getitem)
    transfer = RULES[operator.getitem].forward(node, 0, Tokens(0), TOKENS)
    assert transfer == Transfer(Tokens(0), (Tokens(0),))


REFUSED = {
    "softmax over the tokens": (aten._softmax.default, 0, 1),
    "mean over the tokens": (aten.mean.dim, 0, 1),
    "amax over the tokens": (aten.amax.default, 0, 1),
    "contracted": (aten.mm.default, 0, 1),
    "contracted weights": (aten.mm.default, 1, 0),
    "cat along the tokens": (aten.cat.default, 0, 0),
    "slice of the tokens": (aten.slice.Tensor, 0, 1),
    "cumsum along the tokens": (aten.cumsum.default, 0, 0),
    "flip of the tokens": (aten.flip.default, 0, 0),
    "sort rows by a 2-D key": (aten.sort.default, 0, 0),
    "looked-up rows": (aten.embedding.default, 0, 0),
    "tokens cut by a view": (aten.view.default, 0, 0),
    "padded": (aten.constant_pad_nd.default, 0, 0),
    "normalised": (aten.native_layer_norm.default, 0, 1),
    "rows written by number": (aten.index_put.default, 0, 0),
}


@pytest.mark.parametrize(("op", "slot", "dim"), REFUSED.values(), ids=REFUSED.keys())
def test_ops_that_mix_tokens_are_refused(op: Any, slot: int, dim: int) -> None:
    """For each, some sample with tokens in that very dimension is refused (and proven wrong above)."""
    refused = [
        sample.name
        for sample in SAMPLES
        if sample.op is op
        for call in [traced(sample)]
        for state in states(call.operands[slot].shape)
        if state.dim == dim and forward(call, slot, state) is None
    ]
    assert refused


@pytest.mark.parametrize(
    ("op", "known"),
    [
        (aten.gelu.default, True),  # tagged pointwise
        (aten.maximum.default, True),
        (aten.max.default, False),  # the greatest of all elements
        (aten.rrelu.default, False),  # tagged pointwise, but random
        (aten.rand_like.default, False),
        (aten.cummax.default, False),
    ],
)
def test_torch_tags_say_what_is_pointwise(op: Any, known: bool) -> None:
    node = fx.Graph().call_function(op, ())
    assert (rule_of(node) is not None) == known


def test_the_check_notices_a_wrong_transfer() -> None:
    """Control: softmax over local rows of the mixed dimension, and a transfer that names the wrong dimension."""
    softmax = traced(next(s for s in SAMPLES if s.name.startswith("_softmax(2x10x4, 1")))
    assert not holds(softmax, [Tokens(1)], Tokens(1), None)
    square = traced(next(s for s in SAMPLES if s.name == "lift_fresh_copy(10x10)"))
    assert holds(square, [Tokens(0)], Tokens(0), None)
    assert not holds(square, [Tokens(0)], Tokens(1), None)
