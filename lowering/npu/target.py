"""Canonical ops -> HCCL functional collectives, torch_npu's ops and plain aten; the rank enters here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cppass.collector import collector_paused
from cppass.config import CPConfig
from cppass.emitter import Emitter
from cppass.schedule import overlap
from cppass.target import Ranks
from lowering.npu import attention, moves, sharded
from lowering.npu.compilers import compile_with, register_writes
from lowering.npu.hoist import computed_lengths
from lowering.npu.rows import Rows

Lowering = Callable[[Emitter, Rows, fx.Node, Ranks], "fx.Node | list[fx.Node]"]

LOWERINGS: dict[str, Lowering] = {
    "shard": moves.shard,
    "gather": moves.gather,
    "gather_rows": moves.gather_rows,
    "gather_rows_at": moves.gather_rows_at,
    "gathered_order": moves.gathered_order,
    "fused_attention": attention.fused_attention,
    "gather_sharded": sharded.gather_sharded,
    "look_up_sharded": sharded.look_up_sharded,
    "fused_attention_sharded": sharded.fused_attention_sharded,
}
ONE_CALL: dict[str, Lowering] = {
    "fused_attention": attention.fused_attention_in_one_call,
    "fused_attention_sharded": sharded.fused_attention_sharded_in_one_call,
}
"""With the option attention_calls=1."""


class NpuTarget:
    """The NPU lowering; see cppass.target.Target. Its graphs run on CPU tensors, too, where torch_npu has no NPU."""

    name = "npu"

    @collector_paused()
    def lower(self, gm: fx.GraphModule, ranks: Ranks, config: CPConfig) -> None:
        emit = Emitter(gm)
        rows = Rows(emit, ranks.rank, _device(gm))
        missing = "NPU form: target npu takes fused-infer-attention"
        hint = "use npu_fused_infer_attention_score in the model, or target='host'"
        known = LOWERINGS if config.attention_calls == 2 else LOWERINGS | ONE_CALL
        for node, lower in emit.lowerings(known, missing, hint):
            emit.replace(node, lower(emit, rows, node, ranks))
        if "npugraph_ex._acl_concrete_graph.graph_pass" in sys.modules:  # it may be what called us, through a hook
            register_writes()
        gm.graph.eliminate_dead_code()
        if config.overlap:
            overlap(gm.graph)
        gm.graph.lint()
        gm.recompile()

    def computed_lengths(self, gm: fx.GraphModule) -> list[fx.Node]:
        return computed_lengths(gm)

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
        return compile_with(gm, example_inputs, inner)


def _device(gm: fx.GraphModule) -> torch.device:
    """Where the graph's tensors are."""
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            return node.meta["val"].device  # type: ignore[no-any-return]
    return torch.device("cpu")


TARGET = NpuTarget()
