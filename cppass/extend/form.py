"""Building an AttentionSite from the parts of a call."""

from __future__ import annotations

from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import op_of, refuse
from cppass.match.kv import fresh_rows, peel_repeat
from cppass.match.mask import causal_mask
from cppass.site import AttentionSite, Causal, Fresh


def attention_site(
    node: fx.Node,
    *,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    causal: Causal | None = None,
    mask: fx.Node | None = None,
    scale: float | None = None,
    heads_first: bool = True,
    key_fresh: Fresh | None = None,
    value_fresh: Fresh | None = None,
) -> AttentionSite:
    """The site of an attention call, which is then computed by cppass's own attention on every rank's rows.

    attention(q [B, Hq, S, D], k [B, Hkv, T, D], v [B, Hkv, T, E]) -> [B, Hq, S, E]

    Args:
        node: the call; its output, or the first of its outputs, is the attention.
        query: a node, as are the other operands. Hq is a multiple of Hkv.
        key: what is attended over: a written cache, where there is one. Without a mask and `causal`, every query sees
            every key.
        value: of the same rows as the key.
        causal: the call is causal: the query at row p sees the keys up to p + prefix, where
            prefix = causal.constant + causal.terms (nodes), the tokens in the cache before this step.
        mask: bool or additive, broadcastable to [B, Hq, S, T]. It is read: a plainly causal one is recognised.
        scale: factor on the scores; None means 1/sqrt(D).
        heads_first: False where the operands and the output are [B, S, H, D].
        key_fresh: the rows of this step behind the key, and the write between. Left out, they are found: written by
            index_copy, index_put, slice_scatter, cat or torch_npu's cache ops, or no cache at all.
        value_fresh: the same of the value.
    """
    tokens = 2 if heads_first else 1
    if heads_first:
        key, value = peel_repeat(key), peel_repeat(value)
    return AttentionSite(
        form=op_of(node),
        node=node,
        query=query,
        key=key,
        value=value,
        key_fresh=key_fresh or fresh_rows(key, tokens),
        value_fresh=value_fresh or fresh_rows(value, tokens),
        query_dim=tokens,
        mask=mask,
        causal=causal if causal is not None or mask is None else causal_mask(mask),
        scale=scale,
    )


def refusal(node: fx.Node, why: str, hint: str = "") -> Refusal:
    """A call that the site form does not support. The graph is refused (CP116), so say why, and the way out."""
    return refuse("CP116", node, why, hint)
