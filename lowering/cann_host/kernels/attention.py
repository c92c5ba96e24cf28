"""CPU kernels of `npu_fused_infer_attention_score` (v1, v2 and torchair's tensor-length forms).

Shape suffixes: B sequences, S query rows of one (padded) sequence, T query rows of all sequences, M rows of one
sequence, U key rows of all sequences, L key rows of one sequence, H query heads, G key/value heads, R = H // G,
D query/key head size, E value head size, N blocks of a paged cache, K tokens of a block.

Every layout becomes rows, and every sequence a span of rows and its keys::

    layout                query                  rows of sequence b             keys of sequence b
    TND                   [T, H, D]              q[cum[b-1]:cum[b]]             k[cum[b-1]:cum[b]], cumulative too
    BSH, BSND             [B, S, H*D] / .. H, D  q[b, :lens[b]]                 k[b, :kv_lens[b]]
    BNSD, BNSD_BSND       [B, H, S, D]           q[b, :, :lens[b]]              k[b, :, :kv_lens[b]]
    any, block_table      as above               as above                       blocks table[b] of [N, K, G*D] or
                                                                                [N, G, K, D], first kv_lens[b] rows

and a sparse mode is a band: row i of M sees key j of L where ``i + low <= j <= i + high``::

    mode                          low               high              mask
    0, no mask                    none              none              -
    0, mask                       -pre_tokens       next_tokens       also hides (origin top-left)
    1                             none              none              hides
    2 left-up causal              none              0                 the [2048, 2048] triangle, or the op fails
    3 right-down causal           none              L - M             same
    4 band, from bottom-right     L - M - pre       L - M + next      same

Source: `torch_npu/_op_plugin_docs.py` of torch_npu 2.13.0; what it forbids is refused, what it calls undefined is not
computed quietly. One relaxation: float32 and float64 are accepted, so that tests can be exact (an NPU takes float16 and
bfloat16). Limits of single products (TND with bfloat16 and head size 128 or 192 alone) and contiguity are not enforced.
Numerics: softmax in float32 (float64 for float64 inputs), rounded once at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowering.cann_host.kernels.library import kernel, reject

__all__ = ["register_air"]

_HOST_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)
_LAYOUTS = {"TND": 3, "BSH": 3, "BSND": 4, "BNSD": 4, "BNSD_BSND": 4}  # dims of the query
_TRIANGLE = 2048
_SCORES = 1 << 23  # scores held at a time: 32 MB of float32, and as much again for their exponentials

_SAME = {n: n for n in ("atten_mask", "block_table", "pre_tokens", "next_tokens", "sparse_mode", "block_size")}
_SAME |= {"inner_precise": "inner_precise", "input_layout": "layout", "num_key_value_heads": "kv_heads"}
_V1 = _SAME | {
    "actual_seq_lengths": "q_lens",
    "actual_seq_lengths_kv": "kv_lens",
    "num_heads": "heads",
    "scale": "scale",
    "softmax_lse_flag": "want_lse",
}
_V2 = _SAME | {
    "actual_seq_qlen": "q_lens",
    "actual_seq_kvlen": "kv_lens",
    "num_query_heads": "heads",
    "softmax_scale": "scale",
    "return_softmax_lse": "want_lse",
    "learnable_sink": "sink",
}
OPS = {"npu_fused_infer_attention_score": _V1, "npu_fused_infer_attention_score_v2": _V2}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of either version, with the arguments' common names; the defaults are the op's."""

    op: str
    query: Tensor
    key: Tensor
    value: Tensor
    atten_mask: Tensor | None = None
    block_table: Tensor | None = None
    q_lens: Iterable[int] | Tensor | None = None
    kv_lens: Iterable[int] | Tensor | None = None
    heads: int = 1
    kv_heads: int = 0
    scale: float = 1.0
    pre_tokens: int = 2**31 - 1
    next_tokens: int = 2**31 - 1
    layout: str = "BSH"
    sparse_mode: int = 0
    block_size: int = 0
    inner_precise: int = 0
    want_lse: bool = False
    sink: Tensor | None = None

    def require(self, holds: bool, why: str) -> None:
        if not holds:
            reject(self.op, why)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """T rows in all, S of each of the B sequences (None for TND, whose rows are packed); U as the key tensor has it."""

    B: int
    S: int | None
    T: int
    U: int
    H: int
    G: int
    D: int
    E: int

    @property
    def one_row(self) -> bool:
        """Q_S is 1: the decode kernel, which ignores query lengths, pre_tokens and next_tokens."""
        return self.S == 1


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Rows [start, start + M) of the T; `number` counts the sequences, `first_key` their packed keys (TND, dense)."""

    number: int
    start: int
    M: int
    first_key: int
    L: int


def fused_infer_attention(call: Call) -> tuple[Tensor, Tensor]:
    """(attention_out, softmax_lse) of one call, shaped as torch_npu's meta function says.

    attention_out has the query's layout (BNSD_BSND: [B, S, H, E]) and dtype, softmax_lse is float32: [T, H, 1] for TND,
    [B, H, S, 1] otherwise, [0] unless asked for. Padding rows and rows that see no key: out 0, lse +inf. A learnable
    sink adds exp(sink) to the sum, as in op-plugin's own test of v2, and so to the lse (that part is not documented).

    Raises:
        RuntimeError: the op's documentation forbids the call.
        NotImplementedError: a feature of the op that has no host kernel; the argument is named.
    """
    sizes = _sizes(call)
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    out_THE = call.query.new_zeros(sizes.T, sizes.H, sizes.E)
    lse_TH = torch.full((sizes.T, sizes.H), torch.inf, dtype=torch.float32)
    call.require(sizes.B > 0 or sizes.S is not None, "no query lengths; TND needs one for each sequence")
    if call.query.numel() > 0 and sizes.U > 0:
        _check_features(call, sizes)
        sequences = tuple(_sequences(call, sizes))
        _check_mask(call, sizes, sequences)
        q_THD = _rows(call.query, call.layout, sizes.H)
        keys, values = _reader(call, call.key, sizes), _reader(call, call.value, sizes)
        if call.block_table is not None:
            _check_blocks(call, call.block_table, sizes, sequences)
        sink_H = None if call.sink is None else call.sink.to(dtype)
        for one in sequences:
            rows = slice(one.start, one.start + one.M)
            k, v = keys(one).to(dtype), values(one).to(dtype)
            mask = _mask_of(call, sizes, one)
            out, lse = _attend(q_THD[rows].to(dtype), k, v, call.scale, _band(call, sizes, one), mask, sink_H)
            out_THE[rows], lse_TH[rows] = out, lse
    return _shaped(call, sizes, out_THE, lse_TH)


def _attend(
    q_MHD: Tensor,
    k_LGD: Tensor,
    v_LGE: Tensor,
    scale: float,
    band: tuple[int, int],
    hidden_ML: Tensor | None,
    sink_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [M, H, E], lse [M, H]) of one sequence; a few rows at a time, over the keys their band touches."""
    (M, H, D), (L, G, E), (low, high) = q_MHD.shape, v_LGE.shape, band
    out_MHE, lse_MH = q_MHD.new_zeros(M, H, E), q_MHD.new_full((M, H), torch.inf)
    k_GDL, v_GLE = k_LGD.permute(1, 2, 0), v_LGE.transpose(0, 1)
    step = max(1, _SCORES // max(1, H * L))
    for first in range(0, M, step):
        last = min(first + step, M)
        begin, end = max(0, first + low), min(L, last + high)
        if begin >= end:
            continue
        q_GXD = q_MHD[first:last].view(last - first, G, -1, D).permute(1, 2, 0, 3).reshape(G, -1, D)  # X: R * rows
        scores = (q_GXD @ k_GDL[:, :, begin:end]).mul_(scale).view(G, H // G, last - first, end - begin)
        hidden = _outside(first, last, begin, end, band)
        if hidden_ML is not None:
            hidden |= hidden_ML[first:last, begin:end]
        scores.masked_fill_(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        seen = lse != -torch.inf
        if sink_H is not None:
            lse = torch.logaddexp(lse, sink_H.view(G, -1, 1))
        weights = scores.sub_(lse.masked_fill(~seen, 0.0).unsqueeze(-1)).exp_()
        out = (weights.flatten(1, 2) @ v_GLE[:, begin:end]).view(G, H // G, last - first, E)
        out_MHE[first:last] = out.permute(2, 0, 1, 3).flatten(1, 2)
        lse_MH[first:last] = lse.masked_fill(~seen, torch.inf).permute(2, 0, 1).flatten(1, 2)
    return out_MHE, lse_MH


def _outside(first: int, last: int, begin: int, end: int, band: tuple[int, int]) -> Tensor:
    """Rows [first, last) x keys [begin, end): True where the key is outside of the row's band."""
    offset = torch.arange(begin, end) - torch.arange(first, last)[:, None]
    return (offset < band[0]) | (offset > band[1])


def _band(call: Call, sizes: Sizes, one: Sequence) -> tuple[int, int]:
    """(low, high) as in the table above; "none" is a number that no key reaches."""
    none, corner = one.M + one.L, one.L - one.M
    limited = call.sparse_mode == 0 and call.atten_mask is not None and not sizes.one_row
    return {
        0: (-call.pre_tokens, call.next_tokens) if limited else (-none, none),
        1: (-none, none),
        2: (-none, 0),
        3: (-none, corner),
        4: (corner - call.pre_tokens, corner + call.next_tokens),
    }[call.sparse_mode]


def _mask_of(call: Call, sizes: Sizes, one: Sequence) -> Tensor | None:
    """[M, L] bool, True = hidden, of a custom mask (modes 0 and 1)."""
    mask = call.atten_mask
    if mask is None or call.sparse_mode > 1:
        return None
    if mask.dim() == 2:
        mask = mask[one.number][None] if sizes.one_row else mask
    else:
        mask = mask.flatten(0, -3)  # [B or 1, 1, S, L] -> [B or 1, S, L]
        mask = mask[one.number if mask.shape[0] > 1 else 0]
    return mask[: one.M, : one.L].bool()


def _rows(x: Tensor, layout: str, heads: int) -> Tensor:
    """A dense tensor in any layout -> [rows of all sequences, heads, head size]."""
    if layout == "TND":
        return x
    x = x.transpose(1, 2) if layout.startswith("BNSD") else x
    return x.reshape(x.shape[0] * x.shape[1], heads, -1)


def _reader(call: Call, x: Tensor, sizes: Sizes) -> Callable[[Sequence], Tensor]:
    """Key or value -> a function that reads one sequence's [L, G, head size]."""
    if call.block_table is not None:
        table = call.block_table

        def read_blocks(one: Sequence) -> Tensor:
            blocks = x[table[one.number, : -(-one.L // call.block_size)].long()]
            blocks = blocks.transpose(1, 2) if x.dim() == 4 else blocks.view(*blocks.shape[:2], sizes.G, -1)
            return blocks.flatten(0, 1)[: one.L]

        return read_blocks
    rows = _rows(x, call.layout, sizes.G)
    return lambda one: rows[one.first_key : one.first_key + one.L]


def _shaped(call: Call, sizes: Sizes, out_THE: Tensor, lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    lse = lse_TH.unsqueeze(-1)
    if sizes.S is not None:
        out_THE = out_THE.view(sizes.B, sizes.S, sizes.H, sizes.E)
        out_THE = out_THE.flatten(2) if call.layout == "BSH" else out_THE
        out_THE = out_THE.transpose(1, 2).contiguous() if call.layout == "BNSD" else out_THE
        lse = lse.view(sizes.B, sizes.S, sizes.H, 1).transpose(1, 2).contiguous()
    return out_THE, lse if call.want_lse else lse.new_empty(0)


# What the documentation asks for, in the order in which it is needed.


def _sizes(call: Call) -> Sizes:
    """Types, layout and heads; everything about shapes alone."""
    q, k, v, layout = call.query, call.key, call.value, call.layout
    if layout not in _LAYOUTS:
        raise NotImplementedError(f"{call.op}: no host kernel for input_layout={layout!r}; there is for {[*_LAYOUTS]}")
    H, G, paged = call.heads, call.kv_heads or call.heads, call.block_table is not None
    call.require(q.dim() == _LAYOUTS[layout], f"query {list(q.shape)} is not {layout}")
    call.require(q.dtype in _HOST_DTYPES, f"query of {q.dtype}; float16 or bfloat16 (float32 on the host)")
    call.require(q.dtype == k.dtype == v.dtype, f"query {q.dtype}, key {k.dtype}, value {v.dtype}; one dtype")
    call.require(H > 0 and G > 0 and H % G == 0, f"{H} query heads and {G} key/value heads; a multiple")
    call.require(H // G <= 64, f"{H} query heads on {G} key/value heads; at most 64 to one")
    call.require(H <= 256, f"{H} query heads; at most 256")
    if k.dim() == 5:
        raise NotImplementedError(f"{call.op}: no host kernel for an NZ cache, key {list(k.shape)}")

    head_dim = {"TND": 1, "BSND": 2, "BNSD": 1, "BNSD_BSND": 1}
    row_dim = {"TND": 0, "BSH": 1, "BSND": 1, "BNSD": 2, "BNSD_BSND": 2}[layout]
    if layout == "BSH":
        call.require(q.shape[2] % H == 0, f"query {list(q.shape)} does not divide into {H} heads")
    else:
        call.require(q.shape[head_dim[layout]] == H, f"query {list(q.shape)} has not num_heads={H} heads in {layout}")
    D = q.shape[2] // H if layout == "BSH" else q.shape[-1]
    if paged:
        E, keys = _cache_head(call, v, G), k.shape[0]
        call.require(k.shape == v.shape, f"paged key {list(k.shape)} and value {list(v.shape)} differ")
        call.require(_cache_head(call, k, G) == D, f"paged key {list(k.shape)}: not {G} heads of {D}")
    else:
        call.require(k.dim() == v.dim() == q.dim(), f"key {list(k.shape)} and value {list(v.shape)} are not {layout}")
        call.require(
            k.shape == v.shape or (layout == "TND" and k.shape[:2] == v.shape[:2]),
            f"key {list(k.shape)} and value {list(v.shape)} differ",
        )
        heads = k.shape[2] // D if layout == "BSH" and D > 0 else k.shape[head_dim.get(layout, -1)]
        call.require(heads == G or k.numel() == 0, f"key {list(k.shape)} has not {G} heads in {layout}")
        key_dim = k.shape[2] // G if layout == "BSH" else k.shape[-1]
        call.require(key_dim == D, f"query head size {D}, key {list(k.shape)}; one size")
        call.require(layout == "TND" or k.shape[0] == q.shape[0], f"batch of query {q.shape[0]}, of key {k.shape[0]}")
        E, keys = v.shape[2] // G if layout == "BSH" else v.shape[-1], k.shape[row_dim]
    if layout == "TND":
        count = 0 if call.q_lens is None else len(_ints(call.q_lens))
        return Sizes(count, None, q.shape[0], keys, H, G, D, E)
    S = q.shape[row_dim]
    return Sizes(q.shape[0], S, q.shape[0] * S, keys, H, G, D, E)


def _cache_head(call: Call, cache: Tensor, G: int) -> int:
    """The head size of a paged cache [N, K, G * D] or, for BNSD and TND queries, [N, G, K, D]."""
    size = call.block_size
    seen = f"paged cache {list(cache.shape)}, block_size={size}, {G} heads, {call.layout} query"
    if cache.dim() == 3:
        call.require(cache.shape[1] == size and cache.shape[2] % G == 0, f"{seen}; [blocks, block_size, heads * size]")
        call.require(cache.shape[2] <= 65535, f"{seen}; heads * size is at most 65535 in this cache layout")
        return cache.shape[2] // G
    call.require(cache.dim() == 4 and call.layout in ("TND", "BNSD", "BNSD_BSND"), f"{seen}; a cache of 3 dims")
    call.require(tuple(cache.shape[1:3]) == (G, size), f"{seen}; [blocks, heads, block_size, size]")
    return cache.shape[3]


def _check_features(call: Call, sizes: Sizes) -> None:
    """Limits of the kernels behind the op, and the sink's."""
    H, D, E = sizes.H, sizes.D, sizes.E
    packed, one_row = sizes.S is None, sizes.one_row
    call.require(max(D, E) <= 512, f"head sizes {D} and {E}; at most 512")
    call.require(one_row or (D % 16 == 0 and E % 16 == 0), f"head sizes {D} and {E}; multiples of 16")
    wide = call.layout in ("BSH", "BSND") and not one_row
    call.require(not wide or H * D < 65535, f"{H} heads of {D} in {call.layout}; heads * size is below 65535")
    call.require(sizes.B <= 65536, f"{sizes.B} sequences; at most 65536")
    call.require(not packed or sizes.T <= 1 << 20, f"{sizes.T} query rows; TND takes at most 1048576")
    call.require(not one_row or call.layout != "BNSD_BSND", "BNSD_BSND needs more than one query row")
    precise = (0, 1) if one_row else (0, 1, 2, 3)
    call.require(call.inner_precise in precise, f"inner_precise={call.inner_precise}; one of {precise}")
    if call.sink is not None:
        dtypes = (torch.bfloat16, torch.float32, torch.float64)
        call.require(packed, f"learnable_sink with {call.layout}; TND alone")
        call.require(E <= 128, f"learnable_sink with a value head size of {E}; at most 128")
        call.require(call.sink.shape == (H,), f"learnable_sink {list(call.sink.shape)}; [{H}], one per query head")
        call.require(call.sink.dtype in dtypes, f"learnable_sink of {call.sink.dtype}; bfloat16 (float32 on the host)")


def _sequences(call: Call, sizes: Sizes) -> Iterator[Sequence]:
    """The sequences of a call, from its lengths: cumulative in TND, but per sequence for the keys of a paged cache."""
    paged = call.block_table is not None
    kv_name = "lengths of key/value"
    if paged:
        call.require(call.kv_lens is not None, "a block_table needs the key/value lengths")
        width = call.block_table.shape[-1] if call.block_table is not None else 0
        capacity = width * call.block_size
    if sizes.S is None:
        q = _counts(call, "query lengths", call.q_lens, sizes.T)
        if paged:
            kv = _ints(call.kv_lens)
            call.require(len(kv) == len(q), f"{len(kv)} {kv_name} for {len(q)} sequences")
            _check_each(call, f"{kv_name}, per sequence as the cache is paged", kv, capacity)
        else:
            kv = _counts(call, kv_name, call.kv_lens, sizes.U)
            call.require(len(kv) == len(q), f"{len(kv)} {kv_name} for {len(q)} sequences")
    else:
        q = (1,) * sizes.B if sizes.one_row else _spread(call, "query lengths", call.q_lens, sizes.B, sizes.S)
        kv = _spread(call, kv_name, call.kv_lens, sizes.B, capacity if paged else sizes.U)
    row = key = 0
    for number, (M, L) in enumerate(zip(q, kv, strict=True)):
        yield Sequence(number, row, M, key, L)
        row += M if sizes.S is None else sizes.S
        key += L if sizes.S is None else sizes.U


def _counts(call: Call, name: str, cumulative: Iterable[int] | Tensor | None, total: int) -> tuple[int, ...]:
    """Lengths from their running sums, which TND asks for."""
    sums = _ints(cumulative)
    call.require(0 < len(sums) <= 4096, f"{len(sums)} {name}; TND needs 1 to 4096")
    counts = tuple(b - a for a, b in zip((0, *sums), sums, strict=False))
    call.require(min(counts) >= 0, f"{name} {_short(sums)} are not running sums; TND wants them non-decreasing")
    call.require(sums[-1] == total, f"{name} end at {sums[-1]}, of {total} rows")
    return counts


def _spread(call: Call, name: str, lens: Iterable[int] | Tensor | None, count: int, size: int) -> tuple[int, ...]:
    """Lengths of a padded batch: none given (whole rows), one for all, or at least one each."""
    given = (size,) if lens is None else _ints(lens)
    call.require(len(given) == 1 or len(given) >= count, f"{len(given)} {name} for {count} sequences; 1 or {count}")
    given = given * count if len(given) == 1 else given[:count]
    _check_each(call, name, given, size)
    return given


def _check_each(call: Call, name: str, lens: tuple[int, ...], size: int) -> None:
    call.require(all(0 <= n <= size for n in lens), f"{name} {_short(lens)} are not all in 0..{size}")


def _ints(lens: Iterable[int] | Tensor | None) -> tuple[int, ...]:
    if lens is None:
        return ()
    return tuple(int(n) for n in (lens.flatten().tolist() if isinstance(lens, Tensor) else lens))


def _short(numbers: tuple[int, ...]) -> str:
    return str([*numbers]) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8]))}, ...]"


def _check_blocks(call: Call, table: Tensor, sizes: Sizes, sequences: tuple[Sequence, ...]) -> None:
    """The block table, before it is read."""
    size, blocks = call.block_size, call.key.shape[0]
    decode = all(one.M <= 1 for one in sequences)
    step = 16 if decode else 128
    call.require(
        0 < size <= 512 and size % step == 0,
        f"block_size={size}; a multiple of {step} up to 512 ({'decode' if decode else 'more than one query row'})",
    )
    call.require(table.dtype == torch.int32 and table.dim() == 2, f"block_table {table.dtype} of {table.dim()} dims")
    call.require(table.shape[0] == sizes.B, f"block_table of {table.shape[0]} rows for {sizes.B} sequences")
    used = [-(-one.L // size) for one in sequences]
    call.require(sum(used) <= blocks, f"the sequences need {sum(used)} blocks, the cache has {blocks}")
    for one, count in zip(sequences, used, strict=True):
        ids = table[one.number, :count]
        valid = bool(((ids >= 0) & (ids < blocks)).all())
        call.require(
            valid, f"block_table row {one.number} names a block outside of 0..{blocks - 1}: {ids.tolist()[:8]}"
        )


def _check_mask(call: Call, sizes: Sizes, sequences: tuple[Sequence, ...]) -> None:
    mode, mask = call.sparse_mode, call.atten_mask
    modes = (0, 1, 2, 3, 4) if sizes.S is not None else (0, 3, 4)
    call.require(mode in modes, f"sparse_mode={mode} with {call.layout}; one of {modes}")
    call.require(not sizes.one_row or mode not in (2, 4), f"sparse_mode={mode} has no effect on one query row; pass 0")
    if mask is not None:
        call.require(mask.dtype in _MASK_DTYPES, f"atten_mask of {mask.dtype}; bool, int8 or uint8")
    if mode >= 2:
        shapes = [(1,) * ones + (_TRIANGLE, _TRIANGLE) for ones in (0, 1, 2)]
        seen = None if mask is None else list(mask.shape)
        fits = mask is not None and tuple(mask.shape) in shapes
        call.require(fits, f"atten_mask {seen} with sparse_mode={mode}; [2048, 2048]")
        if mask is not None:
            causal = torch.equal(mask.view(_TRIANGLE, _TRIANGLE).bool(), _triangle())
            call.require(causal, f"atten_mask with sparse_mode={mode} must hide exactly what is above the diagonal")
    elif mask is not None:
        _check_custom_mask(call, sizes, mask)
    else:
        call.require(mode == 0, "sparse_mode=1 needs an atten_mask")
    if mode == 3:
        for one in sequences:
            call.require(one.M <= one.L, f"sparse_mode=3, sequence {one.number}: {one.M} rows but {one.L} keys")
    if mode == 4:
        pre, post = call.pre_tokens, call.next_tokens
        call.require(pre + post >= 0, f"pre_tokens={pre} + next_tokens={post} is negative: an empty band")
        for one in sequences:
            fits = pre >= -one.M and post >= -one.L
            call.require(fits, f"sequence {one.number}: pre_tokens={pre} < -{one.M} or next_tokens={post} < -{one.L}")


def _check_custom_mask(call: Call, sizes: Sizes, mask: Tensor) -> None:
    """[S, U] (one row: [B, U]), [1 or B, S, U] or [1 or B, 1, S, U]; S and U may be rounded up to a multiple of 32."""
    call.require(sizes.S is not None, "an atten_mask with sparse_mode=0 in TND")
    B, S, shape = sizes.B, sizes.S or 0, tuple(mask.shape)
    paged = call.block_table is not None
    keys = call.block_table.shape[-1] * call.block_size if call.block_table is not None else sizes.U
    rows = (B, B) if mask.dim() == 2 and sizes.one_row else (S, _up(S))
    call.require(
        2 <= mask.dim() <= 4
        and rows[0] <= shape[-2] <= rows[1]
        and keys <= shape[-1]
        and (paged or shape[-1] <= _up(keys))
        and (mask.dim() < 3 or shape[0] in (1, B))
        and (mask.dim() < 4 or shape[1] == 1),
        f"atten_mask {list(shape)}, {B} sequences of {S} rows and {keys} keys; [S, U], [B, S, U] or [B, 1, S, U]",
    )


def _up(n: int) -> int:
    return -(-n // 32) * 32


@functools.cache
def _triangle() -> Tensor:
    return torch.ones(_TRIANGLE, _TRIANGLE, dtype=torch.bool).triu(1)


# Registration: the same body under each op's own argument names.


def _call(op: str, names: dict[str, str], query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Call:
    """The dispatcher hands over what differs from the defaults, so any other name is a feature that is asked for."""
    unknown = [name for name, seen in given.items() if name not in names and seen is not None]
    if unknown:
        raise NotImplementedError(f"{op}: no host kernel for {', '.join(unknown)}")
    return Call(op, query, key, value, **{names[name]: seen for name, seen in given.items() if name in names})


def _register(op: str, names: dict[str, str]) -> None:
    @kernel(op)
    def functional(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return fused_infer_attention(_call(op, names, query, key, value, given))

    @kernel(f"{op}.out")
    def out_variant(
        query: Tensor, key: Tensor, value: Tensor, *, out: list[Tensor], workspace: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        # Returns tensors of its own: the schema does not declare `out` as aliased, and torch warns of returning it.
        results = functional(query, key, value, **given)
        for target, result in zip(out, results, strict=True):
            if target.shape != result.shape or target.dtype != result.dtype:
                reject(f"{op}.out", f"out {list(target.shape)} {target.dtype}; {list(result.shape)} {result.dtype}")
            target.copy_(result)
        return results

    @kernel(f"_{op}_get_max_workspace")
    def max_workspace(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        """The host kernel needs none: [0] of the query's dtype."""
        return query.new_empty(0)


@functools.cache
def register_air() -> None:
    """CPU kernels for `torch.ops.air.npu_fused_infer_attention_score[_v2]`, whose lengths are tensors.

    torchair defines these ops when `torchair.ops` is first used, with CPU kernels that only raise; so this imports
    torchair's definitions and replaces those kernels. Call it after torchair became importable; again does nothing.

    Raises:
        ImportError: torchair cannot be imported.
    """
    for op, names in OPS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations, met while torchair is imported
            importlib.import_module(f"torchair.ops._{op}")

        def tensor_lengths(
            query: Tensor, key: Tensor, value: Tensor, *, op: str = op, names: dict[str, str] = names, **given: Any
        ) -> tuple[Tensor, Tensor]:
            return fused_infer_attention(_call(f"air.{op}", names, query, key, value, given))

        kernel(f"air::{op}")(tensor_lengths)


for _op, _names in OPS.items():
    _register(_op, _names)
