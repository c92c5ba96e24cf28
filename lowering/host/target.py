"""Canonical ops -> gloo functional collectives and host ops; the rank enters here.

before:  k, v = cppass.gather([k_local, v_local], dims, inners, tokens, P)
after:   packed = cppass_host.pack([k_local, v_local], ...)
         gathered = wait_tensor(all_gather_into_tensor(packed, P, group))
         k, v = cppass_host.unpack(gathered, ...)          or views of it, where slots say where each row goes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

import lowering.host.ops  # noqa: F401  (defines torch.ops.cppass_host)
from cppass.arithmetic import node_of
from cppass.collector import collector_paused
from cppass.config import CPConfig
from cppass.emitter import Emitter
from cppass.errors import Unsupported
from cppass.ops import named_arguments
from cppass.schedule import overlap
from cppass.target import Ranks
from lowering.host.inductor import compile_with_inductor
from lowering.host.inplace import recover_writes

aten = torch.ops.aten
host = torch.ops.cppass_host


class HostTarget:
    """The host lowering; see cppass.target.Target."""

    name = "host"

    @collector_paused()
    def lower(self, gm: fx.GraphModule, ranks: Ranks, config: CPConfig) -> None:
        if config.attention_calls == 1:
            why = "attention_calls=1 is for target npu: on the host one op has both halves anyway"
            raise Unsupported("CP508", why, "leave attention_calls out")
        emit = Emitter(gm)
        missing = "host form: fused-infer-attention is for target npu"
        for node, lower in emit.lowerings(LOWERINGS, missing, "use target='npu', or 'auto'"):
            emit.replace(node, lower(emit, node, ranks))
        if config.overlap:
            overlap(gm.graph)
        gm.graph.lint()
        gm.recompile()

    def computed_lengths(self, gm: fx.GraphModule) -> list[fx.Node]:
        return []

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
        if inner == "inductor":
            return compile_with_inductor(gm, example_inputs)
        recover_writes(gm)
        return gm.forward


def _shard(emit: Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    return emit(host.shard.default, *node.args, ranks.rank)


def _gather(emit: Emitter, node: fx.Node, ranks: Ranks) -> fx.Node | list[fx.Node]:
    args = node.args[:6]
    gathered = emit.all_gather(emit(host.pack.default, *args), ranks)
    if named_arguments(node)["natural"]:
        return emit(host.unpack.default, gathered, *args)
    return _as_they_arrive(emit, gathered, node.args[0], node.args[1])  # type: ignore[arg-type]


def _as_they_arrive(emit: Emitter, gathered: fx.Node, xs: list[fx.Node], dims: list[int]) -> list[fx.Node]:
    """Views of the gathered rows: [S, B * H * D of k | of v] -> k, v [B, H, S, D], their rows in gathered order."""
    start: Any = 0
    views = []
    for x, dim in zip(xs, dims, strict=True):
        rest = [emit.size(x, d) for d in range(x.meta["val"].dim()) if d != dim]
        width: Any = 1
        for size in rest:
            width = emit.numbers(size) * width
        own = emit(aten.slice.Tensor, gathered, 1, node_of(start), node_of(start + width))
        start = start + width
        rows = emit(aten.view.default, own, [-1, *rest])
        order = [*range(1, dim + 1), 0, *range(dim + 1, len(rest) + 1)]
        views.append(emit(aten.permute.default, rows, order))
    return views


def _gathered_order(emit: Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    return emit(host.gathered_order.default, *node.args)


def _gather_rows(emit: Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    picked = emit(host.pick_rows.default, *node.args, ranks.rank)
    return emit(host.place_rows.default, emit.all_gather(picked, ranks), *node.args)


def _gather_rows_at(emit: Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    x, dim, index, *layout = node.args
    picked = emit(host.pick_rows_at.default, x, dim, index, *layout, ranks.rank)
    return emit(host.place_rows_at.default, emit.all_gather(picked, ranks), x, dim, index, *layout)


def _attention(emit: Emitter, node: fx.Node, ranks: Ranks) -> fx.Node:
    return emit(host.attention.default, *node.args, ranks.rank)


LOWERINGS: dict[str, Callable[[Emitter, fx.Node, Ranks], fx.Node | list[fx.Node]]] = {
    "shard": _shard,
    "gather": _gather,
    "gather_rows": _gather_rows,
    "gathered_order": _gathered_order,
    "gather_rows_at": _gather_rows_at,
    "attention": _attention,
}


TARGET = HostTarget()
