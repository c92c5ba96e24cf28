"""What a lowering offers, and the one place that imports it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import fx

from cppass.config import INNERS, CPConfig
from cppass.errors import CPError, OptionError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the rank enters: this rank's number, the ranks of the group, and the name collectives know it by."""

    rank: int
    cp_size: int
    group_name: str


class Target(Protocol):
    """A lowering: turns canonical ops into the target's, in place, and compiles the result."""

    name: str

    def lower(self, gm: fx.GraphModule, ranks: Ranks, config: CPConfig) -> None:
        """Replace every canonical op of `gm`, in place, as the options say."""

    def computed_lengths(self, gm: fx.GraphModule) -> list[fx.Node]:
        """Lengths in the lowered graph that some compilers cannot take, because they are no inputs of the graph."""

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
        """What runs the lowered graph; takes the graph's inputs, returns its outputs."""


def target_of(gm: fx.GraphModule, config: CPConfig) -> tuple[str, str]:
    """(target, inner compiler) of a graph: the config's, or what suits the graph's ops, tensors and inner compiler."""
    target, inner = config.target, config.inner
    if target == "auto":
        target = "npu" if inner in INNERS["npu"][:2] or any(_is_npu(n) for n in gm.graph.nodes) else "host"
    if inner == "auto":
        inner = INNERS[target][0]
    if inner not in INNERS[target]:
        raise OptionError(
            "CP003",
            f"option inner={inner!r} does not go with a graph for target {target!r}",
            f"inner is one of {', '.join(INNERS[target])} there",
        )
    return target, inner


NPU_OPS = ("npu::", "air::", "atb::", "cppass::fused_attention")


def _is_npu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    on_device = isinstance(value, torch.Tensor) and value.device.type == "npu"
    return on_device or getattr(node.target, "_name", "").startswith(NPU_OPS)


def load(name: str) -> Target:
    """The lowering of that name ("host", "npu")."""
    try:
        module = importlib.import_module(f"lowering.{name}")
    except ImportError as error:
        raise CPError("CP501", f"target {name!r} cannot be imported: {error}", "reinstall cppass") from error
    return cast(Target, module.TARGET)
