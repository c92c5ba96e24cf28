"""AttentionSite: one attention with its KV write, described without a device and without editing anything."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from torch import fx

from cppass.fused_op import LSE_DIM
from cppass.rules import shape_of
from cppass.tokens import Tokens


class Rewrite(enum.Enum):
    """How a site's attention is rewritten."""

    ZIGZAG = "two zigzag halves"  # becomes the canonical op cppass::attention
    FUSED = "two fused-infer-attention halves"  # becomes the canonical op cppass::fused_attention
    ROWWISE = "row by row"  # keeps its own ops on local query rows (soft caps, sinks, attention weights as outputs)


@dataclasses.dataclass(frozen=True)
class Causal:
    """A plainly causal mask: the query at position p sees the keys (p + prefix - window, p + prefix].

    Attributes:
        constant: int part of the prefix, the tokens that are in the cache before this step.
        terms: nodes that add to it, each a SymInt or a 0-d integer tensor.
        window: 0 for no sliding window.
    """

    constant: int = 0
    terms: tuple[fx.Node, ...] = ()
    window: int = 0


@dataclasses.dataclass(frozen=True)
class Fresh:
    """Where a key (or value) of this step comes from.

    Attributes:
        source: the node with the new rows, tokens in `dim`.
        dim: its token dimension.
        writes: nodes between source and attention that put the rows into a cache (empty without one).
        form: name of the write's form, "" without one.
    """

    source: fx.Node
    dim: int
    writes: tuple[fx.Node, ...] = ()
    form: str = ""


Lengths = tuple[int | fx.Node, ...]  # of sequences: ints, or nodes of the graph


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """What a call of Ascend's fused-infer-attention op says beside query, key, value and mask.

    Attributes:
        op: the op's overload; the halves call the same one.
        input_layout: "TND", "BSH", "BSND" or "BNSD": the axes of query and dense key and value.
        q_lengths, kv_lengths: query and key/value lengths as the op takes them (TND: cumulative query lengths;
            key/value lengths cumulative too, but per sequence with a block table); a tensor node in the `air` forms;
            None where they are the whole axis.
        block_table: [sequences, blocks], where key and value are a paged cache.
        sink: a logit per head that joins the softmax (learnable_sink).
        num_heads, num_key_value_heads, scale, sparse_mode, pre_tokens, next_tokens, block_size, inner_precise: as the
            op documents them.
        lse: whether the log-sum-exp is asked for.
    """

    op: Any
    input_layout: str
    q_lengths: Lengths | fx.Node | None
    kv_lengths: Lengths | fx.Node | None
    block_table: fx.Node | None
    sink: fx.Node | None
    num_heads: int
    num_key_value_heads: int
    scale: float
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    block_size: int
    inner_precise: int
    lse: bool

    @property
    def tensors(self) -> list[fx.Node]:
        """Operands beside query, key, value and mask that are tensors."""
        given = (self.block_table, self.sink, self.q_lengths, self.kv_lengths)
        return [x for x in given if isinstance(x, fx.Node)]

    @property
    def lse_dim(self) -> int:
        """Token dimension of the log-sum-exp: [T, N, 1], else [B, N, S, 1]."""
        return LSE_DIM[self.input_layout]


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention with its KV write. Shapes: query [B, Hq, S, D], key [B, Hkv, T, D], value [B, Hkv, T, E].

    A FUSED site has them as its input layout says; another one with query_dim 1 has tokens before heads: [B, S, Hq, D].

    Attributes:
        form: name of the matched form.
        node: its output [B, Hq, S, E] (or a tuple that starts with it).
        query: the queries; tokens in `query_dim`.
        key, value: what attention reads (the written cache, where there is one), before any repeat of KV heads.
        key_fresh, value_fresh: the rows of this step that are gathered.
        mask: the mask as the graph has it, None without one.
        causal: what the mask says where it is plainly causal.
        scale: factor on the scores; None means 1/sqrt(D).
        scores: the score matrix of a ROWWISE site.
        fused: what a FUSED site's op says.
        ends: where each sequence ends in the token axis; () where the token axis is one sequence.
    """

    form: str
    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_fresh: Fresh
    value_fresh: Fresh
    rewrite: Rewrite = Rewrite.ZIGZAG
    query_dim: int = 2
    mask: fx.Node | None = None
    causal: Causal | None = None
    scale: float | None = None
    scores: fx.Node | None = None
    fused: FusedAttention | None = None
    ends: Lengths = ()

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def mask_state(self) -> Tokens | None:
        """The state of a mask whose rows are query rows; None for one that every row shares, or that is causal."""
        if self.mask is None or self.causal is not None:
            return None
        if self.fused is not None and self.fused.sparse_mode not in (0, 1):
            return None
        ndim = len(shape_of(self.mask))
        return None if shape_of(self.mask)[ndim - 2] == 1 else Tokens(ndim - 2)

    @property
    def writes(self) -> tuple[fx.Node, ...]:
        return self.key_fresh.writes + self.value_fresh.writes


def readers(sites: tuple[AttentionSite, ...]) -> dict[fx.Node, fx.Node]:
    """New rows of keys and values -> the attention they are gathered for; the first one, where several read them."""
    parts = [(part, site) for site in sites for part in (site.key_fresh, site.value_fresh)]
    return {part.source: site.node for part, site in reversed(parts)}
