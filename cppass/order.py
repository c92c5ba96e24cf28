"""KV writes in gathered order: where every row is written to a slot of its own, no row has to be put back in order.

before:  k = gather(k_local); new = npu_scatter_nd_update(cache, slots, k)            k copied into natural order
after:   k = gather(k_local), as it arrives; new = npu_scatter_nd_update(cache, gathered_order(slots), k)

The slots are permuted once and shared by all layers. Attention must read the written cache, and nothing else the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container

from torch import fx

from cppass.match.kv import write_of
from cppass.site import AttentionSite, Fresh, Rewrite


@dataclasses.dataclass(frozen=True)
class SlotWrite:
    """A write whose rows come in gathered order.

    Attributes:
        sources: the values whose rows they are, gathered without being put back in order.
        slots: the operand to be permuted.
    """

    sources: tuple[fx.Node, ...]
    slots: fx.Node


def slot_writes(sites: tuple[AttentionSite, ...], even: bool, gathered: Container[fx.Node]) -> dict[fx.Node, SlotWrite]:
    """The writes that may take their rows in gathered order, by node. None where 2P does not divide a length."""
    found: dict[fx.Node, SlotWrite] = {}
    for site in sites:
        parts = (site.key_fresh, site.value_fresh)
        slots = [_slots_of(part) for part in parts]
        if not even or site.rewrite is Rewrite.ROWWISE or not all(part.source in gathered for part in parts):
            continue
        if parts[0].dim != parts[1].dim:  # one collective brings both
            continue
        if any(s is None for s in slots) or not all(_only_written(part) for part in parts):
            continue
        sources = tuple(part.source for part in parts)
        for part, own in zip(parts, slots, strict=True):
            assert own is not None
            found[part.writes[0]] = SlotWrite(sources, own)
    return found


def _slots_of(part: Fresh) -> fx.Node | None:
    if len(part.writes) != 1:
        return None
    writes = [write_of(node) for node in (part.writes[0], *part.writes[0].users)]
    return next((w.slots for w in writes if w is not None and w.node is part.writes[0]), None)


def _only_written(part: Fresh) -> bool:
    """Whether the rows are used by their write alone."""
    return set(part.source.users) == set(part.writes)
