"""Attention written out: softmax(q @ k.T * scale + mask) @ v.

    scores = bmm(view(q), view(transpose(k)))
    weights = softmax(view(scores) * scale + mask)
    out = view(bmm(view(weights), view(v)))

Where it is exactly that, it becomes the same canonical op as scaled_dot_product_attention. Where something else happens
to the scores (soft caps, sinks, ALiBi, weights that are an output), the site keeps its ops and runs row by row: every
query row sees its whole key range, so local rows of it are all that is needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import refuse
from cppass.match.kv import SAME, VIEWS, fresh_rows, peel_repeats, skip_same, write_of
from cppass.match.mask import causal_mask
from cppass.rules import argument, is_random, is_tensor, shape_of, tensor_operands
from cppass.site import AttentionSite, Fresh, Rewrite
from cppass.tokens import product

aten = torch.ops.aten

PRODUCTS: dict[Any, int] = {
    aten.bmm.default: 0,
    aten.baddbmm.default: 1,
    aten.mm.default: 0,
}  # op -> position of its left operand
CONVERSIONS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}


def match_eager(softmax: fx.Node) -> AttentionSite | Refusal | None:
    """The attention around a softmax; None where the softmax is no attention (a router's)."""
    ndim = len(shape_of(softmax))
    if argument(softmax, 1, "dim") % ndim != ndim - 1:
        return None
    scores = _product_above(softmax.args[0])
    out = _product_below(softmax)
    if scores is None:
        return None
    if out is None and _is_dropped(softmax):
        return refuse(
            "CP102",
            softmax,
            "attention with dropout: ranks would drop different weights than one device",
            "call model.eval(), or set the model's attention_dropout to 0",
        )
    if out is None:
        return refuse(
            "CP101",
            softmax,
            "a softmax over a product of two token-dependent values, used in a way cppass does not know",
            "use scaled_dot_product_attention (attn_implementation='sdpa')",
        )
    return _plain(softmax, scores, out) or _rowwise(softmax, scores, out)


def scores_are_given(softmax: fx.Node) -> bool:
    """Attention whose scores [.., S, T] are an input of the graph: a graph break has cut it in two."""
    source, out = softmax.args[0], _product_below(softmax)
    while isinstance(source, fx.Node) and source.op == "call_function" and tensor_operands(source):
        source = tensor_operands(source)[0]
    given = isinstance(source, fx.Node) and source.op == "placeholder" and len(shape_of(source)) >= 3
    return given and out is not None and _is_activation(_factors(out)[1])


def _is_dropped(softmax: fx.Node) -> bool:
    """Random numbers fall on the weights before they meet the values."""
    stack, seen = list(softmax.users), set[fx.Node]()
    while stack and len(seen) < 32:
        node = stack.pop(0)
        if is_random(node):
            return True
        if node not in seen and node.target not in PRODUCTS:
            seen.add(node)
            stack.extend(node.users)
    return False


def _product_above(node: object) -> fx.Node | None:
    """The score product a softmax's input comes from, through row-wise ops."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if current.target in PRODUCTS:
            left, right = _factors(current)
            if _is_activation(left) and _is_activation(right):
                return current
            continue
        if len(seen) > 64:
            return None
        if isinstance(current.target, torch._ops.OpOverload):
            stack.extend(reversed(tensor_operands(current)))
    return None


def _product_below(softmax: fx.Node) -> fx.Node | None:
    """The product of the weights with the values, through ops that keep the rows."""
    stack, seen = list(softmax.users), set()
    while stack:
        node = stack.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in PRODUCTS:
            return node if _factors(node)[0] in seen | {softmax} else None
        if node.target in SAME | VIEWS | CONVERSIONS | ROW_KEEPING and len(seen) < 32:
            stack.extend(node.users)
    return None


ROW_KEEPING = {
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.mul.Tensor,
    aten.where.self,
    aten.masked_fill.Scalar,
}


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    at = PRODUCTS[node.target]
    left, right = tensor_operands(node)[at : at + 2]
    return left, right


def _is_activation(node: fx.Node) -> bool:
    """Not a parameter, as it is or normalised: made by a product or look-up, or from integers or more than 2-D data."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op != "call_function":
            integers = not current.meta["val"].is_floating_point() if is_tensor(current) else False
            if integers or len(shape_of(current)) > 2:
                return True
        elif current.target in PRODUCTS or current.target in (aten.addmm.default, aten.embedding.default):
            return True
        else:
            stack += tensor_operands(current)
    return False


@dataclasses.dataclass(frozen=True)
class _Scores:
    scale: float
    mask: fx.Node | None


def _plain(softmax: fx.Node, scores: fx.Node, out: fx.Node) -> AttentionSite | None:
    """The site if it is softmax(scores * number + mask) @ v and nothing else, else None."""
    parsed = _parse_scores(softmax.args[0], scores)
    query, key = _factors(scores)
    query4, key4, value4 = _unfold(query), _unfold_transposed(key), _unfold(_factors(out)[1])
    result = next(iter(out.users), None)
    if (
        parsed is None
        or scores.target is not aten.bmm.default
        or out.target is not aten.bmm.default
        or query4 is None
        or key4 is None
        or value4 is None
        or result is None
        or len(out.users) != 1
        or result.target not in VIEWS
        or shape_of(result) != (*shape_of(query4)[:3], shape_of(value4)[3])
        or not _single_use(softmax, out)
    ):
        return None
    key4, value4 = peel_repeats(key4, value4)
    return AttentionSite(
        form="softmax(q @ k.T) @ v",
        node=result,
        query=query4,
        key=key4,
        value=value4,
        key_fresh=fresh_rows(key4),
        value_fresh=fresh_rows(value4),
        mask=parsed.mask,
        causal=causal_mask(parsed.mask) if parsed.mask is not None else None,
        scale=parsed.scale,
    )


def _parse_scores(node: object, scores: fx.Node) -> _Scores | None:
    scale, mask = 1.0, None
    while isinstance(node, fx.Node) and node is not scores:
        if node.target in SAME | VIEWS | CONVERSIONS or node.target is aten.expand.default:
            node = node.args[0]
        elif node.target is aten.mul.Tensor and isinstance(node.args[1], (int, float)):
            scale, node = scale * node.args[1], node.args[0]
        elif node.target is aten.div.Tensor and isinstance(node.args[1], (int, float)):
            scale, node = scale / node.args[1], node.args[0]
        elif node.target is aten.add.Tensor and mask is None and scale == 1.0 and len(tensor_operands(node)) == 2:
            left, right = tensor_operands(node)
            if node.kwargs or len(shape_of(right)) != 4:
                return None
            mask, node = right, left
        else:
            return None
    return _Scores(scale, mask) if node is scores else None


def _single_use(node: fx.Node, last: fx.Node) -> bool:
    """Every value from `node` to `last` is used for nothing else."""
    while node is not last:
        users = list(node.users)
        if len(users) != 1:
            return False
        node = users[0]
    return True


def _unfold(node: fx.Node) -> fx.Node | None:
    """[B*H, S, D] folded from [B, H, S, D]: the latter."""
    node = _skip_to_fold(node)
    if node.target not in VIEWS or len(shape_of(node)) != 3:
        return None
    source = skip_same(tensor_operands(node)[0])
    shape = shape_of(source)
    folds = len(shape) == 4 and shape_of(node) == (product(shape[:2]), *shape[2:])
    return source if folds else None


def _unfold_transposed(node: fx.Node) -> fx.Node | None:
    """[B*H, D, T] folded from the transpose of [B, H, T, D]: the latter."""
    swapped = _unfold(node)
    if swapped is None or swapped.target is not aten.transpose.int:
        return None
    if {d % 4 for d in swapped.args[1:3]} != {2, 3}:  # type: ignore[operator]
        return None
    return tensor_operands(swapped)[0]


def _fresh_behind(node: fx.Node) -> Fresh:
    """The rows of this step behind a folded, repeated, transposed key or value."""
    read = _behind(node, MOVES | {aten.slice.Tensor})
    return fresh_rows(read if write_of(read) is not None else _behind(node, MOVES))  # a slice of a projection is fresh


def _behind(node: fx.Node, moves: set[Any]) -> fx.Node:
    while node.target in SAME | VIEWS | CONVERSIONS | moves:
        node = tensor_operands(node)[0]
    return node


MOVES = {aten.expand.default, aten.unsqueeze.default, aten.transpose.int, aten.permute.default}


def _skip_to_fold(node: fx.Node) -> fx.Node:
    while node.target in SAME:
        node = tensor_operands(node)[0]
    return node


def _rowwise(softmax: fx.Node, scores: fx.Node, out: fx.Node) -> AttentionSite | Refusal:
    query, key = _factors(scores)
    value = _factors(out)[1]
    if len(shape_of(query)) != 3:
        return refuse(
            "CP103",
            softmax,
            f"attention written out over a query of shape {list(shape_of(query))}; [B*H, S, D] is supported",
            "use scaled_dot_product_attention (attn_implementation='sdpa')",
        )
    return AttentionSite(
        form="softmax(q @ k.T, ...) @ v",
        node=out,
        query=query,
        key=key,
        value=value,
        key_fresh=_fresh_behind(key),
        value_fresh=_fresh_behind(value),
        rewrite=Rewrite.ROWWISE,
        query_dim=1,
        scores=scores,
    )
