"""P ranks in one process: each runs to its next collective, then all exchange tensors.

For tests of snippets, fuzzing and looking inside. It runs the very graphs that ranks would run (lower=True), or the
meanings of the canonical ops (lower=False).
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from cppass.api import run_pass
from cppass.capture import check_inputs, trace
from cppass.config import CPConfig
from cppass.errors import OptionError, VerifyError
from cppass.ops import CANONICAL, MEANINGS, PER_RANK
from cppass.ranks import ranks_without_group
from cppass.report import REWRITTEN
from cppass.target import load, target_of

c10d = torch.ops._c10d_functional
MOST_RANKS = 1024  # of which each has its own inputs in this process


def simulate(
    gm: fx.GraphModule | Callable[..., Any],
    inputs: Sequence[Any],
    /,
    cp_size: int,
    config: CPConfig | None = None,
    *,
    lower: bool = True,
    rank_inputs: Sequence[Sequence[Any]] | None = None,
    **options: Any,
) -> list[Any]:
    """Run the pass on a graph for `cp_size` ranks and run the result on all of them, in this process.

    Args:
        gm: an FX GraphModule of aten ops, or a function to trace (static shapes). It is not changed.
        inputs: what every rank is handed ("replicated"); tensors are cloned per rank, so in-place writes stay apart.
        rank_inputs: what each rank is handed, where that differs (inputs="sharded"); `inputs` is what is traced.
        lower: run the lowered graphs; False runs the canonical graph by the ops' meanings.

    Returns:
        Per rank: (outputs, inputs after the run). Where the graph is left alone, every rank runs it as it is.

    Raises:
        CPError: as run_pass does.
    """
    config = CPConfig.merged(config, {**options, "cp_size": cp_size})
    if config.cp_size is None or config.cp_size > MOST_RANKS:
        raise OptionError("CP003", f"cp_size={cp_size!r} is not allowed", f"cp_size is an int from 1 to {MOST_RANKS}")
    check_inputs(inputs)
    if rank_inputs is not None:
        check_inputs(rank_inputs)
    given = [_cloned(own) for own in ([inputs] * cp_size if rank_inputs is None else rank_inputs)]
    graphs = []
    for rank in range(cp_size if lower else 1):
        own = traced(gm, inputs)
        report = run_pass(own, inputs, config, lower=lower, rank=rank)
        graphs.append(own)
        if report.status != REWRITTEN:
            break
    _check_fit(graphs[0], given, cp_size)
    graphs = graphs if len(graphs) == cp_size else graphs[:1] * cp_size
    with torch.no_grad():
        outputs = run_in_lockstep(graphs, given)
    return list(zip(outputs, given, strict=True))


def run_in_lockstep(graphs: Sequence[fx.GraphModule], inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """Outputs per rank of one graph a rank, canonical or lowered; inputs are written to where the graphs do."""
    return _Lockstep(graphs, inputs).run()


def lowered(gm: fx.GraphModule, config: CPConfig) -> fx.GraphModule:
    """A copy of a canonical graph, lowered for rank config.rank of config.cp_size."""
    own = traced(gm, ())
    load(target_of(own, config)[0]).lower(own, ranks_without_group(config), config)
    return own


def traced(gm: fx.GraphModule | Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """A graph of its own of a function of tensors (static shapes), or of a module."""
    if isinstance(gm, fx.GraphModule):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # of torch, by torch_npu's copy of a tensor
            return copy.deepcopy(gm)
    return trace(gm, inputs)


def _check_fit(gm: fx.GraphModule, given: list[list[Any]], cp_size: int) -> None:
    """As many sets of inputs as ranks, as many inputs as placeholders, and of their sizes where these are numbers."""
    wanted = gm.graph.find_nodes(op="placeholder")
    counts = [len(own) for own in given]
    if counts != [len(wanted)] * cp_size:
        raise OptionError(
            "CP010",
            f"{cp_size} ranks take {len(wanted)} inputs each; given are {counts}",
            "rank_inputs has a list of inputs a rank; each, as `inputs`, one input per placeholder",
        )
    for node, x in ((node, x) for own in given for node, x in zip(wanted, own, strict=True)):
        shape = getattr(node.meta.get("val"), "shape", None)
        if isinstance(x, torch.Tensor) and shape is not None and not _fits(x.shape, shape):
            raise OptionError(
                "CP010",
                f"the graph is traced for {node.target} {list(shape)}, and given {list(x.shape)}",
                "trace it for these sizes, or with symbolic ones (tracing_mode='symbolic')",
            )


def _fits(seen: torch.Size, meant: torch.Size) -> bool:
    sizes = zip(seen, meant, strict=False)
    return len(seen) == len(meant) and all(a == b for a, b in sizes if isinstance(b, int))


def _cloned(inputs: Sequence[Any]) -> list[Any]:
    return [tree_map_only(torch.Tensor, torch.clone, x) for x in inputs]


class _Lockstep:
    """Every rank runs to its next collective; then they exchange tensors and go on."""

    def __init__(self, graphs: Sequence[fx.GraphModule], inputs: Sequence[Sequence[Any]]) -> None:
        self.ranks = [_Rank(gm, given) for gm, given in zip(graphs, inputs, strict=True)]

    def run(self) -> list[Any]:
        while True:
            nodes = [rank.to_next_meeting() for rank in self.ranks]
            given = [rank.arguments(node) for rank, node in zip(self.ranks, nodes, strict=True)]
            first = nodes[0]
            if any(node.op != first.op or node.target != first.target for node in nodes):
                raise VerifyError(
                    "CP404", f"ranks meet in different nodes: {[n.name for n in nodes]}", "please report this"
                )
            if first.op == "output":
                return [args[0] for args, _ in given]
            for rank, node, result in zip(self.ranks, nodes, _exchange(first, given), strict=True):
                rank.values[node] = result


def _exchange(node: fx.Node, given: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """What a collective, or the meaning of a canonical op, gives each rank."""
    if node.target is c10d.all_gather_into_tensor.default:
        gathered = torch.cat([args[0] for args, _ in given])
        return [gathered.clone() for _ in given]
    name = CANONICAL[node.target]
    per_rank = PER_RANK.get(name, 1)
    stacked = [[args[i] for args, _ in given] for i in range(per_rank)]
    return MEANINGS[name](*stacked, *given[0][0][per_rank:])


class _Rank:
    """One rank's graph, run node by node."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.gm, self.inputs, self.nodes = gm, iter(inputs), iter(gm.graph.nodes)
        self.values: dict[fx.Node, Any] = {}

    def to_next_meeting(self) -> fx.Node:
        """Run up to a node that needs the other ranks, or the output."""
        node: fx.Node
        for node in self.nodes:
            if node.op == "output" or node.target is c10d.all_gather_into_tensor.default or node.target in CANONICAL:
                return node
            self.values[node] = self._run(node)
        raise AssertionError("a graph without an output")

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self.inputs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.gm)
        args, kwargs = self.arguments(node)
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.target is c10d.wait_tensor.default:
            return args[0]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        return args, kwargs
