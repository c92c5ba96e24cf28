"""The CPU kernels of torch_npu's cache writes against plain loops, and what they refuse.

Shape suffixes: T tokens, H heads, D head size, N blocks, K tokens of a block.
"""

import cppass  # noqa: F401  # before torch: it keeps `import torch` working

# isort: split
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lowering.cann_host.kernels  # noqa: F401

npu = torch.ops.npu
N, K, H, D, T = 3, 4, 2, 5, 6
SLOTS = [7, 0, 11, 3, 2, 8]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def values(*shape: int, dtype: torch.dtype = torch.float32, first: int = 0) -> Tensor:
    """Distinct small integers, exact in bfloat16 up to 256."""
    count = torch.Size(shape).numel()
    return (torch.arange(first, first + count) % 251).to(dtype).view(shape)


def strided(x: Tensor) -> Tensor:
    """The same values as a slice of a wider tensor, as a fused qkv projection gives them."""
    wide = torch.cat([x - 1, x, x + 1], -1)
    part = wide[..., x.shape[-1] : 2 * x.shape[-1]]
    assert not part.is_contiguous()
    return part


def like_meta(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The op's result, after checking its shapes and dtypes against torch_npu's meta function."""
    real = op(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, fake)), strict=True):
        assert (a is None and b is None) or (a.shape == b.shape and a.dtype == b.dtype)
    return real


@dtypes
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_scatter_nd_update_rows(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    cache, rows = values(N * K, H, D, dtype=dtype), strided(values(T, H, D, dtype=dtype, first=100))
    expected = cache.clone()
    for slot, row in zip(SLOTS, rows, strict=True):
        expected[slot] = row
    before = cache.clone()

    out = like_meta(npu.npu_scatter_nd_update, cache, torch.tensor(SLOTS, dtype=index_dtype).view(-1, 1), rows)

    assert torch.equal(out, expected)
    assert torch.equal(cache, before)


def test_scatter_nd_update_deeper_places() -> None:
    cache, rows = values(N, K, D), values(2, 3, D, first=100)
    places = torch.tensor([[[0, 1], [2, 3], [1, 1]], [[0, 0], [1, 0], [2, 2]]])
    expected = cache.clone()
    for i in range(2):
        for j in range(3):
            expected[places[i, j, 0], places[i, j, 1]] = rows[i, j]
    assert torch.equal(like_meta(npu.npu_scatter_nd_update, cache, places, rows), expected)


@dtypes
def test_scatter_nd_update_writes_through_a_view(dtype: torch.dtype) -> None:
    cache_NKHD, rows = values(N, K, H, D, dtype=dtype), strided(values(T, H, D, dtype=dtype, first=100))
    expected = cache_NKHD.clone()
    for slot, row in zip(SLOTS, rows, strict=True):
        expected[slot // K, slot % K] = row

    view = cache_NKHD.view(N * K, H, D)
    out = npu.npu_scatter_nd_update_(view, torch.tensor(SLOTS).view(-1, 1), rows)

    assert torch.equal(cache_NKHD, expected)
    assert out.data_ptr() == cache_NKHD.data_ptr()


@dtypes
@pytest.mark.parametrize("axis", [-2, 1, 2])
def test_scatter_update(dtype: torch.dtype, axis: int) -> None:
    cache, starts = values(3, 6, 7, 4, dtype=dtype), [2, 0, 4]
    dim = axis % 4
    new = strided(values(*(2 if i == dim else n for i, n in enumerate(cache.shape)), dtype=dtype, first=50))
    expected = cache.clone()
    for b, start in enumerate(starts):
        for i in range(2):
            expected[b].select(dim - 1, start + i).copy_(new[b].select(dim - 1, i))
    before = cache.clone()

    assert torch.equal(like_meta(npu.scatter_update, cache, torch.tensor(starts), new, axis), expected)
    assert torch.equal(cache, before)
    npu.scatter_update_(cache, torch.tensor(starts, dtype=torch.int32), new, axis)
    assert torch.equal(cache, expected)


def test_scatter_update_writes_through_a_view() -> None:
    cache = values(2, H, 6, D)
    view = cache.transpose(1, 2)
    npu.scatter_update_(view, torch.tensor([1, 4]), values(2, 1, H, D, first=200), 1)
    assert torch.equal(cache[0, :, 1], values(2, 1, H, D, first=200)[0, 0])
    assert torch.equal(cache[1, :, 4], values(2, 1, H, D, first=200)[1, 0])
    assert torch.equal(cache[0, :, 2:], values(2, H, 6, D)[0, :, 2:])


def pages(dtype: torch.dtype, slots: list[int], value_size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Arguments of a paged write, and both caches as they must be after it."""
    key, value = strided(values(T, H, D, dtype=dtype)), values(T, H, value_size, dtype=dtype, first=80)
    caches = values(N, K, H, D, dtype=dtype, first=7), values(N, K, H, value_size, dtype=dtype, first=30)
    expected = caches[0].clone(), caches[1].clone()
    for t, slot in enumerate(slots):
        if slot >= 0:
            expected[0][slot // K, slot % K] = key[t]
            expected[1][slot // K, slot % K] = value[t]
    return (key, value, *caches, torch.tensor(slots, dtype=torch.int32)), expected


@dtypes
@pytest.mark.parametrize("slots", [SLOTS, [7, -1, 11, 3, -1, -1], [-1] * T], ids=["full", "padded", "only padding"])
@pytest.mark.parametrize("value_size", [D, D + 3])
def test_paged_writes(dtype: torch.dtype, slots: list[int], value_size: int) -> None:
    args, expected = pages(dtype, slots, value_size)
    before = args[2].clone(), args[3].clone()
    out = like_meta(npu.npu_scatter_pa_kv_cache_functional, *args, cache_mode="Norm")
    assert all(map(torch.equal, out, expected))
    assert all(map(torch.equal, args[2:4], before))

    npu.npu_scatter_pa_kv_cache(*args, cache_mode="Norm")
    assert all(map(torch.equal, args[2:4], expected))


@dtypes
def test_atb_paged_write(dtype: torch.dtype) -> None:
    args, expected = pages(dtype, SLOTS, D)
    torch.ops.atb._npu_reshape_and_cache(*args)
    assert all(map(torch.equal, args[2:4], expected))


def test_a_paged_write_goes_through_views() -> None:
    """One tensor for both caches, [N, K, 2, H, D]: neither view of it is contiguous."""
    args, expected = pages(torch.float32, SLOTS, D)
    both = torch.stack([args[2], args[3]], 2)
    npu.npu_scatter_pa_kv_cache(*args[:2], both[:, :, 0], both[:, :, 1], args[4], cache_mode=None)
    assert torch.equal(both, torch.stack(expected, 2))


def nd(cache: Tensor, indices: Any, rows: Tensor) -> Callable[[], Any]:
    return lambda: npu.npu_scatter_nd_update_(cache, torch.as_tensor(indices), rows)


def update(
    cache: Tensor, starts: Any, new: Tensor, axis: int = 1, index_dtype: torch.dtype = torch.int64
) -> Callable[[], Any]:
    return lambda: npu.scatter_update_(cache, torch.as_tensor(starts, dtype=index_dtype), new, axis)


def paged(**changed: Any) -> Callable[[], Any]:
    names = ("key", "value", "key_cache", "value_cache", "slot_mapping")
    given = dict(zip(names, pages(torch.float32, SLOTS, D)[0], strict=True)) | {"cache_mode": "Norm"} | changed
    return lambda: npu.npu_scatter_pa_kv_cache(**given)


x = values
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nd dtype of the input": (nd(x(4, 2).int(), [[0]], x(1, 2).int()), "input of torch.int32"),
    "nd dtypes differ": (nd(x(4, 2), [[0]], x(1, 2).half()), "one dtype"),
    "nd dtype of indices": (nd(x(4, 2), torch.tensor([[0.0]]), x(1, 2)), "indices of torch.float32"),
    "nd one-dimensional indices": (nd(x(4, 2), [0], x(1, 2)), "indices [.., 1 to 2]"),
    "nd places too deep": (nd(x(4, 2), [[0, 0, 0]], x(1)), "indices [.., 1 to 2]"),
    "nd shape of updates": (nd(x(4, 2), [[0]], x(2, 2)), "updates [1, 2]"),
    "nd index too large": (nd(x(4, 2), [[4]], x(1, 2)), "indices from 4 to 4; 0 to 3"),
    "nd negative index": (nd(x(4, 2), [[-1]], x(1, 2)), "indices from -1 to -1; 0 to 3"),
    "update dtype of the data": (update(x(1, 4).long(), [0], x(1, 1).long()), "data of torch.int64"),
    "update dtypes differ": (update(x(1, 4), [0], x(1, 1).half()), "one dtype"),
    "update dtype of indices": (update(x(1, 4), [0], x(1, 1), index_dtype=torch.int16), "indices of torch.int16"),
    "update dims differ": (update(x(1, 4), [0], x(1, 1, 1)), "updates of as many"),
    "update empty": (update(x(1, 4), [0], x(1, 0)), "no empty tensors"),
    "update dims of indices": (update(x(1, 4), [[[0]]], x(1, 1)), "one or two dims"),
    "update along the batch": (update(x(1, 4), [0], x(1, 4), 0), "not its first"),
    "update other sizes": (update(x(1, 4, 3), [0], x(1, 1, 2)), "one update per batch entry"),
    "update index per entry": (update(x(2, 4), [0], x(2, 1)), "one update per batch entry"),
    "update past the end": (update(x(1, 4), [3], x(1, 2)), "indices from 3 to 3; 0 to 2"),
    "pages dtypes differ": (paged(value=x(T, H, D).half()), "one dtype"),
    "pages dtype of slots": (paged(slot_mapping=torch.zeros(T)), "slots of torch.float32"),
    "pages heads differ": (paged(value=x(T, 1, D)), "[T, H, D]"),
    "pages number of slots": (paged(slot_mapping=torch.zeros(2).int()), "one slot per token"),
    "pages flat cache": (paged(key_cache=x(N, K, H * D)), "caches [blocks, block_size, H, D]"),
    "pages other blocks": (paged(value_cache=x(N + 1, K, H, D)), "caches of as many blocks"),
    "pages slot too large": (paged(slot_mapping=torch.full((T,), N * K)), "indices from 12 to 12; 0 to 11"),
    "pages slot below -1": (paged(slot_mapping=torch.full((T,), -2)), "indices from -2 to -2"),
    "pages cache mode": (paged(cache_mode="ND"), "cache_mode='ND'"),
    "atb slots are int32": (
        lambda: torch.ops.atb._npu_reshape_and_cache(*pages(torch.float32, SLOTS, D)[0][:4], torch.tensor(SLOTS)),
        "slots of torch.int64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_the_documentation_says(name: str) -> None:
    call, why = REFUSED[name]
    with pytest.raises(RuntimeError, match=re.escape(why)) as caught:
        call()
    assert not isinstance(caught.value, NotImplementedError)


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "NZ cache": (paged(cache_mode="PA_NZ"), "PA_NZ"),
    "compressed cache": (paged(seq_lens=torch.ones(1).int()), "seq_lens"),
    "4-dimensional keys": (paged(key=x(1, T, H, D), value=x(1, T, H, D)), "key of 4 dims"),
    "update by pairs": (update(x(1, 4), [[0, 1]], x(1, 1)), "two-dimensional indices"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_no_host_kernel(name: str) -> None:
    call, why = UNSUPPORTED[name]
    with pytest.raises(NotImplementedError, match=re.escape(why)):
        call()
