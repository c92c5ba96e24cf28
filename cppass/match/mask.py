"""Is a mask plainly causal? Read the value of one mask element as an expression of its indices.

    arange(T)[None, :] <= (arange(S) + length)[:, None]      element (q, k) is  k <= q + length      causal

Elements are pulled: `element(node, (q, k))` asks the operands for theirs. Whatever depends on data (a padding mask) is
unknown, and the mask is then taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from cppass.rules import argument, shape_of, static
from cppass.site import Causal
from cppass.tokens import size_of

aten = torch.ops.aten
Index = tuple[sympy.Expr, ...]
Q, K = sympy.Symbol("query_row", integer=True), sympy.Symbol("key_row", integer=True)
OPAQUE = "value_"  # names of values that are not known while compiling
HIDDEN = -1e4  # additive masks hide a key with a value below this


class Unknown(Exception):
    """The element is not an expression of its indices."""


def causal_mask(mask: fx.Node) -> Causal | None:
    """What a mask [..., S, T] (bool, or additive 0 / very negative) says if it is plainly causal, else None."""
    ndim = len(shape_of(mask))
    other = sympy.symbols(f"batch0:{ndim - 2}", integer=True)
    reader = _Reader()
    try:
        element = reader.element(mask, (*other, Q, K))
        seen = _visible(element)
        conditions = list(sympy.And.make_args(seen))
        bounds = [_linear(c) for c in conditions]
        prefix = next(c for q, k, c in bounds if (q, k) == (1, -1))
        windows = [static_int(c + prefix) + 1 for q, k, c in bounds if (q, k) == (-1, 1)]
        if len(windows) + 1 != len(bounds) or len(windows) > 1 or prefix.free_symbols & {*other}:
            return None
        constant, terms = reader.terms(prefix)
    except (Unknown, StopIteration):
        return None
    if any(window < 1 for window in windows) or not (terms or _fits(constant, mask)):
        return None
    if constant < 0 and _hides_by_number(element):
        return None
    return Causal(constant, terms, windows[0] if windows else 0)


def _fits(prefix: int, mask: fx.Node) -> bool:
    """Every row of the mask sees a key, and the last one none behind the end."""
    rows, keys = shape_of(mask)[-2:]
    behind = keys - (rows + prefix)
    return prefix >= 0 and (behind >= 0) is not False and (behind >= 0) != sympy.false


def static_int(value: sympy.Expr) -> int:
    if not value.is_Integer:
        raise Unknown
    return int(value)


def _visible(element: Any) -> sympy.Basic:
    """The condition under which a key is visible: a bool as it is, an additive mask where it adds 0."""
    if isinstance(element, sympy.Piecewise):
        (seen, condition), (hidden, _) = element.args
        if float(seen) == 0 and float(hidden) < HIDDEN:
            return condition
        raise Unknown
    if element is sympy.true or isinstance(element, (sympy.And, sympy.core.relational.Relational)):
        return element
    raise Unknown


def _hides_by_number(element: Any) -> bool:
    """Hidden keys get a finite number: a row without a visible key then sees all of them alike."""
    return isinstance(element, sympy.Piecewise) and element.args[1][0] != -sympy.oo


def _linear(condition: sympy.Basic) -> tuple[int, int, sympy.Expr]:
    """(a, b, c) of a condition a * q + b * k + c >= 0 over integers."""
    if isinstance(condition, (sympy.Ge, sympy.Gt)):
        difference, strict = condition.lhs - condition.rhs, isinstance(condition, sympy.Gt)
    elif isinstance(condition, (sympy.Le, sympy.Lt)):
        difference, strict = condition.rhs - condition.lhs, isinstance(condition, sympy.Lt)
    else:
        raise Unknown
    difference = sympy.expand(difference) - (1 if strict else 0)
    a, b = difference.coeff(Q), difference.coeff(K)
    rest = sympy.expand(difference - a * Q - b * K)
    if not (a.is_Integer and b.is_Integer) or rest.has(Q) or rest.has(K):
        raise Unknown
    return int(a), int(b), rest


class _Reader:
    def __init__(self) -> None:
        self.opaque: dict[sympy.Symbol, fx.Node] = {}

    def terms(self, prefix: sympy.Expr) -> tuple[int, tuple[fx.Node, ...]]:
        """A sum of a constant and opaque values, as (constant, nodes)."""
        constant, terms = 0, []
        for term in sympy.Add.make_args(prefix):
            if term.is_Integer:
                constant += int(term)
            elif term in self.opaque:
                terms.append(self.opaque[term])
            else:
                raise Unknown
        return constant, tuple(terms)

    def element(self, node: Any, index: Index) -> Any:
        if not isinstance(node, fx.Node):
            if isinstance(node, (bool, int, float)):
                return sympy.sympify(node)
            raise Unknown
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return self._scalar(node, value)
        read = READERS.get(node.target)
        if read is not None:
            return read(self, node, index)
        if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point():
            return self._opaque(node)
        raise Unknown

    def operand(self, out: fx.Node, node: Any, index: Index) -> Any:
        """The element of an operand that broadcasts to `out`."""
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor):
            shape = shape_of(node)
            tail = index[len(index) - len(shape) :]
            index = tuple(sympy.S.Zero if n == 1 else i for n, i in zip(shape, tail, strict=True))
        return self.element(node, index)

    def _scalar(self, node: fx.Node, value: int | torch.SymInt) -> sympy.Expr:
        size = size_of(value)
        return sympy.Integer(size) if isinstance(size, int) else self._opaque(node)

    def _opaque(self, node: fx.Node) -> sympy.Symbol:
        symbol = sympy.Symbol(f"{OPAQUE}{node.name}", integer=True)
        self.opaque[symbol] = node
        return symbol


Read = Callable[[_Reader, fx.Node, Index], Any]


def _binary(function: Callable[[Any, Any], Any]) -> Read:
    def read(reader: _Reader, node: fx.Node, index: Index) -> Any:
        a, b = (reader.operand(node, x, index) for x in node.args[:2])
        if argument(node, 2, "alpha", 1) != 1:
            raise Unknown
        return function(a, b)

    return read


def _arithmetic(function: Callable[[Any, Any], Any]) -> Read:
    def checked(a: Any, b: Any) -> Any:
        if not all(isinstance(x, sympy.Expr) and not isinstance(x, sympy.Piecewise) for x in (a, b)):
            raise Unknown
        return sympy.expand(function(a, b))

    return _binary(checked)


def _same(reader: _Reader, node: fx.Node, index: Index) -> Any:
    return reader.operand(node, node.args[0], index)


def _arange(reader: _Reader, node: fx.Node, index: Index) -> Any:
    positional = node.args
    start = positional[0] if len(positional) > 1 else 0
    step = positional[2] if len(positional) > 2 else 1
    return sympy.expand(reader.element(start, ()) + reader.element(step, ()) * index[0])


def _unsqueeze(reader: _Reader, node: fx.Node, index: Index) -> Any:
    dim = argument(node, 1, "dim") % len(index)
    return reader.element(node.args[0], index[:dim] + index[dim + 1 :])


def _slice(reader: _Reader, node: fx.Node, index: Index) -> Any:
    dim = argument(node, 1, "dim", 0) % len(index)
    start = static(argument(node, 2, "start", 0) or 0)
    if start is None or start < 0 or argument(node, 4, "step", 1) != 1:
        raise Unknown
    return reader.element(node.args[0], (*index[:dim], index[dim] + start, *index[dim + 1 :]))


def _select(reader: _Reader, node: fx.Node, index: Index) -> Any:
    dim, at = argument(node, 1, "dim", 0) % (len(index) + 1), static(argument(node, 2, "index"))
    if at is None or at < 0:
        raise Unknown
    return reader.element(node.args[0], (*index[:dim], sympy.Integer(at), *index[dim:]))


def _transpose(reader: _Reader, node: fx.Node, index: Index) -> Any:
    swapped = list(index)
    a, b = (argument(node, i, f"dim{i - 1}") % len(index) for i in (1, 2))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return reader.element(node.args[0], tuple(swapped))


def _cat(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """One row, then the rest: the expression of the rest, if the row fits it."""
    parts, dim = node.args[0], argument(node, 1, "dim", 0) % len(index)
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise Unknown
    head, tail = parts
    if not isinstance(head, fx.Node) or shape_of(head)[dim] != 1:
        raise Unknown

    def at(node: Any, position: sympy.Expr) -> Any:
        return reader.element(node, (*index[:dim], position, *index[dim + 1 :]))

    row = sympy.Dummy(integer=True)
    rest = at(tail, row - 1)
    if not isinstance(rest, sympy.Expr) or sympy.expand(rest.subs(row, 0) - at(head, sympy.S.Zero)) != 0:
        raise Unknown
    return rest.subs(row, index[dim])


def _cumsum(reader: _Reader, node: fx.Node, index: Index) -> Any:
    dim = argument(node, 1, "dim") % len(index)
    row = sympy.Dummy(integer=True)
    summand = reader.element(node.args[0], (*index[:dim], row, *index[dim + 1 :]))
    summand = sympy.Integer(int(summand is sympy.true)) if summand in (sympy.true, sympy.false) else summand
    if not isinstance(summand, sympy.Expr) or summand.has(row):
        raise Unknown
    return sympy.expand(summand * (index[dim] + 1))


def _index(reader: _Reader, node: fx.Node, index: Index) -> Any:
    table, indices = node.args[0], node.args[1]
    if not isinstance(table, fx.Node) or not isinstance(indices, (list, tuple)) or None in indices:
        raise Unknown
    if len(indices) != len(shape_of(table)):
        raise Unknown
    looked_up = tuple(reader.operand(node, i, index) for i in indices)
    if not all(_counts_from_zero(i) for i in looked_up):
        raise Unknown  # a negative number counts from the end
    return reader.element(table, looked_up)


def _counts_from_zero(index: Any) -> bool:
    """A sum of row numbers and positive constants: provably not negative."""
    if not isinstance(index, sympy.Expr):
        return False
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(index))]
    return all(c >= 0 and (rest == 1 or (rest.is_Symbol and not rest.name.startswith(OPAQUE))) for c, rest in terms)


def _constant(position: int) -> Read:
    return lambda reader, node, index: reader.element(node.args[position], ())


def _where(reader: _Reader, node: fx.Node, index: Index) -> Any:
    condition, yes, no = (reader.operand(node, x, index) for x in node.args[:3])
    if condition in (sympy.true, sympy.false):
        return yes if condition is sympy.true else no
    if not (getattr(yes, "is_number", False) and getattr(no, "is_number", False)):
        raise Unknown
    return sympy.Piecewise((yes, condition), (no, True))


def _view(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """Views that only add or drop axes of size 1."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise Unknown
    old, new = shape_of(source), shape_of(node)
    kept = [i for i, n in zip(index, new, strict=True) if n != 1]
    if [n for n in old if n != 1] != [n for n in new if n != 1]:
        raise Unknown
    wanted = iter(kept)
    return reader.element(source, tuple(sympy.S.Zero if n == 1 else next(wanted) for n in old))


