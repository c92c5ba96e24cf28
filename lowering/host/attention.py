"""Attention of one rank's zigzag rows over whole keys and values, on the CPU flash kernel.

Shape suffixes: B batch, H query heads, G key/value heads, R = H // G query heads per key/value head, S local rows,
M rows of one piece, T keys, D query/key head size, E value head size, N a mask dim of size 1 or full.

Layout ("zigzag", cppass/layout.py): P ranks, one sequence cut into 2P blocks, rank r owns blocks r and 2P-1-r::

    15 tokens, P = 2                block     0          1          2           3
                                    position  0 1 2 3    4 5 6 7    8 9 10 11   12 13 14
                                    rank      0          1          1           0          (one row of padding)

Under a causal mask row p costs p keys, so every rank's two blocks cost the same.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cppass.layout import Zigzag
from cppass.torch_private import profiling

__all__ = ["zigzag_attention"]

# The kernel takes 256 query rows at a time when it is given 768 or more, else 64 (measured: 10-15% slower), hence
# pieces of 1024 rows. Rows under a mask or window compute every key any of them sees, so their pieces stay small.
_CAUSAL_ROWS = 1024
_MASKED_ROWS = 256


def zigzag_attention(
    q_BHSD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    *,
    mask: Tensor | None = None,
    prefix: int,
    layout: Zigzag,
    rank: int,
    causal: bool,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of this rank's rows; the result is [B, H, S, E] stored as contiguous [B, S, H, E].

    before:  out_BHSE = scaled_dot_product_attention(q_BHSD, k_BGTD, v_BGTE, attn_mask=zigzag_mask_ST)  # O(S * T) mask
    after:   per piece of rows that starts at key ``start`` (causal, no window):
                 past_BHME, past_lse = flash(q_BHMD, k[:, :, :start], v[:, :, :start])
                 own_BHME, own_lse = flash(q_BHMD, k[:, :, start : start + M], v[...], is_causal=True)
                 out_BHME = lerp(own, past, sigmoid(past_lse - own_lse))

    Args:
        q_BHSD: local rows: block ``rank``, then block ``2P - 1 - rank``, then padding.
        k_BGTD, v_BGTE: all keys and values in natural order, the ``prefix`` cached ones first; H % G == 0.
        mask: only with ``causal=False``; for the local rows, bool (True = visible) or additive float, broadcastable to
            [B, H, S, T]. None shows every row all T keys.
        prefix: keys before the first new token.
        layout: of one sequence of new tokens; padding rows come out as zeros.
        causal: the row at position p sees keys up to ``prefix + p``. T may exceed ``prefix + tokens`` (static cache):
            the surplus is never read.
        window: with ``causal``, keys a row sees, its own included; 0 means no limit.
        scale: of the scores; D ** -0.5 unless given.

    A row that sees no key comes out as zeros. A NaN in a masked key spreads, as in ``scaled_dot_product_attention``,
    unless it lies before the first or after the last key visible to the rows around it.

    Numerics: softmax and the merge are in fp32 (fp64 for fp64 input); equal to one flash call to rounding, not bitwise.
    Inference only: the kernel's log-sum-exp has no gradient, so the result carries none.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit; the message says what was seen and what is expected.
    """
    tokens = layout.tokens
    _check(q_BHSD, k_BGTD, v_BGTE, prefix, layout, rank)
    _check_visibility(mask, (*q_BHSD.shape[:3], k_BGTD.shape[2]), prefix + tokens, causal, window)

    B, H, S, D = q_BHSD.shape
    E = v_BGTE.shape[3]
    out_BSHE = q_BHSD.new_zeros(B, S, H, E)
    out_BHSE = out_BSHE.transpose(1, 2)
    keys = prefix + tokens if causal else k_BGTD.shape[2]
    if out_BSHE.numel() == 0 or keys == 0:
        return out_BHSE

    scale = D**-0.5 if scale is None else scale
    width = max(D, E)  # the kernel wants one head size; zeros change neither the scores nor the kept outputs
    q, k, v = (_widen(x, width) for x in (q_BHSD, k_BGTD[:, :, :keys], v_BGTE[:, :, :keys]))
    mask_NNNN = None if mask is None else _narrow(mask)
    whole = mask_NNNN is not None and mask_NNNN.shape[2] == 1  # one mask row for all: nothing to gain from small pieces

    local = 0  # this block's first local row
    with torch.no_grad():
        for half, (position, real) in enumerate(layout.spans(rank)):
            limited = (mask is not None and not whole) or 0 < window < prefix + position + real
            with _named(f"cppass half {half}: {real} rows from {position} on"):
                for first, last in _pieces(real, _MASKED_ROWS if limited else _CAUSAL_ROWS):
                    rows = slice(local + first, local + last)
                    start = prefix + position + first  # this piece's first position among the keys
                    if not causal:
                        mask_rows = mask_NNNN if mask_NNNN is None or whole else mask_NNNN[:, :, rows]
                        out = _visible(q[:, :, rows], k, v, mask_rows, scale)
                    elif limited:
                        out = _windowed(q[:, :, rows], k, v, start, window, scale)
                    else:
                        out = _causal(q[:, :, rows], k, v, start, scale)
                    out_BHSE[:, :, rows] = out[..., :E]
            local += real
    return out_BHSE


