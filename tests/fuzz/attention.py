"""Attention of a random layer: projections, rope, cache, mask, and the product itself in forms known and unknown.

Shape suffixes: B batch, H query heads, G key/value heads, S tokens, T keys, D head size, F hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from fuzz.caches import CACHES, Rows
from fuzz.inputs import Inputs
from fuzz.masks import ADDED, MASKS, Extent, bias_by_distance
from fuzz.ropes import rotated
from fuzz.tokenwise import rms_norm
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, sigmoid, softplus


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention; the defaults are its simplest form.

    Attributes:
        heads, groups, size: H, G (which divides H) and D.
        projections: key of PROJECTIONS. normed: RMS norm over each head of q and k.
        turn, angles: of the rope.
        cache: key of CACHES. prefix: rows it has. counted: the prefix is an input of the graph, not an int.
        mask: "is_causal", "none", or a key of MASKS. hidden: "bool", or a key of ADDED. by_distance: ALiBi.
        repeat: how G heads become H.
        form: key of FORMS. scale: where the scores are scaled.
    """

    heads: int = 2
    groups: int = 2
    size: int = 4
    projections: str = "three"
    normed: bool = False
    turn: str = "none"
    angles: str = "outer product"
    cache: str = "none"
    prefix: int = 0
    counted: bool = False
    mask: str = "is_causal"
    hidden: str = "bool"
    by_distance: bool = False
    repeat: str = "expand"
    form: str = "sdpa"
    scale: str = "after"


# -- projections: x [B, S, F] -> q [B, H, S, D], k and v [B, G, S, D] --------------------------------------------------

Projected = tuple[Tensor, Tensor, Tensor]


def _three(a: Attention, x: Tensor, given: Inputs) -> Projected:
    b, s, f = x.shape
    q, k, v = (
        (x @ given.weight(f, n * a.size)).view(b, s, n, a.size).transpose(1, 2) for n in (a.heads, a.groups, a.groups)
    )
    return q, k, v


def _with_bias(a: Attention, x: Tensor, given: Inputs) -> Projected:
    def projected(n: int) -> Tensor:
        flat = linear(x, given.weight(n * a.size, x.shape[-1]), given.normal(n * a.size))
        return flat.unflatten(-1, (n, -1)).permute(0, 2, 1, 3)

    return projected(a.heads), projected(a.groups), projected(a.groups)


def _split(a: Attention, x: Tensor, given: Inputs) -> Projected:
    b, s, f = x.shape
    sizes = [n * a.size for n in (a.heads, a.groups, a.groups)]
    parts = (x @ given.weight(f, sum(sizes))).split(sizes, -1)
    q, k, v = (part.view(b, s, -1, a.size).transpose(1, 2) for part in parts)
    return q, k, v


def _unbound(a: Attention, x: Tensor, given: Inputs) -> Projected:
    """Three of a kind: G = H."""
    b, s, f = x.shape
    packed = (x @ given.weight(f, 3 * a.heads * a.size)).view(b, s, 3, a.heads, a.size)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _heads_of_rows(a: Attention, x: Tensor, given: Inputs) -> Projected:
    """[B * S, F] rows, as serving engines have them."""
    b, s, f = x.shape
    rows = x.reshape(-1, f)
    q, k, v = (
        torch.mm(rows, given.weight(f, n * a.size)).view(b, s, n, a.size).permute(0, 2, 1, 3).contiguous()
        for n in (a.heads, a.groups, a.groups)
    )
    return q, k, v


def _einsum(a: Attention, x: Tensor, given: Inputs) -> Projected:
    f = x.shape[-1]
    q, k, v = (
        torch.einsum("bsf,fnd->bnsd", x, given.weight(f, n * a.size).view(f, n, a.size))
        for n in (a.heads, a.groups, a.groups)
    )
    return q, k, v


PROJECTIONS: dict[str, Callable[[Attention, Tensor, Inputs], Projected]] = {
    "three": _three,
    "with bias": _with_bias,
    "split": _split,
    "unbound": _unbound,
    "heads of rows": _heads_of_rows,
    "einsum": _einsum,
}


# -- G heads become H --------------------------------------------------------------------------------------------------


def _repeat_kv(x: Tensor, n: int) -> Tensor:
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, n, t, d).reshape(b, g * n, t, d)


REPEATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expand": _repeat_kv,
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, 1),
    "index": lambda x, n: x[:, torch.arange(x.shape[1] * n) // n],
    "stack": lambda x, n: torch.stack([x] * n, 2).flatten(1, 2),
}


# -- the product: q, k, v [B, H, S | T, D] and what is seen -> [B, H, S, D] --------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a form is handed. seen: bool, or None; added: to the scores, or None; at most one of the two."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor | None
    added: Tensor | None
    scale: str

    def scores(self) -> Tensor:
        """Scaled, hidden keys at -inf."""
        factor = self.q.shape[-1] ** -0.5
        if self.scale == "queries":
            scores = (self.q * factor) @ self.k.transpose(-1, -2)
        elif self.scale == "both":
            scores = (self.q * factor**0.5) @ (self.k * factor**0.5).transpose(2, 3)
        elif self.scale == "divided":
            scores = torch.matmul(self.q, self.k.transpose(2, 3)) / self.q.shape[-1] ** 0.5
        elif self.scale == "einsum":
            scores = torch.einsum("bhsd,bhtd->bhst", self.q, self.k) * factor
        else:
            scores = torch.matmul(self.q, self.k.transpose(2, 3)) * factor
        if self.seen is not None:
            return scores.masked_fill(~self.seen, float("-inf"))
        return scores if self.added is None else scores + self.added


