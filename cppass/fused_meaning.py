"""The meaning of cppass::fused_attention: each row of a rank sees the keys that it sees on one device.

Written from the op's documentation and the layout alone, without halves: it is what the two calls are checked against.

Shape suffixes: R rows, K keys of one sequence, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from cppass.layout import Zigzag

PER_RANK = 8  # leading arguments of the op that differ from rank to rank


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """Natural rows [first, first + rows) of batch entry `batch`, and the keys and values [K, G, D] they attend over."""

    batch: int
    first: int
    rows: int
    keys: Tensor
    values: Tensor


def fused_attention(
    qs: list[Tensor],
    ks: list[Tensor],
    vs: list[Tensor],
    masks: list[Tensor | None],
    block_tables: list[Tensor | None],
    sinks: list[Tensor | None],
    q_tensors: list[Tensor | None],
    kv_tensors: list[Tensor | None],
    q_lengths: list[int] | None,
    kv_lengths: list[int] | None,
    lengths: list[int],
    cp_size: int,
    even: bool,
    op: str,
    input_layout: str,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    block_size: int,
    inner_precise: int,
    lse: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Attention of each rank's rows over whole keys and values: (output, log-sum-exp) like the op's, padding rows 0."""
    layout, results = Zigzag(tuple(lengths), cp_size, even), []
    for rank, q in enumerate(qs):
        given = ks[rank], vs[rank], masks[rank], block_tables[rank], sinks[rank]
        ends = _ints(q_tensors[rank], q_lengths), _ints(kv_tensors[rank], kv_lengths)
        results.append(
            attend(
                layout, rank, q, *given, *ends, input_layout, num_heads, num_key_value_heads, scale, sparse_mode,
                pre_tokens, lse,
            )
        )  # fmt: skip
    return results


