"""From what attention reads back to the rows of this step: KV-head repeats, and the forms a cache write has.

key = view(clone(expand(unsqueeze(written, 2))))      repeat_kv, peeled
written = index_copy(cache, 2, positions, fresh)      the write; `fresh` is gathered, the write stays as it is
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import torch
from torch import fx

from cppass.rules import argument, name_of, shape_of, tensor_operands
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


def peel_repeats(key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Key and value in front of their repeats, where that leaves both with as many heads; else as they are.

    A key that is scaled after its repeat keeps it: softmax((q * s) @ (repeat(k) * s).T) @ repeat(v).
    """
    peeled = peel_repeat(key), peel_repeat(value)
    return peeled if shape_of(peeled[0])[1] == shape_of(peeled[1])[1] else (key, value)


@dataclasses.dataclass(frozen=True)
class Write:
    """A functional KV write.

    Attributes:
        form: name of the form.
        node: the op that writes.
        rows: the new rows, tokens in `dim`.
        slots: where each row goes, one entry a row, in the form's cases where rows may come in any order; else None.
    """

    form: str
    node: fx.Node
    rows: fx.Node
    dim: int
    slots: fx.Node | None = None


Reader = Callable[[fx.Node], "tuple[object, object, object] | None"]  # a write's (rows, dim, slots)


def _index_copy(node: fx.Node) -> tuple[object, object, object]:
    return node.args[3], node.args[1], node.args[2]


def _index_put(node: fx.Node) -> tuple[object, object, object]:
    indices = argument(node, 1, "indices")
    indexed = [d for d, index in enumerate(indices) if index is not None]
    return node.args[2], indexed[0], indices[0] if indexed == [0] else None


def _slice_scatter(node: fx.Node) -> tuple[object, object, object]:
    return node.args[1], argument(node, 2, "dim", 0), None


def _cat(node: fx.Node) -> tuple[object, object, object] | None:
    """cat([past, fresh])."""
    parts = tensor_operands(node)
    return (parts[1], argument(node, 1, "dim", 0), None) if len(parts) == 2 else None


def _scatter_nd_update(node: fx.Node) -> tuple[object, object, object]:
    return argument(node, 2, "updates"), 0, argument(node, 1, "indices")


def _scatter_update(node: fx.Node) -> tuple[object, object, object]:
    return argument(node, 2, "updates"), argument(node, 3, "axis"), None


def _scatter_pa(node: fx.Node) -> tuple[object, object, object]:
    """An element of (key_cache, value_cache)."""
    source, element = node.args
    assert isinstance(source, fx.Node) and isinstance(element, int)
    return argument(source, element, ("key", "value")[element]), 0, argument(source, 4, "slot_mapping")


SCATTER_PA = "npu::npu_scatter_pa_kv_cache_functional"

WRITES: dict[str, tuple[str, Reader]] = {
    "aten::index_copy": ("index_copy", _index_copy),
    "aten::index_put": ("index_put", _index_put),
    "aten::slice_scatter": ("slice_scatter", _slice_scatter),
    "aten::cat": ("cat", _cat),
    "npu::npu_scatter_nd_update": ("npu_scatter_nd_update", _scatter_nd_update),
    "npu::scatter_update": ("scatter_update", _scatter_update),
    SCATTER_PA: ("npu_scatter_pa_kv_cache", _scatter_pa),
}


def write_of(node: fx.Node) -> Write | None:
    """The KV write whose result `node` is, None where it is none."""
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node) or (source is not node) != (name_of(source) == SCATTER_PA):
        return None
    form, read = WRITES.get(name_of(source), ("", None))
    found = read(node) if read is not None else None
    if found is None:
        return None
    rows, dim, slots = found
    if not isinstance(rows, fx.Node) or not isinstance(dim, int):
        return None
    return Write(form, source, rows, dim % len(shape_of(rows)), slots if isinstance(slots, fx.Node) else None)


def fresh_rows(node: fx.Node, dim: int = 2) -> Fresh:
    """The rows of this step behind what attention reads ([B, H, T, D], tokens in `dim`), and the write between."""
    writes: list[fx.Node] = []
    form = ""
    node = _behind_read(skip_same(node))
    while (write := write_of(node)) is not None and write.dim == dim:
        writes.append(write.node)
        form = form or write.form
        node = skip_same(write.rows)
    return Fresh(node, dim, tuple(writes), form)


def fresh_behind_views(node: fx.Node, dim: int) -> Fresh:
    """The same where attention reads a view of the cache, of another shape than the rows that were written."""
    read = node
    while read.op == "call_function" and read.target in SAME | VIEWS | {aten.slice.Tensor}:
        read = tensor_operands(read)[0]
    write = write_of(read)
    if write is None:
        return Fresh(node, dim)
    return Fresh(write.rows, write.dim, (write.node,), write.form)


def _behind_read(node: fx.Node) -> fx.Node:
    """A slice that reads part of a written cache: the write."""
    written = node
    while written.target is aten.slice.Tensor:
        written = skip_same(tensor_operands(written)[0])
    return written if write_of(written) is not None else node
