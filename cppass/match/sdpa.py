"""scaled_dot_product_attention, as it is and as AOT leaves it on a CPU."""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import refuse
from cppass.match.kv import fresh_rows, peel_repeats
from cppass.match.mask import causal_mask
from cppass.rules import argument, shape_of
from cppass.site import AttentionSite, Causal
from cppass.tokens import Size

aten = torch.ops.aten


def match_sdpa(node: fx.Node) -> AttentionSite | Refusal:
    """aten.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, *, scale, enable_gqa)."""
    return _site(
        node,
        "scaled_dot_product_attention",
        mask=argument(node, 3, "attn_mask"),
        dropout=argument(node, 4, "dropout_p", 0.0),
        is_causal=argument(node, 5, "is_causal", False),
    )


def match_flash_for_cpu(node: fx.Node) -> AttentionSite | Refusal:
    """aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, *, attn_mask, scale)."""
    for user in node.users:
        if user.target is not operator.getitem or (user.args[1] == 1 and user.users):
            return refuse("CP104", node, "the log-sum-exp of this attention is used", "use the attention output alone")
    return _site(
        node,
        "scaled_dot_product_attention (CPU flash)",
        mask=node.kwargs.get("attn_mask"),
        dropout=argument(node, 3, "dropout_p", 0.0),
        is_causal=argument(node, 4, "is_causal", False),
    )


def _site(node: fx.Node, form: str, mask: object, dropout: object, is_causal: object) -> AttentionSite | Refusal:
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    if dropout != 0.0:
        return refuse(
            "CP102",
            node,
            f"attention with dropout_p={dropout}: ranks would drop different weights than one device",
            "call model.eval(), or set the model's attention_dropout to 0",
        )
    if len(shape_of(query)) != 4:
        seen = list(shape_of(query))
        way_out = "give query, key and value four dimensions: x.unsqueeze(0) of [H, S, D], and squeeze the result"
        return refuse("CP103", node, f"attention over a query of shape {seen}; [B, H, S, D] is supported", way_out)
    if is_causal and _shorter(shape_of(key)[2], shape_of(query)[2]):
        return refuse("CP103", node, "is_causal with fewer keys than queries", "pass the mask, or the whole key")
    scale = node.kwargs.get("scale")
    causal = Causal() if is_causal else None
    if isinstance(mask, fx.Node):
        causal = causal_mask(mask)
    key, value = peel_repeats(key, value)
    return AttentionSite(
        form=form,
        node=node,
        query=query,
        key=key,
        value=value,
        key_fresh=fresh_rows(key),
        value_fresh=fresh_rows(value),
        mask=mask if isinstance(mask, fx.Node) else None,
        causal=causal,
        scale=scale,  # type: ignore[arg-type]
    )


def _shorter(a: Size, b: Size) -> bool:
    """Whether a < b is known while compiling."""
    return bool((a < b) is True or (a < b) == sympy.true)
