"""npu_fused_infer_attention_score (FIA), versions 1 and 2, and torchair's forms with lengths in tensors.

    out, lse = npu_fused_infer_attention_score_v2(q, k, v, actual_seq_qlen=[8, 20], actual_seq_kvlen=[40, 12],
                                                  block_table=table, input_layout="TND", sparse_mode=3, ...)

What the rewrite does with its lengths and masks is in docs/npu.md and cppass/halves.py.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import refuse
from cppass.fused_op import OPS, TOKEN_DIM
from cppass.match.kv import SCATTER_PA, fresh_behind_views
from cppass.rules import argument, name_of, shape_of, static
from cppass.site import AttentionSite, FusedAttention, Lengths, Rewrite
from cppass.torch_private import is_unbacked

NO_LIMIT = 2147483647  # pre_tokens and next_tokens without a limit

UNDERSTOOD = {
    *("query", "key", "value", "atten_mask", "block_table", "num_key_value_heads"),
    *("input_layout", "sparse_mode", "pre_tokens", "next_tokens", "block_size", "inner_precise"),
}
FEATURES = {  # part of an argument's name -> the feature it asks for
    "shared_prefix": "a shared prefix",
    "rope": "MLA rope",
    "pse": "a positional bias (pse)",
    "antiquant": "a quantised cache",
    "dequant": "a quantised cache",
    "quant": "quantised attention",
    "padding_size": "left padding",
    "dtype": "data types given by number",
}


def match_fused(node: fx.Node) -> AttentionSite | Refusal:
    """The site around a call of the op, or why it is not supported."""
    given = _Arguments(node)
    refusal = _named_feature(node, given) or _unsupported(node, given)
    if refusal is not None:
        return refusal
    layout = given["input_layout"]
    dim, fused = TOKEN_DIM[layout], _fused(node, given)
    return AttentionSite(
        form=f"{name_of(node).replace('::', '.')} {layout}",
        node=node,
        query=given["query"],
        key=given["key"],
        value=given["value"],
        key_fresh=fresh_behind_views(given["key"], dim),
        value_fresh=fresh_behind_views(given["value"], dim),
        rewrite=Rewrite.FUSED,
        query_dim=dim,
        mask=given["atten_mask"],
        fused=fused,
        ends=fused.q_lengths if layout == "TND" and isinstance(fused.q_lengths, tuple) else (),
    )


class _Arguments:
    """A call's arguments by the names of version 1, defaults filled in."""

    def __init__(self, node: fx.Node) -> None:
        self.schema = node.target._schema  # type: ignore[union-attr]
        self.named = OPS[name_of(node)]
        self.values: dict[str, Any] = {
            a.name: argument(node, i, a.name, a.default_value) for i, a in enumerate(self.schema.arguments)
        }

    def __getitem__(self, name: str) -> Any:
        return self.values.get(self.named.get(name, name))

    def others(self) -> list[str]:
        """Arguments that nothing here reads and that are not at their default."""
        known = UNDERSTOOD | set(self.named.values())
        return [
            a.name
            for a in self.schema.arguments
            if a.name not in known and self.values[a.name] is not None and self.values[a.name] != a.default_value
        ]


def _fused(node: fx.Node, given: _Arguments) -> FusedAttention:
    return FusedAttention(
        op=node.target,
        input_layout=given["input_layout"],
        q_lengths=_lengths(given["q_lengths"]),
        kv_lengths=_lengths(given["kv_lengths"]),
        block_table=given["block_table"],
        sink=given["sink"],
        num_heads=given["num_heads"],
        num_key_value_heads=given["num_key_value_heads"],
        scale=given["scale"],
        sparse_mode=given["sparse_mode"],
        pre_tokens=given["pre_tokens"],
        next_tokens=given["next_tokens"],
        block_size=given["block_size"],
        inner_precise=given["inner_precise"],
        lse=given["lse"],
    )


def _lengths(value: Any) -> Lengths | fx.Node | None:
    if value is None or isinstance(value, fx.Node):
        return value
    return tuple(value) or None


# -- what is not supported ---------------------------------------------------------------------------------------------


