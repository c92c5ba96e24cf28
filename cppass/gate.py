"""min_tokens="auto": from how many tokens on a graph pays, by the cost model (cppass/cost) and what the graph holds.

Sizes are those of the call that is compiled, the same on every rank. The threshold they give is a number; comparing a
symbolic token count with it is the guard between two graphs.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from cppass import torch_private
from cppass.cost.gate import NEVER, break_even_tokens
from cppass.cost.hardware import Hardware
from cppass.op_rules import factors, is_matmul
from cppass.shard import Propagation
from cppass.site import AttentionSite
from cppass.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Work:
    """What one token of a graph costs, from its shapes.

    Attributes:
        flops_per_token: of the matmuls that run on rows of tokens.
        attention_flops_per_pair: 2 * heads * (D + E) a site and sequence of the batch.
        gather_bytes_per_token: K and V of all sites.
        weight_bytes: of the matmuls' weights.
    """

    flops_per_token: float
    attention_flops_per_pair: float
    gather_bytes_per_token: float
    weight_bytes: float


def break_even(
    graph: fx.Graph, sites: tuple[AttentionSite, ...], reach: Propagation, cp_size: int, hardware: Hardware
) -> int | None:
    """Tokens from which on `cp_size` ranks beat one device on that hardware; None if that is never."""
    work = work_of(graph, sites, reach)
    least = break_even_tokens(
        work.flops_per_token,
        work.attention_flops_per_pair,
        work.gather_bytes_per_token,
        len(sites),
        cp_size,
        hardware,
        weight_bytes=work.weight_bytes,
    )
    return None if least >= NEVER else least


def work_of(graph: fx.Graph, sites: tuple[AttentionSite, ...], reach: Propagation) -> Work:
    tokens = torch_private.hinted(sites[0].query.meta["val"])[sites[0].query_dim]
    flops = weights = 0
    for node in graph.nodes:
        if node.op != "call_function" or not is_matmul(node) or not _carries_tokens(reach, node):
            continue
        rows, columns = (torch_private.hinted(x.meta["val"]) for x in factors(node))
        flops += 2 * math.prod(torch_private.hinted(_first(node))) * rows[-1]
        weights += math.prod(columns) * factors(node)[1].meta["val"].dtype.itemsize
    pairs = sum(_flops_per_pair(site) for site in sites)
    fresh = {part.source for site in sites for part in (site.key_fresh, site.value_fresh)}
    gathered = sum(math.prod(torch_private.hinted(_first(x))) * _first(x).dtype.itemsize for x in fresh)
    sequences = max(1, len(sites[0].ends))  # each attends to itself: as many pairs as one, divided by their number
    return Work(flops / tokens, pairs / sequences, gathered / tokens, weights)


def _carries_tokens(reach: Propagation, node: fx.Node) -> bool:
    return any(isinstance(way.out, Tokens) for way in reach.ways.get(node, ()))


def _flops_per_pair(site: AttentionSite) -> int:
    """2 * (D + E) a head and sequence of the batch: all elements of a query row, for scores and for values."""
    query = torch_private.hinted(site.query.meta["val"])
    return 4 * math.prod(size for dim, size in enumerate(query) if dim != site.query_dim)


def _first(node: fx.Node) -> torch.Tensor:
    """The value of a node, or the first of several."""
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value  # type: ignore[no-any-return]
