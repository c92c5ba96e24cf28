"""CPU kernels of the ops that write key/value caches.

Shape suffixes: T tokens, H key/value heads, D head size, N blocks of a paged cache, K tokens of a block.

    op                                           what it writes
    npu_scatter_nd_update[_]                     x[tuple(indices[i])] = updates[i]
    scatter_update[_]                            x[b] along axis, from indices[b] on, = updates[b]
    npu_scatter_pa_kv_cache[_functional]         cache_NKHD[slot // K, slot % K] = key_THD, the same for value
    atb::_npu_reshape_and_cache                  the same

An op without a trailing underscore (or with `_functional`) leaves its inputs alone. Any strides are right: the source
may be a slice of a wider tensor, the cache a view of another. Indices outside of the cache are refused, where an NPU
writes elsewhere; what duplicate indices leave behind is undefined, as on an NPU. Numerics: bitwise, values are moved.

Source: `torch_npu/_op_plugin_docs.py` of torch_npu 2.13.0; `scatter_update` by op-plugin's own test. float64 is taken
beside the documented dtypes, so that tests can be exact. Slot -1 is skipped: the documentation starts at 0, but
vLLM-Ascend pads its slot mappings with -1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowering.cann_host.kernels.library import kernel, reject

_INDICES = (torch.int32, torch.int64)
_ND = (torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8, torch.float64)
_UPDATE = (torch.int8, torch.float16, torch.float32, torch.bfloat16, torch.int32, torch.float64)


@kernel("npu_scatter_nd_update_")
def scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Rows (or deeper slices) of `x` at the given places, in place.

    Args:
        x: [X0, .., Xn], the cache; often a view [N * K, H, D].
        indices: [.., a] int32 or int64, a <= n + 1: the first a coordinates of each place.
        updates: [.., Xa, .., Xn], one slice per place.

    Raises:
        RuntimeError: shapes, dtypes or indices that the op's documentation forbids.
    """
    op = "npu_scatter_nd_update"
    seen = f"input {list(x.shape)}, indices {list(indices.shape)}, updates {list(updates.shape)}"
    _require(x.dtype in _ND, op, f"input of {x.dtype}")
    _same_dtype(op, x, updates)
    _require(indices.dtype in _INDICES, op, f"indices of {indices.dtype}; int32 or int64")
    _require(1 <= x.dim() <= 8, op, f"{seen}; an input of 1 to 8 dims")
    _require(indices.dim() >= 2 and 1 <= indices.shape[-1] <= x.dim(), op, f"{seen}; indices [.., 1 to {x.dim()}]")
    depth = indices.shape[-1]
    expected = indices.shape[:-1] + x.shape[depth:]
    _require(updates.shape == expected, op, f"{seen}; updates {list(expected)}")
    places = indices.long().unbind(-1)
    for dim, place in enumerate(places):
        _in_range(op, place, x.shape[dim])
    x[places] = updates
    return x


