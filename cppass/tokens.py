"""How a value carries tokens: the state of a Local value, and the exact arithmetic of views.

A node of the graph has a *Full* value (what the original graph computed), a *Local* value (this rank's zigzag rows) or
both. What a Local value looks like is a `State`: the axis that carries tokens, found by provenance and never by size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

import sympy
import torch

Size: TypeAlias = int | sympy.Expr


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A value whose dimension `dim` carries tokens.

    The size of `dim` is `outer * tokens * inner`: `view(x_BSH, [B*S, H])` has outer B, `view(topk_SK, [S*K])` inner K.

    Attributes:
        dim: the dimension, counted from 0.
        outer, inner: factors of its size around the tokens.
        order: "" for the layout's order; else the name of the local sort whose order the rows are in.
        points: for integer values that are row numbers of another axis: that axis (see Points).
    """

    dim: int
    outer: Size = 1
    inner: Size = 1
    order: str = ""
    points: Points | None = None

    @property
    def plain(self) -> bool:
        """True where the value can be sharded from, and gathered to, its Full value."""
        return not self.order and self.points is None

    @property
    def bare(self) -> bool:
        """True where the dimension is the tokens and nothing else."""
        return self.plain and (self.outer, self.inner) == (1, 1)

    def at(self, dim: int) -> Tokens:
        return dataclasses.replace(self, dim=dim)

    def __str__(self) -> str:
        factors = [str(f) for f in (self.outer, "tokens", self.inner) if f != 1]
        extra = (f", sorted by {self.order}" if self.order else "") + (", row numbers" if self.points else "")
        return f"Local(dim {self.dim} = {' * '.join(factors)}{extra})"


@dataclasses.dataclass(frozen=True)
class Points:
    """Values are row numbers of an axis of `outer * tokens * inner` rows in the given order: MoE's sort permutations.

    They number the *local* rows, so they mean nothing on another rank: such a value is used to index that very axis
    on its own rank and is never gathered.
    """

    outer: Size = 1
    inner: Size = 1
    order: str = ""


@dataclasses.dataclass(frozen=True)
class Counts:
    """A rank-local aggregate over the rows of one local sort (tokens per expert); only that sort's rows may meet it."""

    order: str
    plain = False
    points = None

    def __str__(self) -> str:
        return f"Local(counts of {self.order})"


State: TypeAlias = Tokens | Counts


def size_of(value: int | torch.SymInt) -> Size:
    """A plain int, or the sympy expression of a SymInt."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_Integer else expression  # a symbol that turned out to be a number


def sizes_of(shape: torch.Size) -> tuple[Size, ...]:
    return tuple(size_of(s) for s in shape)


def product(sizes: tuple[Size, ...]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


@functools.lru_cache(maxsize=4096)
def divide(a: Size, b: Size) -> Size | None:
    """a / b where that is exactly a positive integer expression, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b > 0 and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.fraction(quotient)[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


def follow_view(old: tuple[Size, ...], state: Tokens, new: tuple[Size, ...], rows: Size) -> Tokens | None:
    """The state after a view of shape `old` as shape `new`, by stride arithmetic; None if the view cuts the token axis.

    before:  x[B, S, H]  tokens in dim 1                      after:  view(x, [B*S, H])  dim 0, outer B
    before:  x[S, K]     tokens in dim 0                      after:  view(x, [S*K])     dim 0, inner K

    Args:
        rows: what one pass over the tokens counts (the token count, or the local rows in a rewritten graph).
    """
    if old[: state.dim + 1] == new[: state.dim + 1]:
        return state  # only what is behind the axis is grouped anew, and be its sizes not comparable
    step = state.inner * product(old[state.dim + 1 :])  # elements from one token to the next
    below: Size = 1
    for dim in reversed(range(len(new))):
        inner = divide(step, below)
        if inner is not None:
            outer = divide(new[dim], rows * inner)
            if outer is not None and (isinstance(new[dim], sympy.Expr) or new[dim] != 0):
                return dataclasses.replace(state, dim=dim, outer=outer, inner=inner)
        below = below * new[dim]
    return None
