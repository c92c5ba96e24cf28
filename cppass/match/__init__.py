"""Find sites: one small module per form, one table. A node that looks like attention and has no form is a refusal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import op_of, refuse, source_of
from cppass.fused_op import OPS
from cppass.match.eager import match_eager, scores_are_given
from cppass.match.fused import match_fused
from cppass.match.sdpa import match_flash_for_cpu, match_sdpa
from cppass.op_rules import factors, is_heavy
from cppass.registry import registered_form, registered_rule
from cppass.rules import is_tensor, name_of, shape_of
from cppass.site import AttentionSite

aten = torch.ops.aten

Match = Callable[[fx.Node], "AttentionSite | Refusal | None"]

MATCHERS: dict[Any, Match] = {
    aten.scaled_dot_product_attention.default: match_sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu.default: match_flash_for_cpu,
    aten._softmax.default: match_eager,
    aten._safe_softmax.default: match_eager,
}

NAMED_MATCHERS: dict[str, Match] = dict.fromkeys(OPS, match_fused)
"""By name: torch_npu may not be installed."""

REFUSED_WRITES = {
    "atb::_npu_reshape_and_cache": "npu_scatter_pa_kv_cache or npu_scatter_nd_update_",
    "npu::npu_qkv_rms_norm_rope_cache_functional": "npu_rms_norm, npu_apply_rotary_pos_emb and npu_scatter_pa_kv_cache",
    "npu::npu_kv_rmsnorm_rope_cache": "npu_rms_norm, npu_apply_rotary_pos_emb and npu_scatter_pa_kv_cache",
    "npu::npu_kv_rmsnorm_rope_cache_v2_functional": "npu_rms_norm, npu_apply_rotary_pos_emb and a write of its own",
    "npu::npu_rope_quant_kvcache": "npu_apply_rotary_pos_emb, npu_dynamic_quant and a write of its own",
}
"""Ops that write K and V in one step with something else, or without a functional twin -> what to use instead."""

ATTENTION_WORDS = (
    *("attention", "attn", "flash", "sdpa", "selective_scan", "ssd_", "delta_rule", "retention", "wkv"),
    "transformer_encoder",  # torch's fast path of nn.TransformerEncoderLayer
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What is in a graph: the sites in graph order, and what looks like attention but has no form."""

    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]


def find_sites(graph: fx.Graph) -> Found:
    sites: list[AttentionSite] = []
    refusals: list[Refusal] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        matcher = matcher_of(node)
        match = matcher(node) if matcher else _looks_like_attention(node) or _fused_write(node) or _inside(node)
        if isinstance(match, AttentionSite):
            sites.append(match)
        elif match is not None:
            refusals.append(match)
    return Found(tuple(sites), tuple(refusals))


def matcher_of(node: fx.Node) -> Match | None:
    """What reads attention of this node's form, None where the node is no known attention."""
    return MATCHERS.get(node.target) or NAMED_MATCHERS.get(name_of(node)) or registered_form(node)


def _fused_write(node: fx.Node) -> Refusal | None:
    """A KV write that cannot be told from the rest of its op: its rows would be one rank's alone."""
    name = _wrapped(node) or name_of(node)
    if name not in REFUSED_WRITES:
        return None
    return refuse(
        "CP111",
        node,
        f"context parallelism of {name.replace('::', '.')}, which writes the KV cache, is not implemented",
        f"use {REFUSED_WRITES[name]}",
    )


def _wrapped(node: fx.Node) -> str:
    """ "library::op" of auto_functionalized(op, ...): how an op that writes its arguments stands in a graph."""
    higher = isinstance(node.target, torch._ops.HigherOrderOperator)
    op = node.args[0] if higher and node.args else None
    return op._name if isinstance(op, torch._ops.OpOverload) else ""


def _inside(node: fx.Node) -> Refusal | None:
    """Attention in a branch or loop body (torch.cond, while_loop): it may run on some ranks or steps only."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    root = node.graph.owning_module
    for operand in node.all_input_nodes:
        body = getattr(root, str(operand.target), None) if operand.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            inside = find_sites(body.graph)
            if inside.sites or inside.refusals:
                return refuse(
                    "CP107",
                    node,
                    f"attention inside a {node.target} body: collectives in a branch or loop could hang the group",
                    "move the attention out of the body, or compile the body on its own",
                )
    return None


BESIDE_ATTENTION = {"npu::npu_scatter_nd_update", "npu::npu_scatter_pa_kv_cache_functional", "npu::scatter_update"}
BESIDE_ATTENTION |= {"npu::npu_apply_rotary_pos_emb"}
"""What a graph with attention in it has beside it, in models of torch_npu's ops."""


def outside_notes(graph: fx.Graph) -> tuple[str, ...]:
    """What hints, in a graph without attention, that the attention of the model runs outside of every graph."""
    weights = next((n for n in graph.nodes if matcher_of(n) is match_eager and scores_are_given(n)), None)
    if weights is not None:
        return (
            f"{op_of(weights)} is over scores that another graph made: attention broke in two and runs unsharded on "
            "every rank (fullgraph=True shows where)",
        )
    beside = next((node for node in graph.nodes if name_of(node) in BESIDE_ATTENTION), None)
    if beside is not None:
        return (
            f"{op_of(beside)} is in this graph and no attention is: it broke out of the graph and runs unsharded on "
            "every rank (fullgraph=True shows where; lengths in a device tensor, where a list of ints is taken, do "
            "this)",
        )
    product = next((node for node in graph.nodes if _is_batched_product(node)), None)
    if product is None:
        return ()
    where = source_of(product)
    return (
        f"{op_of(product)} (node {product.name}{where and ', ' + where}) multiplies two batches of matrices: if that "
        "is attention, cppass does not know its form, and it runs unsharded on every rank (docs/extending.md)",
    )


def _is_batched_product(node: fx.Node) -> bool:
    """As attention makes its scores and its output; so do batched experts. Outer products (rope's angles) are none."""
    return is_heavy(node) and all(len(shape_of(x)) > 2 for x in factors(node))


def _looks_like_attention(node: fx.Node) -> Refusal | None:
    if not is_tensor(node):
        return None
    name = _wrapped(node) or op_of(node)
    if not any(word in name.lower() for word in ATTENTION_WORDS) or registered_rule(node) is not None:
        return None
    return refuse(
        "CP101",
        node,
        f"{name.replace('::', '.')} is attention in a form that cppass does not know",
        "use scaled_dot_product_attention (attn_implementation='sdpa'), or register a site form (docs/extending.md)",
    )
