"""Cache writes back in place: AOT made them functional, which copies the whole cache twice per step.

before:  new = index_copy(cache, 2, positions, k); attention(q, new, ...); copy_(cache, new)
after:   new = index_copy_(cache, 2, positions, k); attention(q, new, ...)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
}


def recover_writes(gm: fx.GraphModule) -> int:
    """Do it in place, in `gm`; the number of writes. Numerics: bitwise.

    Only where nothing else reads the cache that the step was given: the write and the copy_ are its two users.
    """
    count = 0
    for copy in [n for n in gm.graph.nodes if n.target is aten.copy_.default]:
        cache, new = copy.args[:2]
        if cache.op != "placeholder" or set(cache.users) != {new, copy} or new.target not in IN_PLACE:
            continue
        if new.args[0] is not cache or copy.users or _reads_itself(new, cache):
            continue
        new.target = IN_PLACE[new.target]
        gm.graph.erase_node(copy)
        count += 1
    gm.recompile()
    return count


def _reads_itself(new: fx.Node, cache: fx.Node) -> bool:
    """Whether the cache is also a source of its own write: in place it would read rows already written."""
    found: list[fx.Node] = []
    fx.map_arg((new.args[1:], new.kwargs), found.append)
    return cache in found
