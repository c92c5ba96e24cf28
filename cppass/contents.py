"""What a graph is handed, by value: what ranks compare where equal sizes say nothing.

token ids   another prompt of the same length, the usual mistake under torchrun     every element
weights     another checkpoint, or random weights without a seed                    a sample of each
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cppass.explain_node import path_of
from cppass.rules import is_tensor, iter_nodes, writes

MIXER = 0x1E3779B97F4A7C15  # odd; spreads positions over 64 bits, which wrap
SAMPLE = 4096
"""Elements of a weight that are compared: 64 rows of 64 columns, 16 experts of 16 rows of 16 columns."""
LONGEST = 1 << 22
"""Elements of a tensor of integers that are all compared; of a longer one (a mask of every pair) a sample is."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """Inputs of a graph whose values ranks compare: {position: name}.

    Attributes:
        ids: tensors of integers: token ids, positions, masks, slots.
        weights: parameters and buffers that the graph does not write to.
    """

    ids: Mapping[int, str]
    weights: Mapping[int, str]

    def hashes(self, inputs: Sequence[Any], ids: bool, weights: bool) -> dict[str, dict[str, str]]:
        """{"weights": {name: hash}, "ids": {name: hash}}; empty where they are not asked for."""
        return {
            "weights": {name: _of_sample(inputs[i]) for i, name in self.weights.items()} if weights else {},
            "ids": {name: _of_ids(inputs[i]) for i, name in self.ids.items()} if ids else {},
        }


def contents_of(gm: fx.GraphModule, names: Mapping[str, str] | None = None) -> Contents:
    """What there is to compare of a graph's inputs.

    Args:
        names: what the model calls the inputs, by placeholder; without them no input is known to be a weight.
    """
    written = {x for node in gm.graph.nodes if writes(node) for x in iter_nodes(node.args[:1])}
    ids, weights = {}, {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node in written or not is_tensor(node):
            continue
        source = (names or {}).get(node.name, "")
        value = node.meta["val"]
        if "_parameters[" in source or "_buffers[" in source:
            weights[position] = path_of(source)
        elif not value.is_floating_point() and not value.is_complex():
            ids[position] = source or str(node.target)
    return Contents(ids, weights)


def digest(hashes: Mapping[str, Mapping[str, str]]) -> str:
    """One short text for all of them."""
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


def _of_ids(x: torch.Tensor) -> str:
    """By position, and one number is read from the device."""
    if x.numel() > LONGEST:
        return _of_sample(x)
    weights = torch.arange(1, x.numel() + 1, dtype=torch.int64, device=x.device) * MIXER
    weights ^= weights >> 31
    return f"{list(x.shape)} {int(((x.reshape(-1).to(torch.int64) + 1) * weights).sum())}"


def _of_sample(x: torch.Tensor) -> str:
    each = max(1, round(SAMPLE ** (1 / max(1, x.dim()))))
    rows = x.detach()[tuple(slice(None, None, -(-n // each) or 1) for n in x.shape)]
    plain = rows.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, list[str]]:
    """("weights" or "ids", the names of those that differ)."""
    for kind in ("weights", "ids"):
        keys = list(dict.fromkeys(itertools.chain(one[kind], other[kind])))
        names = [name for name in keys if one[kind].get(name) != other[kind].get(name)]
        if names:
            return kind, names
    return "ids", []