def attend(
    layout: Zigzag,
    rank: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    block_table: Tensor | None,
    sink: Tensor | None,
    q_lengths: list[int] | None,
    kv_lengths: list[int] | None,
    input_layout: str,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    sparse_mode: int,
    pre_tokens: int,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of one rank's rows; keys and values are a paged cache, or dense in natural order."""
    q_BRND = _rows_first(q, input_layout, num_heads)
    out_BRND, sums_BRN = torch.zeros_like(q_BRND), q_BRND.new_zeros(q_BRND.shape[:3], dtype=torch.float32)
    natural = torch.tensor([-1 if p is None else p for p in layout.positions(rank)])
    groups = num_key_value_heads or num_heads
    keys = _pages(k, block_table, groups), _pages(v, block_table, groups)
    for s in _sequences(*keys, input_layout, layout.tokens, block_table, q_lengths, kv_lengths, groups):
        local = ((natural >= s.first) & (natural < s.first + s.rows)).nonzero().flatten()
        offset = natural[local] - s.first
        seen = _visible(offset, s, sparse_mode, pre_tokens, _own(mask if sparse_mode < 2 else None, s, local))
        out, sums = _attend(q_BRND[s.batch, local], s, seen, scale, sink)
        out_BRND[s.batch, local], sums_BRN[s.batch, local] = out, sums
    return _as_given(out_BRND, input_layout), _lse(sums_BRN, input_layout) if lse else q.new_empty(0)


def _ints(tensor: Tensor | None, given: list[int] | None) -> list[int] | None:
    return given if tensor is None else [int(n) for n in tensor]


def _rows_first(x: Tensor, input_layout: str, heads: int) -> Tensor:
    """[B, rows, heads, D]; B = 1 for TND."""
    if input_layout == "TND":
        return x[None]
    if input_layout == "BNSD":
        return x.transpose(1, 2)
    return x.view(*x.shape[:2], heads, -1) if input_layout == "BSH" else x


def _as_given(x_BRND: Tensor, input_layout: str) -> Tensor:
    if input_layout == "TND":
        return x_BRND[0]
    if input_layout == "BNSD":
        return x_BRND.transpose(1, 2).contiguous()
    return x_BRND.flatten(2) if input_layout == "BSH" else x_BRND


def _lse(sums_BRN: Tensor, input_layout: str) -> Tensor:
    """[T, N, 1] for TND, else [B, N, S, 1]."""
    return sums_BRN[0, :, :, None] if input_layout == "TND" else sums_BRN.transpose(1, 2)[..., None].contiguous()


def _pages(cache: Tensor, block_table: Tensor | None, groups: int) -> Tensor:
    """A paged cache as [blocks, block_size, G, D]; dense keys and values as they are."""
    if block_table is None:
        return cache
    return cache.view(*cache.shape[:2], groups, -1) if cache.dim() == 3 else cache.transpose(1, 2)


def _sequences(
    k: Tensor,
    v: Tensor,
    input_layout: str,
    tokens: int,
    block_table: Tensor | None,
    q_lengths: list[int] | None,
    kv_lengths: list[int] | None,
    groups: int,
) -> Iterator[_Sequence]:
    if input_layout == "TND":
        assert q_lengths is not None and kv_lengths is not None
        starts = [0, *kv_lengths]
        for s, (first, end) in enumerate(itertools.pairwise([0, *q_lengths])):
            if block_table is not None:
                pair = [x[block_table[s].long()].flatten(0, 1)[: kv_lengths[s]] for x in (k, v)]
            else:
                pair = [x[starts[s] : starts[s + 1]] for x in (k, v)]
            yield _Sequence(0, first, end - first, *pair)
        return
    batch = k.shape[0] if block_table is None else block_table.shape[0]
    for b in range(batch):
        rows = [x[block_table[b].long()].flatten(0, 1) if block_table is not None else
                _rows_first(x, input_layout, groups)[b] for x in (k, v)]  # fmt: skip
        kv = rows[0].shape[0] if kv_lengths is None else kv_lengths[b % len(kv_lengths)]
        q = tokens if q_lengths is None else q_lengths[b % len(q_lengths)]
        yield _Sequence(b, 0, q, rows[0][:kv], rows[1][:kv])


def _own(mask: Tensor | None, s: _Sequence, local: Tensor) -> Tensor | None:
    """This batch entry's rows of a mask of local rows: [R, K], True where a key is hidden."""
    if mask is None:
        return None
    rows = mask if mask.dim() == 2 else mask.flatten(0, -3)[s.batch % (mask.shape[0])]
    return rows[local, : s.keys.shape[0]].bool()


def _visible(offset: Tensor, s: _Sequence, sparse_mode: int, pre_tokens: int, hidden: Tensor | None) -> Tensor:
    """Which keys each row sees [R, K]."""
    key, last = torch.arange(s.keys.shape[0]), offset[:, None]
    if sparse_mode in (3, 4):
        last = last + s.keys.shape[0] - s.rows  # bottom-right
    if sparse_mode == 4:
        return (key <= last) & (key >= last - pre_tokens)
    if sparse_mode in (2, 3):
        return key <= last
    return torch.ones(len(offset), len(key), dtype=torch.bool) if hidden is None else ~hidden


def _attend(q_RND: Tensor, s: _Sequence, seen_RK: Tensor, scale: float, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output [R, N, D], log-sum-exp [R, N]); a row that sees nothing gives 0 and inf."""
    repeats = q_RND.shape[1] // s.keys.shape[1]
    wide = torch.promote_types(q_RND.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(repeats, 1) for x in (s.keys, s.values))
    scores = torch.einsum("rnd,knd->rnk", q_RND.to(wide), k) * scale
    scores = scores.masked_fill(~seen_RK[:, None], -torch.inf)
    sums = torch.logsumexp(scores, -1)
    if sink is not None:
        sums = torch.logaddexp(sums, sink.to(wide))
    out = torch.einsum("rnk,knd->rnd", torch.exp(scores - sums[..., None]).nan_to_num(), v)
    return out.to(q_RND.dtype), torch.where(sums == -torch.inf, torch.inf, sums).float()