def _named(text: str) -> AbstractContextManager[Any]:
    """A range of that name in a profile; nothing where no profiler records."""
    return torch.profiler.record_function(text) if profiling() else nullcontext()


def _causal(q_BHMD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, start: int, scale: float) -> Tensor:
    """Rows at key positions start, start + 1, ...: flash over the past, causal flash over their own keys, merged.

    With lse = log(sum(exp(scores))) of each part, ``out = (past * e^past_lse + own * e^own_lse) / (e^past_lse +
    e^own_lse)``, and the weight of the past is sigmoid(past_lse - own_lse). (Flash-decoding's merge of split keys.)
    """
    end = start + q_BHMD.shape[2]
    own, own_lse = _flash(q_BHMD, k_BGTD[:, :, start:end], v_BGTD[:, :, start:end], scale, causal=True)
    if start == 0:
        return own
    past, past_lse = _unmasked(q_BHMD, k_BGTD[:, :, :start], v_BGTD[:, :, :start], scale)
    weight = torch.sigmoid(past_lse - own_lse).unsqueeze(-1)
    return torch.lerp(own.to(weight.dtype), past.to(weight.dtype), weight)


def _windowed(q_BHMD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, start: int, window: int, scale: float) -> Tensor:
    """Rows at key positions start, start + 1, ..., over the M + window - 1 keys their windows touch, under a mask."""
    end = start + q_BHMD.shape[2]
    low = max(0, start - window + 1)
    back_MT = torch.arange(start, end, device=k_BGTD.device)[:, None] - torch.arange(
        low, end, device=k_BGTD.device
    )  # 0 at the row's own key
    seen_MT = (back_MT >= 0) & (back_MT < window)
    return _visible(q_BHMD, k_BGTD[:, :, low:end], v_BGTD[:, :, low:end], seen_MT[None, None], scale)


def _visible(q_BHMD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask_NNNN: Tensor | None, scale: float) -> Tensor:
    """Rows under a mask, over the span of keys that at least one of them sees."""
    if mask_NNNN is None:
        return _unmasked(q_BHMD, k_BGTD, v_BGTD, scale)[0]
    seen = mask_NNNN if mask_NNNN.dtype is torch.bool else mask_NNNN != -torch.inf
    columns = seen.flatten(0, 2).any(0).nonzero()
    if columns.numel() == 0:
        return torch.zeros_like(q_BHMD)
    if mask_NNNN.shape[3] > 1:
        span = slice(int(columns[0]), int(columns[-1]) + 1)
        k_BGTD, v_BGTD, mask_NNNN = k_BGTD[:, :, span], v_BGTD[:, :, span], mask_NNNN[..., span]
    dtype = torch.promote_types(q_BHMD.dtype, torch.float32)  # fp32 holds what fp16 rows cannot, e.g. a -1e9
    if mask_NNNN.dtype is torch.bool:
        mask_NNNN = torch.zeros_like(mask_NNNN, dtype=dtype).masked_fill_(~mask_NNNN, -torch.inf)
    return _flash(q_BHMD, k_BGTD, v_BGTD, scale, mask=mask_NNNN.to(dtype).contiguous())[0]


