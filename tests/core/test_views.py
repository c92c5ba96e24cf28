"""follow_view against real tensors: write each element's token number into it, view it, read where the tokens are.

Shape suffixes: B batch, S tokens, H heads, D head size, F = H * D, K experts per token.
"""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppass.tokens import Points, Tokens, divide, follow_view

Shape = tuple[int, ...]


def marked(shape: Shape, state: Tokens, tokens: int) -> Tensor:
    """Every element holds the number of its token, as `state` says where the tokens are."""
    here = torch.arange(shape[state.dim]) // state.inner % tokens
    return here.reshape(-1, *(1,) * (len(shape) - 1 - state.dim)).expand(shape).contiguous()


def true_states(viewed: Tensor, tokens: int) -> list[Tokens]:
    """Every (dim, outer, inner) that says where the tokens of a marked tensor are: found by trying them all."""
    found = []
    for dim, size in enumerate(viewed.shape):
        for outer in range(1, size // tokens + 1):
            if size % (outer * tokens) == 0:
                state = Tokens(dim, outer, size // (outer * tokens))
                if torch.equal(marked(tuple(viewed.shape), state, tokens), viewed):
                    found.append(state)
    return found


S = 6
CASES = {
    "merge batch and tokens": ((2, S, 4), Tokens(1), (2 * S, 4), Tokens(0, outer=2)),
    "split batch from tokens": ((2 * S, 4), Tokens(0, outer=2), (2, S, 4), Tokens(1)),
    "merge tokens and experts": ((S, 3), Tokens(0), (S * 3,), Tokens(0, inner=3)),
    "split experts from tokens": ((S * 3,), Tokens(0, inner=3), (S, 3), Tokens(0)),
    "merge on both sides": ((2, S, 3), Tokens(1), (2 * S * 3,), Tokens(0, 2, 3)),
    "split heads": ((1, S, 8), Tokens(1), (1, S, 2, 4), Tokens(1)),
    "merge heads": ((1, S, 2, 4), Tokens(1), (1, S, 8), Tokens(1)),
    "fold batch and heads": ((2, 3, S, 4), Tokens(2), (2 * 3, S, 4), Tokens(1)),
    "add axes of size 1": ((S, 4), Tokens(0), (1, S, 1, 4), Tokens(1)),
    "drop axes of size 1": ((1, S, 1, 4), Tokens(1), (S, 4), Tokens(0)),
    "head size == tokens": ((1, S, 2 * S), Tokens(1), (1, S, 2, S), Tokens(1)),
    "head size == tokens, tokens last": ((1, 2 * S, S), Tokens(2), (1, 2, S, S), Tokens(3)),
    "batch == tokens": ((S, S, 4), Tokens(1), (S * S, 4), Tokens(0, outer=S)),
    "batch == tokens, split again": ((S * S, 4), Tokens(0, outer=S), (S, S, 4), Tokens(1)),
    "tokens first, batch == tokens": ((S, S, 4), Tokens(0), (S * S, 4), Tokens(0, inner=S)),
    "part of outer leaves": ((4 * S, 5), Tokens(0, outer=4), (2, 2 * S, 5), Tokens(1, outer=2)),
    "part of inner leaves": ((S * 4, 5), Tokens(0, inner=4), (S * 2, 2, 5), Tokens(0, inner=2)),
    "regrouped behind the tokens": ((2, S, 6), Tokens(1), (2, S, 3, 2), Tokens(1)),
    "cut the token axis": ((S, 4), Tokens(0), (2, S // 2, 4), None),
    "cut it and merge the rest": ((S, 4), Tokens(0), (2, S * 2), None),
    "transpose by a view": ((S, 4), Tokens(0), (4, S), None),
    "a view that changes nothing, equal sizes": ((S, S), Tokens(0), (S, S), Tokens(0)),
}


@pytest.mark.parametrize(("old", "state", "new", "expected"), CASES.values(), ids=CASES.keys())
def test_view(old: Shape, state: Tokens, new: Shape, expected: Tokens | None) -> None:
    assert follow_view(old, state, new, S) == expected
    assert true_states(marked(old, state, S).view(new), S) == ([] if expected is None else [expected])


# -- any view at all -----------------------------------------------------------------------------------------------


def splits(size: int) -> list[Shape]:
    """Every shape of one to three dimensions with `size` elements."""
    return [
        shape
        for length in range(1, 4)
        for shape in itertools.product(*[[f for f in range(1, size + 1) if size % f == 0]] * length)
        if math.prod(shape) == size
    ]


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(
    tokens=st.integers(2, 6),
    outer=st.integers(1, 3),
    inner=st.integers(1, 3),
    before=st.lists(st.integers(1, 3), max_size=2),
    after=st.lists(st.integers(1, 3), max_size=2),
    data=st.data(),
)
def test_the_claim_is_exactly_right(
    tokens: int, outer: int, inner: int, before: list[int], after: list[int], data: st.DataObject
) -> None:
    """A state is claimed where the tokens are, and None only where no dimension carries them."""
    old = (*before, outer * tokens * inner, *after)
    state = Tokens(len(before), outer, inner)
    assume(math.prod(old) <= 400)
    new = data.draw(st.sampled_from(splits(math.prod(old))))
    truth = true_states(marked(old, state, tokens).view(new), tokens)
    claim = follow_view(old, state, new, tokens)
    assert ([] if claim is None else [claim]) == truth


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(tokens=st.integers(2, 6), outer=st.integers(1, 3), inner=st.integers(1, 3), data=st.data())
def test_a_view_back_leads_back(tokens: int, outer: int, inner: int, data: st.DataObject) -> None:
    old, state = (2, outer * tokens * inner, 3), Tokens(1, outer, inner)
    new = data.draw(st.sampled_from(splits(math.prod(old))))
    there = follow_view(old, state, new, tokens)
    assert there is None or follow_view(new, there, old, tokens) == state


def test_marks_notice_a_wrong_state() -> None:
    """Control: a state that is off by one dimension, or that swaps outer and inner, is not what the tensor says."""
    viewed = marked((2, S, 3), Tokens(1), S).view(2 * S, 3)
    assert true_states(viewed, S) == [Tokens(0, outer=2)]
    assert not torch.equal(marked((2 * S, 3), Tokens(0, inner=2), S), viewed)


# -- symbolic sizes --------------------------------------------------------------------------------------------------

s, b, h = (sympy.Symbol(name, positive=True, integer=True) for name in ("s", "b", "h"))
SYMBOLIC = {
    "merge batch": ((b, s, 8), Tokens(1), (b * s, 8), Tokens(0, outer=b)),
    "split batch": ((b * s, 8), Tokens(0, outer=b), (b, s, 8), Tokens(1)),
    "split heads": ((1, s, 8), Tokens(1), (1, s, 2, 4), Tokens(1)),
    "experts": ((s, 4), Tokens(0), (4 * s,), Tokens(0, inner=4)),
    "symbolic heads": ((1, s, h * 8), Tokens(1), (1, s, h, 8), Tokens(1)),
    "fold symbolic heads": ((b, h, s, 4), Tokens(2), (b * h, s, 4), Tokens(1)),
    "two symbols around the tokens": ((b, s, h), Tokens(1), (b * s * h,), Tokens(0, b, h)),
    "transpose by a view": ((s, 4), Tokens(0), (4, s), None),
}


@pytest.mark.parametrize(("old", "state", "new", "expected"), SYMBOLIC.values(), ids=SYMBOLIC.keys())
def test_symbolic_view(old: tuple, state: Tokens, new: tuple, expected: Tokens | None) -> None:
    assert follow_view(old, state, new, s) == expected


@pytest.mark.parametrize("name", [name for name, case in SYMBOLIC.items() if case[3] is not None])
def test_symbolic_view_is_right_for_numbers(name: str) -> None:
    """Put numbers in: the symbolic claim is where the tokens of a real tensor are."""
    old, state, new, expected = SYMBOLIC[name]
    assert expected is not None

    def number(size: object) -> int:
        return int(sympy.sympify(size).subs({s: 5, b: 2, h: 3}))

    def at_numbers(state: Tokens) -> Tokens:
        return Tokens(state.dim, number(state.outer), number(state.inner))

    viewed = marked(tuple(number(n) for n in old), at_numbers(state), 5).view(*(number(n) for n in new))
    assert true_states(viewed, 5) == [at_numbers(expected)]


def test_local_rows_are_followed_as_tokens_are() -> None:
    """In a rewritten graph one pass over the rows is the local rows m: the same arithmetic with m for S."""
    assert follow_view((1, 4, 8), Tokens(1), (4, 2, 4), 4) == Tokens(0)
    assert follow_view((1, 4, 8), Tokens(1), (4, 2, 4), 16) is None


def test_what_the_values_mean_goes_along() -> None:
    points = Points(inner=2)
    state = Tokens(0, inner=2, order="sort", points=points)
    assert follow_view((2 * S,), state, (S, 2), S) == Tokens(0, order="sort", points=points)


@pytest.mark.parametrize(
    ("a", "b", "quotient"),
    [
        (6, 3, 2),
        (6, 4, None),
        (0, 3, 0),
        (6, 0, None),
        (6 * s, 3 * s, 2),
        (s, 2, None),
        (s * b, b, s),
        (s, s * b, None),
    ],
)
def test_divide_is_exact_or_none(a: object, b: object, quotient: object) -> None:
    assert divide(a, b) == quotient  # type: ignore[arg-type]