def _named_feature(node: fx.Node, given: _Arguments) -> Refusal | None:
    """Features of the op that change what a query row sees or what the cache holds."""
    for name in given.others():
        feature = next((text for part, text in FEATURES.items() if part in name), f"the argument {name}")
        return _feature(node, f"{feature} ({name})")
    query, key = given["query"].meta["val"], given["key"].meta["val"]
    if query.dtype != key.dtype:
        return _feature(node, f"a quantised cache (query {query.dtype}, key {key.dtype})")
    if key.dim() == 5:
        return _feature(node, f"a cache in NZ layout {list(key.shape)}")
    for part in (given["key"], given["value"]):
        for write in fresh_behind_views(part, 0).writes:
            if name_of(write) == SCATTER_PA and write.kwargs.get("cache_mode", "PA_NZ") != "Norm":
                return _feature(write, 'a cache in NZ layout (cache_mode is not "Norm")')
    if given["input_layout"] not in TOKEN_DIM:
        return _feature(node, f"input_layout {given['input_layout']!r}")
    if given["sparse_mode"] not in (0, 1, 2, 3, 4):
        return _feature(node, f"sparse_mode {given['sparse_mode']}")
    return None


def _feature(node: fx.Node, feature: str) -> Refusal:
    return refuse(
        "CP110",
        node,
        f"context parallelism of fused-infer-attention with {feature} is not implemented",
        "leave the feature out, or on_refusal='fallback' to run this graph unsharded",
    )


def _unsupported(node: fx.Node, given: _Arguments) -> Refusal | None:
    why = _wrong_lengths(given) or _wrong_mask(given)
    return None if not why else refuse("CP103", node, why[0], why[1])


def _wrong_lengths(given: _Arguments) -> tuple[str, str] | None:
    q, kv = given["q_lengths"], given["kv_lengths"]
    if given["input_layout"] == "TND" and (_lengths(q) is None or _lengths(kv) is None):
        return "TND needs query and key/value lengths", "pass cumulative query lengths and key/value lengths"
    if isinstance(q, fx.Node) != isinstance(kv, fx.Node) and q is not None and kv is not None:
        return "one of the two lengths is a tensor and the other a list", "pass both as lists of ints"
    if given["input_layout"] != "TND" and (isinstance(q, fx.Node) or isinstance(kv, fx.Node)):
        return f"{given['input_layout']} with lengths in tensors", "use TND, or lists of ints"
    if isinstance(q, fx.Node) and given["block_table"] is None:
        return "dense key and value with lengths in tensors", "pass lists of ints, or read the paged cache"
    if given["input_layout"] != "TND" and _lengths(q) is not None:
        rows = shape_of(given["query"])[TOKEN_DIM[given["input_layout"]]]
        if static(rows) is None or any(isinstance(n, fx.Node) for n in _listed(q)):
            return f"{given['input_layout']} with query lengths and symbolic sizes", "TND, or dynamic=False"
    for length in (*_listed(q), *_listed(kv)):
        value = length.meta.get("val") if isinstance(length, fx.Node) else length
        if value is not None and is_unbacked(value):
            return (
                "a length was read from a device tensor: that is a device-to-host copy in every layer",
                "hand the lengths to the model as a list of ints",
            )
    return None


def _listed(lengths: Any) -> tuple[Any, ...]:
    return tuple(lengths) if isinstance(lengths, (list, tuple)) else ()


def _wrong_mask(given: _Arguments) -> tuple[str, str] | None:
    mode, mask = given["sparse_mode"], given["atten_mask"]
    limited = (given["pre_tokens"], given["next_tokens"]) != (NO_LIMIT, NO_LIMIT)
    if mode == 4 and given["next_tokens"] != 0:
        return f"sparse_mode 4 with next_tokens={given['next_tokens']}: rows see later tokens", "next_tokens=0"
    if mode in (0, 1) and mask is not None and limited:
        return f"sparse_mode {mode} with a mask and pre_tokens or next_tokens", "put the band into the mask"
    if mode in (0, 1) and mask is not None and given["input_layout"] == "TND":
        return f"TND with a mask of its own (sparse_mode {mode})", "sparse_mode=3 with the 2048 x 2048 mask"
    if mode in (0, 1) and mask is not None and static(shape_of(mask)[-2]) == 1:
        return "a mask with one row for all queries", "expand it, or pass key/value lengths"
    if mode == 2 and not _same_lengths(given):
        return "sparse_mode 2 (top-left causal) with more or fewer keys than queries", "sparse_mode=3"
    return None


def _same_lengths(given: _Arguments) -> bool:
    """Whether every sequence has as many keys as queries, so that top-left is bottom-right."""
    q, kv = _lengths(given["q_lengths"]), _lengths(given["kv_lengths"])
    if q is None and kv is None:
        dim = TOKEN_DIM[given["input_layout"]]
        return given["block_table"] is None and shape_of(given["query"])[dim] == shape_of(given["key"])[dim]
    return given["block_table"] is None and q == kv
