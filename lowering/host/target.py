"""Canonical ops -> gloo functional collectives and host ops; the rank enters here.

before:  k, v = cppass.gather([k_local, v_local], dims, inners, tokens, P)
after:   packed = cppass_host.pack([k_local, v_local], ...)
         gathered = wait_tensor(all_gather_into_tensor(packed, P, group))
         k, v = cppass_host.unpack(gathered, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

import lowering.host.ops  # noqa: F401  (defines torch.ops.cppass_host)
from cppass.ops import CANONICAL
from cppass.target import Ranks
from cppass.torch_private import fake_mode_of
from lowering.host.inductor import compile_with_inductor
from lowering.host.inplace import recover_writes

host = torch.ops.cppass_host
c10d = torch.ops._c10d_functional


class HostTarget:
    """The host lowering; see cppass.target.Target."""

    name = "host"

    def lower(self, gm: fx.GraphModule, ranks: Ranks) -> None:
        fake_mode = fake_mode_of(gm.graph) or nullcontext()
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in CANONICAL:
                continue
            with gm.graph.inserting_before(node), fake_mode:
                lowered = LOWERINGS[CANONICAL[node.target]](_Emitter(gm.graph, node), node, ranks)
            node.replace_all_uses_with(lowered)
            gm.graph.erase_node(node)
        gm.graph.lint()
        gm.recompile()

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
        if inner == "inductor":
            return compile_with_inductor(gm, example_inputs)
        recover_writes(gm)
        return gm.forward


class _Emitter:
    """Emits nodes in place of one canonical node, with its metadata."""

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        self.graph, self.origin = graph, origin

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta.update({k: v for k, v in self.origin.meta.items() if k != "val"})
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def all_gather(self, packed: fx.Node, ranks: Ranks) -> fx.Node:
        started = self(c10d.all_gather_into_tensor.default, packed, ranks.cp_size, ranks.group_name)
        return self(c10d.wait_tensor.default, started)


def _shard(emit: _Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    return emit(host.shard.default, *node.args, ranks.rank)


def _gather(emit: _Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    packed = emit(host.pack.default, *node.args)
    return emit(host.unpack.default, emit.all_gather(packed, ranks), *node.args)


def _gather_rows(emit: _Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    picked = emit(host.pick_rows.default, *node.args, ranks.rank)
    return emit(host.place_rows.default, emit.all_gather(picked, ranks), *node.args)


def _attention(emit: _Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    return emit(host.attention.default, *node.args, ranks.rank)


LOWERINGS: dict[str, Callable[[_Emitter, fx.Node, Ranks], fx.Node]] = {
    "shard": _shard,
    "gather": _gather,
    "gather_rows": _gather_rows,
    "attention": _attention,
}


TARGET = HostTarget()
