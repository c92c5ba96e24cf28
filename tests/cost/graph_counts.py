"""A real transformers model, compiled and rewritten, and what its graph computes and receives: counted node by node."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from qwen import handed, model, token_ids
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from transformers import DynamicCache

import cppass
from cppass.cost.model import ModelShape
from cppass.layout import zigzag


@dataclasses.dataclass(frozen=True)
class Counted:
    """What one rank computes and receives in a forward."""

    matmul_flops: int
    attention_flops: tuple[int, ...]  # of every rank
    received: tuple[int, ...]  # of every collective
    parameters: int
    gathered: tuple[int, ...]  # bytes of K and V of a site as the all-gather leaves them
    cached: int  # bytes of all keys and values that attention reads


class _Enough(Exception):
    """Ends a compilation: the graph is all that is wanted."""


@functools.cache
def counted(family: str, tokens: int, cp_size: int, prefix: int) -> Counted:
    """Counts of the graph of `cp_size` ranks; nothing of it is run."""
    found: list[tuple[fx.GraphModule, cppass.Report]] = []

    def look(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append((gm, cppass.run_pass(gm, inputs, cp_size=cp_size, lower=False)))
        raise _Enough

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=look, keep_inference_input_mutations=True)(gm, inputs)

    net = model(family, "sdpa")
    past = DynamicCache(config=net.config)
    with torch.no_grad():
        if prefix:
            net(token_ids(1, prefix), **handed(past))
        torch._dynamo.reset()
        try:
            compiled = torch.compile(net, backend=backend, dynamic=False)
            compiled(token_ids(1, tokens), **handed(past), logits_to_keep=1)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Enough):
                raise
    ((gm, report),) = found
    assert report.status == "rewritten"
    layout = zigzag((tokens,), cp_size)
    sites = [n for n in gm.graph.nodes if str(n.target) == "cppass.attention.default"]
    assert len(sites) == net.config.num_hidden_layers
    per_pair = sum(4 * n.meta["val"].shape[1] * n.meta["val"].shape[-1] for n in sites)  # [B, heads, rows, head dim]
    return Counted(
        sum(matmul_flops(n) for n in gm.graph.nodes),
        tuple(per_pair * layout.attention_pairs(rank, (prefix,)) for rank in range(cp_size)),
        tuple(g.received_bytes or 0 for g in report.gathers),
        sum(p.numel() for p in net.parameters()),
        tuple(sum(bytes_of(part) for part in n.users) for n in gm.graph.nodes if str(n.target) == GATHER),
        sum(bytes_of(n.args[i]) for n in sites for i in (1, 2)),  # type: ignore[arg-type]
    )


GATHER = "cppass.gather.default"


def bytes_of(node: fx.Node) -> int:
    return int(node.meta["val"].nbytes)


def matmul_flops(node: fx.Node) -> int:
    """2 m k n of a matmul node; 0 of any other, but an op that looks like a matmul has to be known."""
    name = str(node.target)
    if node.op != "call_function" or "mm" not in name:
        return 0
    known = (
        "aten.mm.default",
        "aten.bmm.default",
        "transformers.grouped_mm_fallback.default",
        "aten._grouped_mm.default",
    )
    assert name in known, name
    left = node.args[0]
    assert isinstance(left, fx.Node)
    return 2 * math.prod(node.meta["val"].shape) * int(left.meta["val"].shape[-1])  # every output row meets one expert


def shape_of(family: str) -> ModelShape:
    """The shape that the closed forms are given: from the config of the model."""
    c = model(family, "sdpa").config
    moe = family != "dense"
    return ModelShape(
        name=family,
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        intermediate=c.intermediate_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        vocab=c.vocab_size,
        experts=c.num_experts if moe else 0,
        experts_per_token=c.num_experts_per_tok if moe else 0,
        expert_width=c.moe_intermediate_size if moe else 0,
        tied=c.tie_word_embeddings,
        weight_bytes=4,
        activation_bytes=4,
    )