def _raised(x: Scored) -> Tensor:
    """Hidden keys at 0, others above: for forms without a softmax."""
    scores = x.scores()
    return torch.where(scores.isfinite() & (scores > -1e4), scores, float("-inf"))


def _sink(x: Scored) -> Tensor:
    scores = x.scores()
    widened = torch.cat([scores, x.q[..., :1]], -1)
    return widened.softmax(-1)[..., :-1] @ x.v


def _in_float32(x: Scored) -> Tensor:
    wide = torch.promote_types(x.q.dtype, torch.float32)
    return x.scores().softmax(-1, dtype=wide).to(x.q.dtype) @ x.v


def _soft_capped(x: Scored) -> Tensor:
    scores = dataclasses.replace(x, seen=None, added=None).scores()
    return (scores.tanh() * 3 + _bias(x)).softmax(-1) @ x.v


def _exp_over_sum(x: Scored) -> Tensor:
    scores = x.scores()
    raised = (scores - scores.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True) @ x.v


def _linear(x: Scored) -> Tensor:
    q, k = softplus(x.q), softplus(x.k)
    return q @ (k.transpose(2, 3) @ x.v) / (q @ k.sum(2, keepdim=True).transpose(2, 3))


def _linear_causal(x: Scored) -> Tensor:
    """Fast weights: a running sum of outer products."""
    states = (softplus(x.k)[..., None] * x.v[..., None, :]).cumsum(2)[:, :, -x.q.shape[2] :]
    return torch.einsum("bhsd,bhsde->bhse", softplus(x.q), states) * 0.1


def _top_keys(x: Scored) -> Tensor:
    scores = x.scores()
    least = scores.topk(2, -1)[0][..., -1:]
    return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ x.v


def _twice(x: Scored) -> Tensor:
    """Differential attention: one softmax less another."""
    first = x.scores().softmax(-1)
    return (first - 0.3 * (x.scores() * 2).softmax(-1)) @ x.v


def _sdpa(x: Scored) -> Tensor:
    return scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=x.seen if x.added is None else x.added)


KNOWN: dict[str, Callable[[Scored], Tensor]] = {
    "sdpa": _sdpa,
    "written out": lambda x: x.scores().softmax(-1) @ x.v,
    "in float32": _in_float32,
    "soft-capped": _soft_capped,
    "with a sink": _sink,
    "einsum": lambda x: torch.einsum("bhst,bhtd->bhsd", x.scores().softmax(-1), x.v),
}

STRANGE: dict[str, Callable[[Scored], Tensor]] = {
    "exp over sum": _exp_over_sum,
    "log_softmax": lambda x: x.scores().log_softmax(-1).exp() @ x.v,
    "sigmoid": lambda x: sigmoid(_raised(x)) @ x.v * 0.2,
    "retention": lambda x: _raised(x).exp().clamp(max=3) @ x.v * 0.2,
    "linear": _linear,
    "linear, causal": _linear_causal,
    "over queries": lambda x: x.scores().nan_to_num(neginf=-30.0).softmax(-2) @ x.v,
    "top keys": _top_keys,
    "twice": _twice,
    "no keys": lambda x: x.v.cumsum(2)[:, :, -x.q.shape[2] :] * x.q.sigmoid() * 0.2,
}

FORMS = KNOWN | STRANGE
SHARP_FORMS = {"top keys"}


def _bias(x: Scored) -> Tensor:
    """[..., S, T]: what is added to the scores."""
    if x.seen is not None:
        return torch.where(x.seen, torch.zeros((), dtype=x.q.dtype), float("-inf"))
    return torch.zeros((), dtype=x.q.dtype) if x.added is None else x.added


# -- all of it ---------------------------------------------------------------------------------------------------------


def attend(a: Attention, x: Tensor, given: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Output [B, S, H * D], and caches that are outputs."""
    q, k, v = PROJECTIONS[a.projections](a, x, given)
    if a.normed:
        q, k = rms_norm(q, given), rms_norm(k, given)
    n = given.number(a.prefix) if a.counted else a.prefix
    q, k = rotated(a.turn, a.angles, q, k, torch.arange(x.shape[1]) + n, given)
    kept = [CACHES[a.cache](Rows(new, a.prefix, n), given) for new in (k, v)]
    (k, _), (v, _) = kept
    out = _product(a, q, k, v, n, given)
    return out.transpose(1, 2).reshape(*x.shape[:2], -1), [cache for _, cache in kept if cache is not None]


def _product(a: Attention, q: Tensor, k: Tensor, v: Tensor, n: Tensor | int, given: Inputs) -> Tensor:
    extent = Extent(q.shape[0], q.shape[2], k.shape[2], n, a.prefix)
    gqa = a.repeat == "enable_gqa"
    if not gqa and a.heads != a.groups:
        k, v = (REPEATS[a.repeat](y, a.heads // a.groups) for y in (k, v))
    if a.mask == "is_causal":
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    seen = None if a.mask == "none" else MASKS[a.mask](extent, given)
    added: Tensor | None = None
    if seen is not None and (a.hidden != "bool" or a.by_distance):
        added = ADDED[a.hidden if a.hidden != "bool" else "where -inf"](seen, q.dtype)
        added = added if added.dim() == 4 else added[None, None]
        added = added + bias_by_distance(extent, a.heads, q.dtype) if a.by_distance else added
        seen = None
    if gqa:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen if added is None else added, enable_gqa=True)
    return FORMS[a.form](Scored(q, k, v, seen, added, a.scale))
