"""What a site's attention reads and how, as its canonical op must say it, in numbers of the original graph's values."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from cppass.rewrite import FUSED_OPTIONS
from cppass.rules import is_tensor
from cppass.sharded_rewrite import OPTIONS as SHARDED_OPTIONS
from cppass.site import AttentionSite
from cppass.value_numbers import Values, expanded

aten = torch.ops.aten

ATTENTION = ("q", "k", "v", "mask", "prefix_tensor", "prefix", "causal", "window", "scale")
LENGTHS = ("q_lengths", "kv_lengths")
SAID = {
    "attention": ATTENTION,
    "fused_attention": (
        *("q", "k", "v", "mask", "block_table", "sink", "q_tensor", "kv_tensor"),
        *(*LENGTHS, "op", *FUSED_OPTIONS),
    ),
    "fused_attention_sharded": ("q", "k", "v", "mask", "block_table", "sink", *LENGTHS, "op", *SHARDED_OPTIONS),
}
"""What a canonical attention says beside the layout, in the order of `described`."""


def described(site: AttentionSite, values: Values, sharded: bool) -> Hashable:
    """What the canonical op of a site must say, in numbers of the original graph."""
    if site.fused is None:
        return _attention(site, values)
    fused = site.fused
    tensors = [site.query, site.key, site.value, site.mask, fused.block_table, fused.sink]
    lengths = [fused.q_lengths, fused.kv_lengths]
    if not sharded:
        tensors += [n if isinstance(n, fx.Node) else None for n in lengths]
    numbers = [None if isinstance(n, fx.Node) else n for n in lengths]
    options = [getattr(fused, name) for name in (SHARDED_OPTIONS if sharded else FUSED_OPTIONS)]
    return values.frozen([*tensors, *numbers, str(fused.op), *options])


def _attention(site: AttentionSite, values: Values) -> Hashable:
    causal = site.causal
    mask = site.mask if causal is None else None
    prefix: Any = 0 if causal is None else causal.constant
    added: Hashable = None
    for term in causal.terms if causal is not None else ():
        if is_tensor(term):
            own = ("value", values.of[term])
            added = own if added is None else ("value", values.numbered((aten.add.Tensor, (added, own), ())))
        else:
            prefix = prefix + values.frozen(term)
    window = causal.window if causal is not None else 0
    rows = [values.of[x] for x in (site.query, site.key, site.value)]
    if _is_turned(site):
        rows = [values.numbered(_transposed(number)) for number in rows]
    read = (*(("value", number) for number in rows), values.frozen(mask))
    return (*read, added, expanded(prefix), *map(values.frozen, (causal is not None, window, site.scale)))


def result_of(site: AttentionSite, values: Values) -> int:
    """The number of what a canonical op returns in place of a site: of the output, where the site returns more."""
    if site.fused is not None or not isinstance(site.node.meta["val"], (tuple, list)):
        result = values.of[site.node]
    else:
        result = values.numbered((operator.getitem, (("value", values.of[site.node]), 0), ()))
    if not _is_turned(site):
        return result
    heads_first = values.numbered(("heads first", result))
    values.table[_transposed(heads_first)] = result
    return heads_first


def _is_turned(site: AttentionSite) -> bool:
    """Tokens before heads, [B, S, H, D]: the canonical op is between transposes."""
    return site.fused is None and site.query_dim == 1


def _transposed(number: int) -> Hashable:
    return aten.transpose.int, (("value", number), 1, 2), ()
