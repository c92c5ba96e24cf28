"""What registered functions return is looked at before it is used: nonsense is an error that names op and call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from cppass.axes import AxesOf, operand_names
from cppass.errors import CPError, ExtensionError, Refusal
from cppass.explain_node import source_of
from cppass.rules import Axes, Label, is_tensor, shape_of, tensor_operands
from cppass.site import AttentionSite, Causal, Fresh, Rewrite
from cppass.tokens import Size, sizes_of


@dataclasses.dataclass(frozen=True)
class SaneAxes:
    """The axes a registered rule gives.

    Raises:
        ExtensionError: CP204, the rule raised, or returned something that cannot be the axes of the call.
    """

    op: str
    read: AxesOf

    def __call__(self, node: fx.Node) -> Axes | None:
        axes = _read(self.read, node, "CP204", f"the rule of {self.op}")
        wrong = None if axes is None else _wrong_axes(axes, node)
        if wrong:
            raise _nonsense("CP204", node, f"the rule of {self.op} returned {axes!r}", wrong)
        return axes  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class SaneForm:
    """What a registered site form makes of a node.

    Raises:
        ExtensionError: CP115, the form raised, or returned something that cannot be a site of that node.
    """

    op: str
    read: Callable[[fx.Node], Any]

    def __call__(self, node: fx.Node) -> AttentionSite | Refusal:
        found = _read(self.read, node, "CP115", f"the site form of {self.op}")
        wrong = "" if isinstance(found, Refusal) else _wrong_site(found, node)
        if wrong:
            raise _nonsense("CP115", node, f"the site form of {self.op} returned {type(found).__name__}", wrong)
        return found  # type: ignore[no-any-return]


def _read(read: Callable[[fx.Node], Any], node: fx.Node, code: str, what: str) -> Any:
    try:
        return read(node)
    except CPError:
        raise
    except Exception as error:
        raise _nonsense(code, node, what, f"raised {type(error).__name__}: {error}") from error


def _nonsense(code: str, node: fx.Node, what: str, wrong: str) -> ExtensionError:
    where = source_of(node)
    text = f"{what}, for node {node.name}: {wrong}" + (f"\n  from {where}" if where else "")
    return ExtensionError(code, text, "see docs/extending.md; cppass.check_rule and check_site_form try a registration")


# -- axes --------------------------------------------------------------------------------------------------------------


def _wrong_axes(axes: object, node: fx.Node) -> str:
    if not isinstance(axes, Axes):
        return "a rule returns cppass.extend.Axes, or None where tokens are mixed"
    operands, names = tensor_operands(node), operand_names(node)
    if len(axes.operands) != len(operands):
        return f"it labels {len(axes.operands)} operands; the call has {len(operands)} tensors: {', '.join(names)}"
    sizes = _sizes("the output", axes.out, shape_of(node))
    if isinstance(sizes, str):
        return sizes
    others = _wrong_elements(axes, node)
    if others:
        return others
    for name, labels, operand in zip(names, axes.operands, operands, strict=True):
        own = _sizes(name, labels, shape_of(operand))
        if isinstance(own, str):
            return own
        for label, size in own.items():
            if label in sizes and _differ(size, sizes[label]):
                return f"axis {label!r} has {size} rows in {name} and {sizes[label]} in the output"
    return ""


def _wrong_elements(axes: Axes, node: fx.Node) -> str:
    """An op that returns several tensors: what is said of the output is said of each."""
    value = node.meta["val"]
    several = value if isinstance(value, (tuple, list)) else ()
    for i, shape in enumerate(sizes_of(x.shape) for x in several if isinstance(x, torch.Tensor)):
        for dim, (label, size) in enumerate(zip(axes.out, shape_of(node), strict=True)):
            if label is not None and (dim >= len(shape) or _differ(shape[dim], size)):
                return f"output {i} has the shape {list(shape)}, and axis {label!r} not in dim {dim}"
    return ""


def _sizes(what: str, labels: object, shape: tuple[Size, ...]) -> dict[Label, Size] | str:
    """Size by label, or what is wrong."""
    if not isinstance(labels, tuple) or len(labels) != len(shape):
        return f"it gives {what} the axes {labels!r}; that has {len(shape)} dimensions {list(shape)}"
    named = [label for label in labels if label is not None]
    if not all(isinstance(label, (str, int)) for label in named):
        return f"it labels {what} {labels!r}; labels are texts or numbers, None for an axis that can carry no tokens"
    if len(set(named)) != len(named):
        return f"it gives two axes of {what} one label: {labels!r}"
    return {label: size for label, size in zip(labels, shape, strict=True) if label is not None}


def _differ(a: Size, b: Size) -> bool:
    """Known to differ: symbols may turn out to be equal."""
    return isinstance(a, int) and isinstance(b, int) and a != b


# -- sites -------------------------------------------------------------------------------------------------------------


def _wrong_site(site: object, node: fx.Node) -> str:
    if not isinstance(site, AttentionSite):
        return "a site form returns cppass.extend.attention_site(...), or cppass.extend.refusal(...)"
    if site.node is not node:
        return f"its node is {site.node}, not the one it was asked about"
    if site.rewrite is Rewrite.FUSED or site.fused is not None:
        return "forms of fused-infer-attention are built in"
    for what in ("query", "key", "value"):
        value = getattr(site, what)
        if not isinstance(value, fx.Node) or not is_tensor(value) or value not in _before(node):
            return f"its {what} is {value!r}, which is no tensor that the call depends on"
    return _wrong_shapes(site) or _wrong_fresh(site) or _wrong_mask(site)


def _wrong_shapes(site: AttentionSite) -> str:
    if site.query_dim not in (1, 2):
        return f"query_dim={site.query_dim}; 2 is [B, H, S, D], 1 is [B, S, H, D]"
    heads = 3 - site.query_dim
    q, k, v, out = (shape_of(x) for x in (site.query, site.key, site.value, site.node))
    seen = f"query {list(q)}, key {list(k)}, value {list(v)}, output {list(out)}"
    meant = "[B, Hq, S, D], [B, Hkv, T, D], [B, Hkv, T, E]" if heads == 1 else "[B, S, Hq, D], [B, T, Hkv, D], ..."
    if not len(q) == len(k) == len(v) == len(out) == 4:
        return f"{seen}; meant are {meant}"
    pairs = [(q[0], k[0]), (q[3], k[3]), (k[0], v[0]), (k[1], v[1]), (k[2], v[2]), (out[3], v[3])]
    pairs += [(q[d], out[d]) for d in range(3)]
    whole = not isinstance(q[heads], int) or not isinstance(k[heads], int) or q[heads] % k[heads] == 0
    return "" if whole and not any(_differ(a, b) for a, b in pairs) else f"{seen}; meant are {meant}"


def _wrong_fresh(site: AttentionSite) -> str:
    for what, read in (("key_fresh", site.key), ("value_fresh", site.value)):
        fresh = getattr(site, what)
        if not isinstance(fresh, Fresh) or not isinstance(fresh.source, fx.Node) or not is_tensor(fresh.source):
            return f"its {what} is {fresh!r}, not a Fresh with the node of the new rows"
        if fresh.source is not read and fresh.source not in _before(read):
            return f"its {what} comes from {fresh.source}, which {read} does not depend on"
        if not 0 <= fresh.dim < len(shape_of(fresh.source)):
            return f"its {what} has its tokens in dim {fresh.dim} of {list(shape_of(fresh.source))}"
        tokens = shape_of(site.query)[site.query_dim]
        if _differ(shape_of(fresh.source)[fresh.dim], tokens):
            rows = shape_of(fresh.source)[fresh.dim]
            return f"its {what}, {fresh.source}, has {rows} rows where the query has {tokens} tokens"
    return ""


def _wrong_mask(site: AttentionSite) -> str:
    if site.causal is not None and not isinstance(site.causal, Causal):
        return f"its causal is {site.causal!r}; Causal(...) or None"
    if site.mask is not None and not isinstance(site.mask, fx.Node):
        return f"its mask is {site.mask!r}; a node or None"
    if site.scale is not None and not isinstance(site.scale, (int, float)):
        return f"its scale is {site.scale!r}; a number or None"
    if site.causal is None or not isinstance(site.causal.constant, int):
        return "" if site.causal is None else f"its causal has the constant {site.causal.constant!r}; an int"
    wrong = [t for t in site.causal.terms if not isinstance(t, fx.Node)]
    return f"its causal adds {wrong[0]!r}, which is no node" if wrong else ""


def _before(node: fx.Node) -> set[fx.Node]:
    """Everything a node depends on."""
    found: set[fx.Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += current.all_input_nodes
    return found
