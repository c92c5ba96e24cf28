"""P ranks in lockstep in one process: every node is run for every rank before the next; collectives exchange tensors.

For tests of snippets, fuzzing and looking inside. It runs the very graphs that ranks would run (lower=True), or the
meanings of the canonical ops (lower=False).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from cppass.api import run_pass
from cppass.config import CPConfig
from cppass.errors import OptionError
from cppass.ops import CANONICAL, MEANINGS, PER_RANK
from cppass.report import REWRITTEN

c10d = torch.ops._c10d_functional


def simulate(
    gm: fx.GraphModule | Callable[..., Any],
    inputs: Sequence[Any],
    cp_size: int,
    config: CPConfig | None = None,
    *,
    lower: bool = True,
    **options: Any,
) -> list[Any]:
    """Run the pass on a graph for `cp_size` ranks and run the result on all of them, in this process.

    Args:
        gm: an FX GraphModule of aten ops, or a function to trace (static shapes). It is not changed.
        inputs: what every rank is handed ("replicated"); tensors are cloned per rank, so in-place writes stay apart.
        lower: run the lowered graphs; False runs the canonical graph by the ops' meanings.

    Returns:
        Per rank: (outputs, inputs after the run). Where the graph is left alone, every rank runs it as it is.

    Raises:
        CPError: as run_pass does.
    """
    if cp_size < 1:
        raise OptionError("CP003", f"cp_size={cp_size!r} is not allowed", "cp_size is an int of 1 or more")
    graphs = []
    for rank in range(cp_size if lower else 1):
        own = _copied(gm, inputs)
        base = {"cp_size": cp_size, "rank": rank, **options}
        report = run_pass(own, inputs, config, lower=lower, **base)
        graphs.append(own)
        if report.status != REWRITTEN:
            break
    given = [_cloned(inputs) for _ in range(cp_size)]
    graphs = graphs if len(graphs) == cp_size else graphs[:1] * cp_size
    with torch.no_grad():
        outputs = _Lockstep(graphs, given).run()
    return list(zip(outputs, given, strict=True))


def _copied(gm: fx.GraphModule | Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    if isinstance(gm, fx.GraphModule):
        return copy.deepcopy(gm)
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(gm, tracing_mode="fake")(*inputs)


def _cloned(inputs: Sequence[Any]) -> list[Any]:
    return [tree_map_only(torch.Tensor, torch.clone, x) for x in inputs]


class _Lockstep:
    """One environment per rank, one node at a time."""

    def __init__(self, graphs: list[fx.GraphModule], inputs: list[list[Any]]) -> None:
        self.graphs, self.inputs = graphs, [iter(given) for given in inputs]
        self.values: list[dict[fx.Node, Any]] = [{} for _ in graphs]

    def run(self) -> list[Any]:
        for nodes in zip(*(gm.graph.nodes for gm in self.graphs), strict=True):
            if nodes[0].op == "output":
                return [self._arguments(rank, node)[0][0] for rank, node in enumerate(nodes)]
            for values, node, result in zip(self.values, nodes, self._step(nodes), strict=True):
                values[node] = result
        raise AssertionError("a graph without an output")

    def _step(self, nodes: tuple[fx.Node, ...]) -> list[Any]:
        first = nodes[0]
        if first.op == "placeholder":
            return [next(given) for given in self.inputs]
        if first.op == "get_attr":
            return [operator.attrgetter(str(n.target))(gm) for n, gm in zip(nodes, self.graphs, strict=True)]
        given = [self._arguments(rank, node) for rank, node in enumerate(nodes)]
        if first.target is c10d.all_gather_into_tensor.default:
            gathered = torch.cat([args[0] for args, _ in given])
            return [gathered.clone() for _ in nodes]
        if first.target is c10d.wait_tensor.default:
            return [args[0] for args, _ in given]
        if first.target in CANONICAL:
            return self._meaning(CANONICAL[first.target], [args for args, _ in given])
        return [node.target(*args, **kwargs) for node, (args, kwargs) in zip(nodes, given, strict=True)]  # type: ignore[operator]

    def _meaning(self, name: str, given: list[tuple[Any, ...]]) -> list[Any]:
        per_rank = PER_RANK.get(name, 1)
        stacked = [[args[i] for args in given] for i in range(per_rank)]
        return MEANINGS[name](*stacked, *given[0][per_rank:])

    def _arguments(self, rank: int, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[rank][n])
        return args, kwargs