@kernel("npu_scatter_nd_update")
def scatter_nd_update(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """`scatter_nd_update_` on a copy."""
    return scatter_nd_update_(_copy(x), indices, updates)


@kernel("scatter_update_")
def scatter_update_(x: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """A run of positions along `axis` for each batch entry, in place.

    before:  cache [B, S, F], indices [B], updates [B, s, F], axis -2
    after:   cache[b, indices[b] : indices[b] + s] = updates[b]

    Raises:
        RuntimeError: shapes, dtypes or indices that the op's documentation forbids.
        NotImplementedError: two-dimensional indices, whose meaning the documentation does not give.
    """
    op = "scatter_update"
    seen = f"data {list(x.shape)}, indices {list(indices.shape)}, updates {list(updates.shape)}, axis {axis}"
    _require(x.dtype in _UPDATE, op, f"data of {x.dtype}")
    _same_dtype(op, x, updates)
    _require(indices.dtype in _INDICES, op, f"indices of {indices.dtype}; int32 or int64")
    _require(2 <= x.dim() <= 8 and updates.dim() == x.dim(), op, f"{seen}; data of 2 to 8 dims and updates of as many")
    _require(min(x.numel(), indices.numel(), updates.numel()) > 0, op, f"{seen}; no empty tensors")
    _require(indices.dim() in (1, 2), op, f"{seen}; indices of one or two dims")
    if indices.dim() == 2:
        raise NotImplementedError(f"{op}: no host kernel for two-dimensional indices ({seen})")
    _require(-x.dim() <= axis < x.dim() and axis % x.dim() > 0, op, f"{seen}; an axis of the data, not its first")
    axis %= x.dim()
    fits = all(u == d for i, (u, d) in enumerate(zip(updates.shape, x.shape, strict=True)) if i not in (0, axis))
    _require(fits and len(indices) == len(updates) <= len(x), op, f"{seen}; one index and one update per batch entry")
    count = updates.shape[axis]
    _in_range(op, indices, x.shape[axis] - count + 1)
    for number, start in enumerate(indices.tolist()):
        x[number].narrow(axis - 1, start, count).copy_(updates[number])
    return x


@kernel("scatter_update")
def scatter_update(x: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """`scatter_update_` on a copy."""
    return scatter_update_(_copy(x), indices, updates, axis)


@kernel("npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Key and value rows into the slots of paged caches, in place.

    Args:
        key, value: [T, H, D] each with its own D.
        key_cache, value_cache: [N, K, H, D], of the same dtype.
        slot_mapping: int32 or int64 [T], block * K + offset; -1 is skipped.
        cache_mode: "Norm" or None. The op's default is the NZ layout, which has no host kernel.

    Raises:
        RuntimeError: shapes, dtypes or slots that the op's documentation forbids.
        NotImplementedError: the NZ layout, or compressed caches.
    """
    op = "npu_scatter_pa_kv_cache"
    _require(cache_mode in ("Norm", "PA_NZ", None), op, f"cache_mode={cache_mode!r}; 'Norm' or 'PA_NZ'")
    if cache_mode == "PA_NZ":
        raise NotImplementedError(f"{op}: no host kernel for cache_mode='PA_NZ' (its default); pass cache_mode='Norm'")
    compressed = {
        "compress_lens": compress_lens,
        "compress_seq_offsets": compress_seq_offsets,
        "seq_lens": seq_lens,
    }
    asked = [name for name, given in compressed.items() if given is not None]
    if asked or key.dim() == 4:
        raise NotImplementedError(f"{op}: no host kernel for compressed caches ({', '.join(asked) or 'key of 4 dims'})")
    _write_pages(op, key, value, key_cache, value_cache, slot_mapping, _INDICES)


@kernel("npu_scatter_pa_kv_cache_functional")
def scatter_pa_kv_cache_functional(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> tuple[Tensor, Tensor]:
    """`scatter_pa_kv_cache` on copies of the caches."""
    key_cache, value_cache = _copy(key_cache), _copy(value_cache)
    scatter_pa_kv_cache(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        compress_lens=compress_lens,
        compress_seq_offsets=compress_seq_offsets,
        seq_lens=seq_lens,
        cache_mode=cache_mode,
    )
    return key_cache, value_cache


@kernel("atb::_npu_reshape_and_cache")
def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    """The ATB form of `scatter_pa_kv_cache` in "Norm" layout; `slot_indices` is int32 [T].

    Raises:
        RuntimeError: shapes, dtypes or slots that do not fit.
    """
    _write_pages("_npu_reshape_and_cache", key, value, key_cache, value_cache, slot_indices, (torch.int32,))


def _write_pages(
    op: str,
    key_THD: Tensor,
    value_THD: Tensor,
    key_NKHD: Tensor,
    value_NKHD: Tensor,
    slots_T: Tensor,
    slot_dtypes: tuple[torch.dtype, ...],
) -> None:
    seen = f"key {list(key_THD.shape)}, value {list(value_THD.shape)}, slots {list(slots_T.shape)}"
    seen += f", key cache {list(key_NKHD.shape)}, value cache {list(value_NKHD.shape)}"
    for x in (value_THD, key_NKHD, value_NKHD):
        _same_dtype(op, key_THD, x)
    _require(slots_T.dtype in slot_dtypes, op, f"slots of {slots_T.dtype}")
    _require(
        key_THD.dim() == value_THD.dim() == 3 and key_THD.shape[:2] == value_THD.shape[:2], op, f"{seen}; [T, H, D]"
    )
    _require(slots_T.shape == key_THD.shape[:1], op, f"{seen}; one slot per token")
    for x, cache in ((key_THD, key_NKHD), (value_THD, value_NKHD)):
        _require(cache.dim() == 4 and cache.shape[2:] == x.shape[1:], op, f"{seen}; caches [blocks, block_size, H, D]")
    _require(key_NKHD.shape[:2] == value_NKHD.shape[:2], op, f"{seen}; caches of as many blocks")
    written = slots_T != -1
    slots = slots_T[written].long()
    _in_range(op, slots, math.prod(key_NKHD.shape[:2]))
    block, offset = slots // key_NKHD.shape[1], slots % key_NKHD.shape[1]
    for x, cache in ((key_THD, key_NKHD), (value_THD, value_NKHD)):
        cache[block, offset] = x[written]


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.preserve_format)


def _same_dtype(op: str, x: Tensor, other: Tensor) -> None:
    _require(x.dtype == other.dtype, op, f"dtypes {x.dtype} and {other.dtype} in one call; one dtype")


def _in_range(op: str, indices: Tensor, size: int) -> None:
    if indices.numel() > 0:
        low, high = (int(n) for n in indices.aminmax())
        _require(low >= 0 and high < size, op, f"indices from {low} to {high}; 0 to {size - 1}")


def _require(holds: bool, op: str, why: str) -> None:
    if not holds:
        reject(op, why)
