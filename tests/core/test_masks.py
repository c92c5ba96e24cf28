"""causal_mask reads a mask's graph: what it calls causal is checked against the mask itself, element by element.

Shape suffixes: B batch, S query rows, T keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from cppass.match.mask import causal_mask
from cppass.site import Causal

S, T, B = 5, 9, 2
Build = Callable[..., Tensor]


def rows() -> Tensor:
    return torch.arange(S)[:, None]


def keys() -> Tensor:
    return torch.arange(T)[None, :]


def length(value: int) -> Tensor:
    return torch.tensor(value)


def past(tokens: int) -> Tensor:
    return torch.zeros(1, 1, tokens, 4)


# -- what transformers builds: index grids that broadcast, conditions and-ed together ----------------------------------


def grids(offset: Any = 0, batch: int = B) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of batch, head, query and key as [B, 1, 1, 1], [1, 1, 1, 1], [1, 1, S, 1], [1, 1, 1, T]."""
    return (
        torch.arange(batch)[:, None, None, None],
        torch.arange(1)[None, :, None, None],
        (torch.arange(S) + offset)[None, None, :, None],
        torch.arange(T)[None, None, None, :],
    )


def all_of(q: Tensor, *conditions: Tensor) -> Tensor:
    """transformers.masking_utils.and_masks."""
    result = q.new_ones((), dtype=torch.bool)
    for condition in conditions:
        result = result & condition
    return result


def chained(offset: Any = 0, window: int = 0) -> Tensor:
    _, _, q, k = grids(offset)
    conditions = [k > q - window, k <= q] if window else [k <= q]
    return all_of(q, *conditions).expand(B, -1, S, T)


def packed(position_ids: Tensor) -> Tensor:
    """Sequences packed in a row start where positions do not go up by one; keys of other sequences are hidden."""
    first = position_ids[:, :1] - 1
    sequence = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
    b, _, q, _ = grids(batch=1)
    k = q.transpose(2, 3)  # without a cache: as many keys as queries
    return all_of(q, k <= q, sequence[b, q] == sequence[b, k])