def _unmasked(q_BHMD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every row sees every key, so the R query heads of a key head can be rows: more rows per kernel block.

    before:  flash(q[B, G * R, M, D], k[B, G, T, D])
    after:   flash(q[B, G, R * M, D], k[B, G, T, D])     up to 10% faster when M < 768, else the same
    """
    B, H, M, D = q_BHMD.shape
    out, lse = _flash(q_BHMD.reshape(B, k_BGTD.shape[1], -1, D), k_BGTD, v_BGTD, scale)
    return out.reshape(B, H, M, D), lse.reshape(B, H, M)


def _flash(
    q_BHMD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel: (out [B, H, M, D], lse [B, H, M]). Query head h reads key head h // R; ``causal`` is top-left.

    It divides by zero on an empty M or T and misreads rows that are not dense; the callers see to both.
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cpu/FlashAttentionKernel.cpp
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHMD, k_BGTD, v_BGTD, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _widen(x: Tensor, width: int) -> Tensor:
    """[B, H, S, D] -> [B, H, S, width], zeros after D, each row dense; ``x`` itself when it is that already."""
    x = x if x.shape[3] == width else pad(x, (0, width - x.shape[3]))
    return x if x.stride(3) == 1 else x.contiguous()


def _narrow(mask: Tensor) -> Tensor:
    """Four dims, size 1 where the mask repeats itself, so that converting it never writes out an expanded copy.

    before:  mask [B, 1, S, T] expanded to [B, H, S, T], strides (S * T, 0, T, 1)
    after:   mask [B, 1, S, T]
    """
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in range(4):
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
    return mask


def _pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, count) cut into equal spans of at least ``size`` (one span when count < 2 * size, none when count <= 0)."""
    if count > 0:
        step = -(-count // max(1, count // size))
        for first in range(0, count, step):
            yield first, min(first + step, count)


def _check(q: Tensor, k: Tensor, v: Tensor, prefix: int, layout: Zigzag, rank: int) -> None:
    cp_size, tokens = layout.cp_size, layout.tokens
    if cp_size < 1 or not 0 <= rank < cp_size:
        raise ValueError(f"saw rank={rank}, cp_size={cp_size}; expected cp_size >= 1 and 0 <= rank < cp_size")
    if tokens < 1 or prefix < 0:
        raise ValueError(f"saw tokens={tokens}, prefix={prefix}; expected tokens >= 1 and prefix >= 0")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"saw dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one floating-point dtype")
    seen = f"saw q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{seen}; expected q [B, H, S, D], k [B, G, T, D], v [B, G, T, E]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{seen}; expected q [B, H, S, D], k [B, G, T, D], v [B, G, T, E] with equal B, G, T, D")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{seen}; expected the {q.shape[1]} query heads to be a multiple of {k.shape[1]} key heads")
    local = layout.local_rows
    if q.shape[2] != local:
        raise ValueError(f"{seen}; expected {local} local rows in q for {tokens} tokens on {cp_size} ranks")


def _check_visibility(mask: Tensor | None, full: tuple[int, ...], needed: int, causal: bool, window: int) -> None:
    if window < 0 or (window > 0 and not causal):
        raise ValueError(f"saw window={window}, causal={causal}; expected window >= 0, and 0 unless causal")
    if causal and mask is not None:
        raise ValueError(f"saw causal=True and a mask {tuple(mask.shape)}; expected one or the other")
    if causal and full[3] < needed:
        raise ValueError(f"saw {full[3]} keys; expected at least {needed}, prefix + tokens")
    if mask is None:
        return
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ValueError(f"saw a mask of {mask.dtype}; expected bool (True = visible) or an additive float")
    fits = mask.dim() <= 4 and all(n in (1, f) for n, f in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise ValueError(f"saw a mask {tuple(mask.shape)}; expected one broadcastable to {full}, [B, H, S local, T]")