def _logical(function: Callable[[Any, Any], Any]) -> Read:
    def checked(a: Any, b: Any) -> Any:
        if not all(isinstance(x, sympy.logic.boolalg.Boolean) for x in (a, b)):
            raise Unknown
        return function(a, b)

    return _binary(checked)


READERS: dict[Any, Read] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.add.Tensor: _arithmetic(lambda a, b: a + b),
    aten.sub.Tensor: _arithmetic(lambda a, b: a - b),
    aten.le.Tensor: _binary(lambda a, b: sympy.Le(a, b)),
    aten.lt.Tensor: _binary(lambda a, b: sympy.Lt(a, b)),
    aten.ge.Tensor: _binary(lambda a, b: sympy.Ge(a, b)),
    aten.gt.Tensor: _binary(lambda a, b: sympy.Gt(a, b)),
    aten.eq.Tensor: _binary(lambda a, b: sympy.Eq(a, b)),
    aten.ne.Scalar: _binary(lambda a, b: sympy.Ne(a, b)),
    aten.bitwise_and.Tensor: _logical(lambda a, b: sympy.And(a, b)),
    aten.logical_and.default: _logical(lambda a, b: sympy.And(a, b)),
    aten.bitwise_not.default: lambda r, n, i: sympy.Not(_same(r, n, i)),
    aten.logical_not.default: lambda r, n, i: sympy.Not(_same(r, n, i)),
    aten.where.self: _where,
    aten.expand.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _view,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.transpose.int: _transpose,
    aten.cat.default: _cat,
    aten.cumsum.default: _cumsum,
    aten.index.Tensor: _index,
    aten.scalar_tensor.default: _constant(0),
    aten.full.default: _constant(1),
    aten.new_ones.default: lambda r, n, i: sympy.true if n.meta["val"].dtype == torch.bool else sympy.S.One,
    aten.ones.default: lambda r, n, i: sympy.true if n.meta["val"].dtype == torch.bool else sympy.S.One,
    aten.zeros.default: lambda r, n, i: sympy.false if n.meta["val"].dtype == torch.bool else sympy.S.Zero,
}
