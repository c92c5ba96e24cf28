"""From what attention reads back to the rows of this step: KV-head repeats, and the forms a cache write has.

key = view(clone(expand(unsqueeze(written, 2))))      repeat_kv, peeled
written = index_copy(cache, 2, positions, fresh)      the write; `fresh` is gathered, the write stays as it is
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from cppass.rules import argument, shape_of, tensor_operands
from cppass.site import Fresh

aten = torch.ops.aten

SAME = {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def skip_same(node: fx.Node) -> fx.Node:
    """Through ops that change neither values nor shape."""
    while node.op == "call_function" and _is_same(node):
        node = tensor_operands(node)[0]
    return node


def _is_same(node: fx.Node) -> bool:
    if node.target in SAME:
        return True
    if node.target in VIEWS or node.target in (aten.expand.default, aten.slice.Tensor):
        source = tensor_operands(node)[0]
        return shape_of(source) == shape_of(node)
    return False


def peel_repeat(node: fx.Node) -> fx.Node:
    """[B, Hq, T, D] made from [B, Hkv, T, D] by repeating each KV head: the latter; else the node itself."""
    merged = skip_same(node)
    if merged.target not in VIEWS or len(shape_of(merged)) != 4:
        return merged
    expanded = tensor_operands(merged)[0]
    while expanded.target in SAME:
        expanded = tensor_operands(expanded)[0]
    if expanded.target is not aten.expand.default or len(shape_of(expanded)) != 5:
        return merged
    repeated = skip_same(tensor_operands(expanded)[0])
    if repeated.target is not aten.unsqueeze.default or argument(repeated, 1, "dim") not in (2, -3):
        return merged
    source = tensor_operands(repeated)[0]
    (b, h, t, d), (_, kv_heads, repeats, _, _) = shape_of(source), shape_of(expanded)
    if kv_heads != h or shape_of(merged) != (b, h * repeats, t, d):
        return merged
    return skip_same(source)


@dataclasses.dataclass(frozen=True)
class WriteForm:
    """A functional KV write: a node's (cache, rows) operands."""

    name: str
    operands: Callable[[fx.Node], tuple[fx.Node, fx.Node] | None]


def _cat(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """cat([past, fresh]) on the token dimension of [B, H, T, D]."""
    parts = tensor_operands(node)
    if len(parts) != 2 or argument(node, 1, "dim", 0) not in (2, -2):
        return None
    return parts[0], parts[1]


def _arguments(cache: int, rows: int) -> Callable[[fx.Node], tuple[fx.Node, fx.Node] | None]:
    def operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        a, b = node.args[cache], node.args[rows]
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None

    return operands


WRITES = {
    aten.index_copy.default: WriteForm("index_copy", _arguments(0, 3)),
    aten.index_put.default: WriteForm("index_put", _arguments(0, 2)),
    aten.slice_scatter.default: WriteForm("slice_scatter", _arguments(0, 1)),
    aten.cat.default: WriteForm("cat", _cat),
}


def fresh_rows(node: fx.Node, dim: int = 2) -> Fresh:
    """The rows of this step behind what attention reads ([B, H, T, D], tokens in `dim`), and the write between."""
    writes: list[fx.Node] = []
    form = ""
    node = _behind_read(skip_same(node))
    while node.target in WRITES:
        operands = WRITES[node.target].operands(node)
        if operands is None:
            break
        writes.append(node)
        form = form or WRITES[node.target].name
        node = skip_same(operands[1])
    return Fresh(node, dim, tuple(writes), form)


def _behind_read(node: fx.Node) -> fx.Node:
    """A slice that reads part of a written cache: the write."""
    written = node
    while written.target is aten.slice.Tensor:
        written = skip_same(tensor_operands(written)[0])
    return written if written.target in WRITES else node