def additive(seen: Tensor, hidden: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.where(seen, torch.zeros((), dtype=dtype), hidden)


# -- name: (mask, inputs, (constant, number of terms, window)) ---------------------------------------------------------

RECOGNISED: dict[str, tuple[Build, tuple[Any, ...], tuple[int, int, int]]] = {
    "k <= q": (lambda: keys() <= rows(), (), (0, 0, 0)),
    "q >= k": (lambda: rows() >= keys(), (), (0, 0, 0)),
    "k < q + 1": (lambda: keys() < rows() + 1, (), (0, 0, 0)),
    "k - q < 1": (lambda: keys() - rows() < torch.ones((), dtype=torch.long), (), (0, 0, 0)),
    "one key more": (lambda: keys() <= rows() + 1, (), (1, 0, 0)),
    "as many keys as there are": (lambda: keys() <= rows() + T - S, (), (T - S, 0, 0)),
    "not (k > q)": (lambda: ~(keys() > rows()), (), (0, 0, 0)),
    "logical_not (k > q)": (lambda: torch.logical_not(keys() > rows()), (), (0, 0, 0)),
    "int offset": (lambda: keys() <= rows() + 3, (), (3, 0, 0)),
    "arange(3, 8)": (lambda: keys() <= torch.arange(3, 3 + S)[:, None], (), (3, 0, 0)),
    "offsets on both sides": (lambda: keys() + 1 <= rows() + 4, (), (3, 0, 0)),
    "length in a tensor": (lambda n: keys() <= rows() + n, (length(4),), (0, 1, 0)),
    "two lengths and a number": (lambda n, m: keys() <= (rows() + n) + m - 1, (length(2), length(3)), (-1, 2, 0)),
    "length of another tensor": (lambda x: keys() <= rows() + x.shape[2], (past(4),), (0, 1, 0)),
    "arange from a symbolic start": (
        lambda x: keys() <= torch.arange(x.shape[2], x.shape[2] + S)[:, None],
        (past(4),),
        (0, 1, 0),
    ),
    "chain of grids": (lambda: chained(), (), (0, 0, 0)),
    "chain, filled cache": (lambda n: chained(n), (length(4),), (0, 1, 0)),
    "sliding window": (lambda: (keys() <= rows()) & (keys() > rows() - 3), (), (0, 0, 3)),
    "sliding window, >=": (lambda: (keys() >= rows() - 2) & (rows() >= keys()), (), (0, 0, 3)),
    "sliding window of one key": (lambda: (keys() <= rows()) & (keys() > rows() - 1), (), (0, 0, 1)),
    "sliding window in a chain": (lambda n: chained(n, window=2), (length(3),), (0, 1, 2)),
    "packed, positions are plain": (lambda: packed(torch.arange(S)[None]), (), (0, 0, 0)),
    "added: 0 or -inf": (lambda: additive(keys() <= rows(), float("-inf")), (), (0, 0, 0)),
    "added: 0 or finfo.min": (lambda: additive(chained(), torch.finfo(torch.float32).min), (), (0, 0, 0)),
    "added: 0 or finfo.min, half": (
        lambda: additive(chained(), torch.finfo(torch.float16).min, torch.float16),
        (),
        (0, 0, 0),
    ),
    "added: 0 or -1e9": (lambda: torch.where(keys() <= rows(), 0.0, -1e9), (), (0, 0, 0)),
    "viewed as [1, 1, S, T]": (lambda: (keys() <= rows()).view(1, 1, S, T), (), (0, 0, 0)),
    "rows of a larger mask": (
        lambda: (torch.arange(T)[None, :] <= torch.arange(T)[:, None])[2 : 2 + S],
        (),
        (2, 0, 0),
    ),
    "transposed": (lambda: (torch.arange(T)[:, None] <= torch.arange(S)[None, :]).transpose(0, 1), (), (0, 0, 0)),
    "one of several": (
        lambda: (torch.arange(2)[:, None, None] + keys()[None] <= torch.arange(2)[:, None, None] + rows()[None])[1],
        (),
        (0, 0, 0),
    ),
}


def position_ids(*values: int) -> Tensor:
    return torch.tensor([values])


NOT_PROVEN: dict[str, tuple[Build, tuple[Any, ...]]] = {
    "a mask that is an input": (lambda m: m, (torch.ones(S, T, dtype=torch.bool).tril(),)),
    "everything": (lambda: torch.ones(S, T, dtype=torch.bool), ()),
    "one key less, row 0 sees none": (lambda: keys() < rows(), ()),
    "more keys than there are": (lambda: keys() <= rows() + T - S + 1, ()),
    "k >= q": (lambda: keys() >= rows(), ()),
    "not (k <= q)": (lambda: ~(keys() <= rows()), ()),
    "no query row in it": (lambda: (keys() <= 3).expand(S, T), ()),
    "only the length": (lambda n: (keys() <= n).expand(S, T), (length(4),)),
    "2-D padding mask": (
        lambda pad: all_of(grids()[2], grids()[3] <= grids()[2], pad[:, None, None, :]),
        (torch.ones(B, T, dtype=torch.bool),),
    ),
    "packed, positions are given": (lambda p: packed(p), (position_ids(0, 1, 2, 0, 1),)),
    "packed, positions are given but plain": (lambda p: packed(p), (position_ids(0, 1, 2, 3, 4),)),
    "packed, positions skip": (lambda: packed(torch.arange(0, 2 * S, 2)[None]), ()),
    "chunked": (lambda: (keys() <= rows()) & (keys() // 3 == rows() // 3), ()),
    "two steps per row": (lambda: keys() <= torch.arange(0, 2 * S, 2)[:, None], ()),
    "rows from last to first": (lambda: keys() <= torch.arange(S - 1, -1, -1)[:, None], ()),
    "a length of each sequence": (lambda n: grids()[3] <= grids()[2] + n[:, None, None, None], (torch.tensor([1, 2]),)),
    "the batch number is a length": (lambda: grids()[3] <= grids()[2] + grids()[0], ()),
    "or": (lambda: (keys() <= rows()) | (keys() == 0), ()),  # an attention sink
    "window only": (lambda: keys() > rows() - 3, ()),
    "window from both sides": (lambda: (keys() - rows()).abs() <= 2, ()),
    "three bounds": (lambda: (keys() <= rows()) & (keys() > rows() - 3) & (keys() >= 1), ()),
    "window of a tensor's size": (lambda n: (keys() <= rows()) & (keys() > rows() - n), (length(3),)),
    "added: 0 or -1": (lambda: additive(keys() <= rows(), -1.0), ()),
    "added: 1 or -inf": (lambda: torch.where(keys() <= rows(), 1.0, float("-inf")), ()),
    "added: -inf where seen": (lambda: torch.where(keys() <= rows(), float("-inf"), 0.0), ()),
    "added: a distance": (lambda: torch.where(keys() <= rows(), (keys() - rows()).float(), float("-inf")), ()),
    "added to another": (lambda b: additive(keys() <= rows(), float("-inf")) + b, (torch.randn(S, T),)),
    "half a key": (lambda: keys().float() <= rows().float() + 0.5, ()),
    "twice the length": (lambda n: keys() <= rows() + n + n, (length(2),)),
}

FAR_FETCHED: dict[str, tuple[Build, tuple[Any, ...]]] = {
    "rows looked up by a negative number": (lambda: keys() <= torch.arange(S)[torch.arange(S) - 1][:, None], ()),
    "a window of no key": (lambda: (keys() <= rows()) & (keys() >= rows() + 1), ()),
}


# -- a graph, its mask, and what both say ------------------------------------------------------------------------------


def traced(build: Build, inputs: tuple[Any, ...]) -> tuple[fx.GraphModule, fx.Node]:
    gm = make_fx(build, tracing_mode="symbolic")(*inputs)
    (mask,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    return gm, mask


class Values(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)


def visible(mask: Tensor) -> Tensor:
    """[S, T] of the only mask there is, over batch and heads."""
    seen = mask if mask.dtype is torch.bool else mask == 0
    seen = seen.reshape(-1, *seen.shape[-2:])
    assert bool((seen == seen[0]).all())
    return seen[0]


def described(causal: Causal, prefix: int, queries: int, key_count: int) -> Tensor:
    """The mask that a Causal stands for: query p sees (prefix + p - window, prefix + p]."""
    p, k = torch.arange(queries)[:, None], torch.arange(key_count)[None, :]
    seen = k <= prefix + p
    return seen & (k > prefix + p - causal.window) if causal.window else seen


@pytest.mark.parametrize(("build", "inputs", "expected"), RECOGNISED.values(), ids=RECOGNISED.keys())
def test_recognised(build: Build, inputs: tuple[Any, ...], expected: tuple[int, int, int]) -> None:
    causal = causal_mask(traced(build, inputs)[1])
    assert causal is not None
    assert (causal.constant, len(causal.terms), causal.window) == expected


@pytest.mark.parametrize(("build", "inputs", "expected"), RECOGNISED.values(), ids=RECOGNISED.keys())
def test_the_description_is_the_mask(build: Build, inputs: tuple[Any, ...], expected: object) -> None:
    gm, node = traced(build, inputs)
    causal = causal_mask(node)
    assert causal is not None
    values = Values(gm)
    seen = visible(values.run(*inputs))
    prefix = causal.constant + sum(int(values.env[term]) for term in causal.terms)
    assert torch.equal(described(causal, prefix, *seen.shape), seen)
    assert not torch.equal(described(causal, prefix + 1, *seen.shape), seen)  # control: off by one is another mask


@pytest.mark.parametrize(("build", "inputs"), NOT_PROVEN.values(), ids=NOT_PROVEN.keys())
def test_not_proven(build: Build, inputs: tuple[Any, ...]) -> None:
    assert causal_mask(traced(build, inputs)[1]) is None


@pytest.mark.parametrize(("build", "inputs"), FAR_FETCHED.values(), ids=FAR_FETCHED.keys())
def test_far_fetched_masks_are_not_misread(build: Build, inputs: tuple[Any, ...]) -> None:
    """Nobody writes these; still, what is called causal has to be."""
    gm, node = traced(build, inputs)
    causal = causal_mask(node)
    if causal is not None:
        seen = visible(gm(*inputs))
        assert torch.equal(described(causal, causal.constant, *seen.shape), seen)


@pytest.mark.parametrize("value", [0, 1, 4])
def test_one_description_for_every_length(value: int) -> None:
    """The term is the input itself, whatever its value is when the graph runs."""
    gm, node = traced(lambda n: chained(n), (length(2),))
    causal = causal_mask(node)
    assert causal is not None
    assert [t.op for t in causal.terms] == ["placeholder"]
    assert torch.equal(visible(gm(length(value))), described(causal, value, S, T))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_symbolic_length_stays_symbolic(tokens: int) -> None:
    gm, node = traced(lambda x: keys() <= rows() + x.shape[2], (past(3),))
    causal = causal_mask(node)
    assert causal is not None
    assert torch.equal(visible(gm(past(tokens))), described(causal, tokens, S, T))


def test_a_mask_for_all_queries_is_not_causal() -> None:
    """[1, T]: one row that every query shares, although it was made from a query index."""
    assert causal_mask(traced(lambda n: keys() <= torch.arange(1)[:, None] + n, (length(3),))[1]) is None
