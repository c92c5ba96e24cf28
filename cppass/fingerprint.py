"""What ranks must have in common to run a graph together: versions, options, canonical graph. Plain, rank-free data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from cppass.config import CPConfig
from cppass.explain_node import op_of
from cppass.registry import registered
from cppass.rules import name_of

OWN_OPTIONS = ("group", "rank", "cp_size", "mode", "agreement_timeout")
"""Options that may differ: which group it is, is not for its ranks to compare."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """One graph as its ranks compare it.

    Attributes:
        what: "rewritten, 64 tokens", "left alone, ...".
        versions: of cppass (with a hash of its source), torch, torch_npu.
        options: of the backend, but those that are each rank's own; and what was registered from outside.
        graph: the canonical graph, a line a node, compressed: kept for the message if ranks differ.
    """

    what: str
    versions: Mapping[str, str]
    options: Mapping[str, str]
    graph: bytes

    @functools.cached_property
    def digest(self) -> str:
        text = json.dumps([self.what, self.versions, self.options], sort_keys=True)
        return hashlib.sha256(text.encode() + zlib.decompress(self.graph)).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        lines = zlib.decompress(self.graph).decode().splitlines()
        return {"what": self.what, "versions": self.versions, "options": self.options, "graph": lines}


def fingerprint(graph: fx.Graph, what: str, config: CPConfig) -> Fingerprint:
    """The fingerprint of a graph before lowering; the rank enters after it."""
    options = {f.name: repr(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in OWN_OPTIONS}
    options |= {line.partition(":")[0]: line.partition(":")[2].strip() for line in registered()}
    return Fingerprint(_renamed(what), versions(), options, zlib.compress(_renamed(graph_lines(graph)).encode(), 1))


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> str:
    """What differs between two fingerprints (`to_dict`), both sides: the most telling first.

    before:  {"options": {"strict": "False"}, ..}, {"options": {"strict": "True"}, ..}, ("rank 0", "rank 1")
    after:   "option strict: False on rank 0, True on rank 1"
    """
    for field, noun in (("versions", "version of"), ("options", "option")):
        for key in sorted({*one[field], *other[field]}):
            a, b = one[field].get(key, "absent"), other[field].get(key, "absent")
            if a != b:
                return _both(f"{noun} {key}", a, b, names)
    if one["what"] != other["what"]:
        return _both("the graph", one["what"], other["what"], names)
    for a, b in zip([*one["graph"], "no node"], [*other["graph"], "no node"], strict=False):
        if a != b:
            return _both("the first node that differs", a, b, names)
    return "nothing that can be shown"


def _both(what: str, a: str, b: str, names: tuple[str, str]) -> str:
    return f"{what}: {a} on {names[0]}, {b} on {names[1]}"


@functools.cache
def versions() -> Mapping[str, str]:
    """Of what makes a graph, and a hash of our own source."""
    from cppass import __version__

    found = {"cppass": f"{__version__} ({source_hash()})", "torch": str(torch.__version__)}
    npu = sys.modules.get("torch_npu")
    return found if npu is None else found | {"torch_npu": str(getattr(npu, "__version__", ""))}


@functools.cache
def source_hash() -> str:
    """Of every Python file of cppass and its lowerings: two installations of one version can still differ."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("cppass", "lowering"):
        for path in sorted((root / folder).rglob("*.py")):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def graph_lines(graph: fx.Graph) -> str:
    """A line a node: name, op, arguments, dtype and sizes. Names of process groups are each rank's own, so left out."""
    return "\n".join(_line(node) for node in graph.nodes)


def _line(node: fx.Node) -> str:
    args: Any = node.args
    if name_of(node).startswith("_c10d_functional::"):
        args = tuple(a for a in args if not isinstance(a, str))
    value = node.meta.get("val")
    shape = f" -> {value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{node.name} = {op_of(node)}{args}{dict(node.kwargs) or ''}{shape}"


def _renamed(text: str) -> str:
    """Symbols by order of appearance: processes may number them differently."""
    names: dict[str, str] = {}
    return re.sub(r"\b[su]\d+\b", lambda m: names.setdefault(m.group(), f"n{len(names)}"), text)
