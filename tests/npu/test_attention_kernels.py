"""The CPU kernels of npu_fused_infer_attention_score against a softmax written out in fp64, and what they refuse.

Shape suffixes as in lowering/cann_host/kernels/attention.py: B, S, T, M, L, H, G, D, E, N blocks, K tokens of a block.
"""

import cppass  # noqa: F401  # before torch: it keeps `import torch` working

# isort: split
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowering.cann_host.kernels import attention

V1, V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
V2_NAMES = {
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "softmax_lse_flag": "return_softmax_lse",
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
H, G, D, K = 4, 2, 16, 128
SCALE = 0.3
PRE, NEXT = 3, 1
TRIANGLE = torch.ones(2048, 2048).triu(1).bool()
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
versions = pytest.mark.parametrize("op", [V1, V2])


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def visible(mode: int, M: int, L: int) -> Tensor:
    """[M, L], True = seen, one key at a time and by the documentation's words."""
    shift = L - M  # the row's own position when rows and keys end together
    rule: Callable[[int, int], bool] = {
        0: lambda i, j: True,
        2: lambda i, j: j <= i,
        3: lambda i, j: j <= i + shift,
        4: lambda i, j: i + shift - PRE <= j <= i + shift + NEXT,
    }[mode]
    return torch.tensor([[rule(i, j) for j in range(L)] for i in range(M)], dtype=torch.bool).view(M, L)


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[M, H, D], [L, G, D], [L, G, E] -> out [M, H, E] and lse [M, H], head by head in fp64."""
    outs, lses = [], []
    for h in range(q.shape[1]):
        g = h * k.shape[1] // q.shape[1]
        weights = (q[:, h].double() @ k[:, g].double().T * SCALE).exp() * seen
        total = weights.sum(1)
        any_seen = seen.any(1)
        if sink is not None:
            total = total + sink[h].double().exp()
        outs.append(weights @ v[:, g].double() / total.where(any_seen, torch.ones(())).unsqueeze(1))
        lses.append(total.log().where(any_seen, torch.tensor(torch.inf)))
    return torch.stack(outs, 1), torch.stack(lses, 1)


def call(op: str, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """The op with v1's names and this file's heads; shapes and dtypes checked against torch_npu's meta function."""
    given = {"num_heads": H, "num_key_value_heads": G, "scale": SCALE, "softmax_lse_flag": True} | given
    if op == V2:
        given = {V2_NAMES.get(name, name): value for name, value in given.items()}
    kernel = getattr(torch.ops.npu, op)
    real = kernel(q, k, v, **given)
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in given.items()}
        fake = kernel(*(mode.from_tensor(x) for x in (q, k, v)), **fakes)
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    return real


def close(out: Tensor, lse: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=TOLERANCE[out.dtype])
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=2e-6)


def masked(mode: int, **more: Any) -> dict[str, Any]:
    mask = {} if mode == 0 else {"atten_mask": TRIANGLE}
    band = {"pre_tokens": PRE, "next_tokens": NEXT} if mode == 4 else {}
    return {"sparse_mode": mode} | mask | band | more


def running(lens: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(lens))


def packed_reference(
    q: Tensor, k: Tensor, v: Tensor, q_lens: tuple[int, ...], kv_lens: tuple[int, ...], mode: int, **more: Any
) -> tuple[Tensor, Tensor]:
    """TND: out [T, H, E] and lse [T, H, 1]."""
    parts = zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
    results = [reference(a, b, c, visible(mode, len(a), len(b)), **more) for a, b, c in parts]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]).unsqueeze(-1)


Q_LENS, KV_LENS = (5, 1, 9, 0, 3), (7, 4, 9, 2, 20)


@dtypes
@versions
@pytest.mark.parametrize("mode", [0, 3, 4])
def test_tnd_dense_lengths_are_cumulative_on_both_sides(op: str, mode: int, dtype: torch.dtype) -> None:
    q, k, v = rand(18, H, D, dtype=dtype), rand(42, G, D, dtype=dtype), rand(42, G, 2 * D, dtype=dtype)
    given = {"actual_seq_lengths": running(Q_LENS), "actual_seq_lengths_kv": running(KV_LENS)}
    out, lse = call(op, q, k, v, input_layout="TND", **given, **masked(mode))
    close(out, lse, packed_reference(q, k, v, Q_LENS, KV_LENS, mode))


def paged(rows: Tensor, lens: tuple[int, ...], size: int, form: int) -> tuple[Tensor, Tensor]:
    """Packed rows [U, G, D] -> a cache of shuffled blocks, NaN where nothing was written, and its int32 table."""
    counts = [-(-n // size) for n in lens]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(0)).tolist()
    cache = torch.full((len(order), size, *rows.shape[1:]), torch.nan, dtype=rows.dtype)
    table = torch.full((len(lens), max(counts) + 1), -1, dtype=torch.int32)
    for b, part in enumerate(rows.split(lens)):
        for i, piece in enumerate(part.split(size)):
            table[b, i] = order.pop()
            cache[table[b, i], : len(piece)] = piece
    return (cache.flatten(2) if form == 3 else cache.transpose(1, 2).contiguous()), table


@dtypes
@versions
@pytest.mark.parametrize("form", [3, 4], ids=["N,K,G*D", "N,G,K,D"])
@pytest.mark.parametrize("mode", [0, 3, 4])
def test_tnd_paged_key_lengths_are_per_sequence(op: str, mode: int, form: int, dtype: torch.dtype) -> None:
    q_lens, kv_lens = (5, 1, 9), (130, 7, 256)
    q, k, v = rand(15, H, D, dtype=dtype), rand(393, G, D, dtype=dtype), rand(393, G, D, dtype=dtype) + 1
    (keys, table), (values, _) = paged(k, kv_lens, K, form), paged(v, kv_lens, K, form)
    given = {"actual_seq_lengths": running(q_lens), "actual_seq_lengths_kv": list(kv_lens)}
    out, lse = call(op, q, keys, values, input_layout="TND", block_table=table, block_size=K, **given, **masked(mode))
    close(out, lse, packed_reference(q, k, v, q_lens, kv_lens, mode))


TO_LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "BSH": lambda x: x.flatten(2),
    "BSND": lambda x: x,
    "BNSD": lambda x: x.transpose(1, 2).contiguous(),
    "BNSD_BSND": lambda x: x.transpose(1, 2).contiguous(),
}


def padded_reference(
    q: Tensor, k: Tensor, v: Tensor, q_lens: list[int], kv_lens: list[int], seen: Callable[[int, int, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """[B, S, H, E] and [B, H, S, 1]; `seen` of (b, M, L). Padding rows: out 0, lse inf."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full((*q.shape[:3], 1), torch.inf, dtype=torch.float64)
    for b, (M, L) in enumerate(zip(q_lens, kv_lens, strict=True)):
        out[b, :M], lse[b, :M, :, 0] = reference(q[b, :M], k[b, :L], v[b, :L], seen(b, M, L))
    return out, lse.transpose(1, 2)


def check_padded(
    op: str,
    layout: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Any,
    q_lens: Any = None,
    kv_lens: Any = None,
    **given: Any,
) -> None:
    """A padded batch in one layout; None lengths mean whole rows, one length means all."""
    arrange = TO_LAYOUT[layout]
    lens = {"actual_seq_lengths": q_lens, "actual_seq_lengths_kv": kv_lens}
    out, lse = call(op, arrange(q), arrange(k), arrange(v), input_layout=layout, **lens, **given)
    B = len(q)
    q_all = [q.shape[1]] * B if q_lens is None else q_lens * B if len(q_lens) == 1 else q_lens[:B]
    kv_all = [k.shape[1]] * B if kv_lens is None else kv_lens * B if len(kv_lens) == 1 else kv_lens[:B]
    expected = padded_reference(q, k, v, q_all, kv_all, seen)
    back = TO_LAYOUT["BSND" if layout == "BNSD_BSND" else layout]
    close(out, lse, (back(expected[0]), expected[1]))


@dtypes
@versions
@pytest.mark.parametrize("mode", [0, 2, 3, 4])
@pytest.mark.parametrize("layout", TO_LAYOUT)
def test_padded_layouts(op: str, layout: str, mode: int, dtype: torch.dtype) -> None:
    q, k, v = rand(3, 6, H, D, dtype=dtype), rand(3, 9, G, D, dtype=dtype), rand(3, 9, G, D, dtype=dtype) - 1
    for q_lens, kv_lens in ((None, None), ([5], [7]), ([6, 2, 4], [9, 3, 6, 1])):
        check_padded(op, layout, q, k, v, lambda b, M, L: visible(mode, M, L), q_lens, kv_lens, **masked(mode))


@versions
@pytest.mark.parametrize(("layout", "form"), [("BSH", 3), ("BSND", 3), ("BNSD", 3), ("BNSD", 4)])
@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_padded_queries_of_a_paged_cache(op: str, layout: str, form: int, mode: int) -> None:
    kv_lens = (130, 200)
    q, k, v = rand(2, 6, H, D), rand(330, G, D), rand(330, G, D) + 1
    (keys, table), (values, _) = paged(k, kv_lens, K, form), paged(v, kv_lens, K, form)
    given = {"actual_seq_lengths_kv": list(kv_lens), "block_table": table, "block_size": K}
    out, lse = call(op, TO_LAYOUT[layout](q), keys, values, input_layout=layout, **given, **masked(mode))
    k_pad, v_pad = (torch.nn.utils.rnn.pad_sequence(x.split(kv_lens), batch_first=True) for x in (k, v))
    expected = padded_reference(q, k_pad, v_pad, [6, 6], list(kv_lens), lambda b, M, L: visible(mode, M, L))
    close(out, lse, (TO_LAYOUT[layout](expected[0]), expected[1]))


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(6, 9), (1, 6, 9), (3, 6, 9), (1, 1, 6, 9), (3, 1, 6, 9), (3, 1, 32, 16)])
def test_custom_masks(shape: tuple[int, ...], dtype: torch.dtype, mode: int) -> None:
    """A row whose keys are all hidden comes out as 0 with lse inf."""
    q, k, v = rand(3, 6, H, D), rand(3, 9, G, D), rand(3, 9, G, D) - 1
    hidden = rand(*shape) > 0.3
    hidden[..., 2, :] = True
    full = hidden.view(-1, *shape[-2:]).expand(3, -1, -1)
    for layout, q_lens, kv_lens in (("BSH", None, None), ("BNSD", [6, 2, 4], [9, 3, 6])):
        args = (lambda b, M, L: ~full[b, :M, :L], q_lens, kv_lens)
        check_padded(V1, layout, q, k, v, *args, atten_mask=hidden.to(dtype), sparse_mode=mode)


@versions
def test_mode_0_with_a_mask_counts_its_tokens_from_the_top_left(op: str) -> None:
    q, k, v = rand(2, 9, H, D), rand(2, 6, G, D), rand(2, 6, G, D) - 1
    hidden = rand(9, 6) > 0.8
    i, j = torch.arange(9)[:, None], torch.arange(6)
    band = (j >= i - PRE) & (j <= i + NEXT)
    given = {"atten_mask": hidden, "pre_tokens": PRE, "next_tokens": NEXT}
    check_padded(op, "BSND", q, k, v, lambda b, M, L: band[:M, :L] & ~hidden[:M, :L], [9, 7], [6, 4], **given)
    whole = given | {"sparse_mode": 1}
    check_padded(op, "BSND", q, k, v, lambda b, M, L: ~hidden[:M, :L], [9, 7], [6, 4], **whole)
    without = given | {"atten_mask": None}
    check_padded(op, "BSND", q, k, v, lambda b, M, L: visible(0, M, L), [9, 7], [6, 4], **without)


@versions
def test_one_query_row_ignores_tokens_and_query_lengths(op: str) -> None:
    q, k, v = rand(3, 1, H, D), rand(3, 9, G, D), rand(3, 9, G, D) - 1
    hidden = rand(3, 9) > 0.5
    given = {"atten_mask": hidden, "pre_tokens": 0, "next_tokens": 0, "actual_seq_lengths": [0]}
    out, lse = call(op, q, k, v, input_layout="BSND", actual_seq_lengths_kv=[9, 4, 6], **given)
    close(out, lse, padded_reference(q, k, v, [1] * 3, [9, 4, 6], lambda b, M, L: ~hidden[b : b + 1, :L]))


@dtypes
@pytest.mark.parametrize("layout", ["TND", "BNSD"])
def test_decode_takes_small_blocks(layout: str, dtype: torch.dtype) -> None:
    kv_lens = (17, 1, 32)
    q, k, v = rand(3, 1, H, D, dtype=dtype), rand(50, G, D, dtype=dtype), rand(50, G, D, dtype=dtype) + 1
    (keys, table), (values, _) = paged(k, kv_lens, 16, 3), paged(v, kv_lens, 16, 3)
    q_in = q.squeeze(1) if layout == "TND" else q.transpose(1, 2).contiguous()
    given = {"actual_seq_lengths": [1, 2, 3], "actual_seq_lengths_kv": list(kv_lens)}
    out, lse = call(V1, q_in, keys, values, input_layout=layout, block_table=table, block_size=16, **given, **masked(3))
    expected = packed_reference(q.squeeze(1), k, v, (1, 1, 1), kv_lens, 3)
    close(out.view(3, H, D), lse.view(3, H, 1), expected)


@dtypes
@pytest.mark.parametrize("mode", [0, 3, 4])
def test_learnable_sink_joins_the_softmax_and_the_lse(mode: int, dtype: torch.dtype) -> None:
    q, k, v = rand(18, H, D, dtype=dtype), rand(42, G, D, dtype=dtype), rand(42, G, D, dtype=dtype) + 1
    sink = rand(H, dtype=torch.bfloat16) * 2
    given = {"actual_seq_lengths": running(Q_LENS), "actual_seq_lengths_kv": running(KV_LENS), "learnable_sink": sink}
    out, lse = call(V2, q, k, v, input_layout="TND", **given, **masked(mode))
    close(out, lse, packed_reference(q, k, v, Q_LENS, KV_LENS, mode, sink=sink))


@versions
def test_one_key_head_for_each_query_head_by_default(op: str) -> None:
    q, k, v = rand(2, 6, H, D), rand(2, 9, H, D), rand(2, 9, H, D) - 1
    check_padded(op, "BSH", q, k, v, lambda b, M, L: visible(0, M, L), num_key_value_heads=0)


@versions
@pytest.mark.parametrize("layout", ["TND", "BSH", "BNSD"])
def test_without_lse_it_is_empty(op: str, layout: str) -> None:
    q, k = rand(2, 6, H, D), rand(2, 6, G, D)
    arrange = TO_LAYOUT.get(layout, lambda x: x.flatten(0, 1))
    lens = {"actual_seq_lengths": [6, 12], "actual_seq_lengths_kv": [6, 12]} if layout == "TND" else {}
    out, lse = call(op, arrange(q), arrange(k), arrange(k), input_layout=layout, softmax_lse_flag=False, **lens)
    assert lse.shape == (0,) and lse.dtype == torch.float32
    assert out.shape == arrange(q).shape


def test_no_keys_give_zeros_and_no_rows_give_nothing() -> None:
    out, lse = call(V1, rand(2, 6, H, D), rand(2, 0, G, D), rand(2, 0, G, D), input_layout="BSND")
    assert not out.any() and bool((lse == torch.inf).all())
    lens = {"actual_seq_lengths": [0], "actual_seq_lengths_kv": [4]}
    out, lse = call(V1, rand(0, H, D), rand(4, G, D), rand(4, G, D), input_layout="TND", **lens)
    assert out.shape == (0, H, D) and lse.shape == (0, H, 1)


def test_a_sequence_without_keys() -> None:
    q, k = rand(5, H, D), rand(4, G, D)
    lens = {"actual_seq_lengths": [2, 5], "actual_seq_lengths_kv": [4, 4]}
    out, lse = call(V1, q, k, k, input_layout="TND", **lens)
    close(out[:2], lse[:2], packed_reference(q[:2], k, k, (2,), (4,), 0))
    assert not out[2:].any() and bool((lse[2:] == torch.inf).all())


def test_strided_inputs_are_right() -> None:
    qkv = rand(12, (H + 2 * G) * D)
    q, k, v = (x.view(12, -1, D) for x in qkv.split([H * D, G * D, G * D], 1))
    assert not k.is_contiguous()
    lens = {"actual_seq_lengths": [5, 12], "actual_seq_lengths_kv": [5, 12]}
    out, lse = call(V1, q, k, v, input_layout="TND", **lens, **masked(3))
    close(out, lse, packed_reference(q, k, v, (5, 7), (5, 7), 3))


@pytest.mark.parametrize("mode", [0, 3, 4])
def test_scores_are_held_a_few_rows_at_a_time(mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORES", 2 * H * 20)
    q, k, v = rand(18, H, D), rand(42, G, D), rand(42, G, D) + 1
    given = {"actual_seq_lengths": running(Q_LENS), "actual_seq_lengths_kv": running(KV_LENS)}
    out, lse = call(V1, q, k, v, input_layout="TND", **given, **masked(mode))
    close(out, lse, packed_reference(q, k, v, Q_LENS, KV_LENS, mode))


@versions
def test_out_variant_and_workspace(op: str) -> None:
    """What npugraph_ex replaces the call with: same arguments, a workspace, and outputs made by torch.empty."""
    q, k, v = rand(2, 6, H * D), rand(2, 9, G * D), rand(2, 9, G * D) - 1
    given = {"num_heads": H, "num_key_value_heads": G, "scale": SCALE, "softmax_lse_flag": True}
    if op == V2:
        given = {V2_NAMES.get(name, name): value for name, value in given.items()}
    packet = getattr(torch.ops.npu, op)
    expected = packet(q, k, v, **given)
    workspace = getattr(torch.ops.npu, f"_{op}_get_max_workspace")(q, k, v, **given)
    assert workspace.dim() == 1 and workspace.dtype == q.dtype

    outs = [torch.empty_like(x) for x in expected]
    returned = packet.out(q, k, v, **given, workspace=workspace, out=outs)
    assert all(map(torch.equal, outs, expected))
    assert all(map(torch.equal, returned, expected))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(returned, outs, strict=True))
    with pytest.raises(RuntimeError, match=r"out \[1\]"):
        packet.out(q, k, v, **given, out=[torch.empty(1), outs[1]])


@versions
def test_torchair_form_takes_lengths_as_tensors(op: str) -> None:
    attention.register_air()
    attention.register_air()
    q, k, v = rand(18, H, D), rand(42, G, D), rand(42, G, D) + 1
    names = V2_NAMES if op == V2 else dict.fromkeys(V2_NAMES)
    given = {"num_heads": H, "num_key_value_heads": G, "scale": SCALE, "softmax_lse_flag": True, **masked(3)}
    given |= {"actual_seq_lengths": torch.tensor(running(Q_LENS)), "input_layout": "TND"}
    given |= {"actual_seq_lengths_kv": torch.tensor(running(KV_LENS))}
    given = {names.get(name) or name: value for name, value in given.items()}
    out, lse = getattr(torch.ops.air, op)(q, k, v, **given)
    close(out, lse, packed_reference(q, k, v, Q_LENS, KV_LENS, 3))


def tnd(op: str = V1, **changed: Any) -> Callable[[], Any]:
    """A legal TND call with something changed."""
    q, k = rand(6, H, D), rand(9, G, D)
    given = {
        "q": q,
        "k": k,
        "v": k,
        "input_layout": "TND",
        "actual_seq_lengths": [2, 6],
        "actual_seq_lengths_kv": [3, 9],
    }
    return lambda: call(op, **given | changed)


def batch(op: str = V1, layout: str = "BSND", rows: int = 6, **changed: Any) -> Callable[[], Any]:
    """A legal padded call with something changed."""
    q, k = TO_LAYOUT[layout](rand(2, rows, H, D)), TO_LAYOUT[layout](rand(2, 9, G, D))
    return lambda: call(op, **{"q": q, "k": k, "v": k, "input_layout": layout} | changed)


def pages(op: str = V1, layout: str = "TND", **changed: Any) -> Callable[[], Any]:
    """A legal paged call with something changed: 2 sequences, 3 blocks of 128."""
    q = rand(6, H, D) if layout == "TND" else TO_LAYOUT[layout](rand(2, 3, H, D))
    given = {"q": q, "k": rand(3, K, G * D), "v": rand(3, K, G * D), "block_size": K, "input_layout": layout}
    given |= {"actual_seq_lengths": [2, 6] if layout == "TND" else None, "actual_seq_lengths_kv": [5, 130]}
    given |= {"block_table": torch.tensor([[1, 0], [0, 2]], dtype=torch.int32)}
    return lambda: call(op, **given | changed)


def heads(query: int, key: int, size: int = 16) -> dict[str, Any]:
    k = rand(2, 9, key, size)
    return {"q": rand(2, 6, query, size), "k": k, "v": k, "num_heads": query, "num_key_value_heads": key}


def test_the_calls_that_the_refusals_start_from_are_legal() -> None:
    for legal in (tnd(), tnd(V2), batch(), batch(V2), pages(), pages(V2), pages(layout="BSH")):
        legal()


x = rand
table = torch.tensor
wide_cache = x(3, K, 2 * 32768)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (tnd(q=x(6, H, D).int(), k=x(9, G, D).int(), v=x(9, G, D).int()), "query of torch.int32"),
    "dtypes differ": (tnd(k=x(9, G, D).bfloat16()), "one dtype"),
    "layout and dims": (
        lambda: attention.fused_infer_attention(attention.Call("op", x(6, D), x(6, D), x(6, D))),
        "BSH",
    ),
    "head multiple": (batch(**heads(4, 3)), "a multiple"),
    "head ratio": (batch(**heads(130, 2)), "at most 64 to one"),
    "head count": (batch(**heads(260, 130)), "at most 256"),
    "heads of the query": (tnd(num_heads=8), "not num_heads=8"),
    "heads of the key": (tnd(num_key_value_heads=4), "has not 4 heads"),
    "BSH heads": (batch(layout="BSH", num_heads=3, num_key_value_heads=1), "does not divide into 3"),
    "head size limit": (batch(**heads(1, 1, 528)), "at most 512"),
    "head size alignment": (batch(**heads(2, 1, 24)), "multiples of 16"),
    "width of BSND": (batch(**heads(128, 128, 512)), "below 65535"),
    "key and value differ": (batch(v=x(2, 8, G, D)), "differ"),
    "value head size": (batch(v=x(2, 9, G, 32)), "differ"),
    "key head size": (tnd(k=x(9, G, 32)), "one size"),
    "batch": (batch(k=x(3, 9, G, D), v=x(3, 9, G, D)), "batch of query 2, of key 3"),
    "BNSD_BSND decode": (batch(layout="BNSD_BSND", rows=1), "more than one query row"),
    "inner_precise": (batch(inner_precise=4), "inner_precise=4"),
    "inner_precise of decode": (batch(rows=1, inner_precise=2), "one of (0, 1)"),
    "no query lengths": (tnd(actual_seq_lengths=None), "no query lengths"),
    "empty query lengths": (tnd(q=x(0, H, D), actual_seq_lengths=[]), "no query lengths"),
    "no key lengths": (tnd(actual_seq_lengths_kv=None), "TND needs 1 to 4096"),
    "too many lengths": (tnd(actual_seq_lengths=[0] * 4096 + [6]), "4097 query lengths"),
    "not running sums": (tnd(actual_seq_lengths=[5, 4, 6]), "not running sums"),
    "negative sum": (tnd(actual_seq_lengths=[-1, 6]), "not running sums"),
    "query total": (tnd(actual_seq_lengths=[2, 5]), "end at 5, of 6"),
    "key total": (tnd(actual_seq_lengths_kv=[3, 8]), "end at 8, of 9"),
    "key lengths per sequence": (tnd(actual_seq_lengths_kv=[3, 6]), "end at 6, of 9"),
    "count of lengths": (tnd(actual_seq_lengths_kv=[9]), "1 lengths of key/value for 2 sequences"),
    "count of padded lengths": (batch(k=x(2, 9, G, D), actual_seq_lengths_kv=[]), "0 lengths"),
    "padded query too long": (batch(actual_seq_lengths=[7]), "not all in 0..6"),
    "padded key too long": (batch(actual_seq_lengths_kv=[9, 10]), "not all in 0..9"),
    "padded negative": (batch(actual_seq_lengths_kv=[-1]), "not all in 0..9"),
    "paged without lengths": (pages(actual_seq_lengths_kv=None), "needs the key/value lengths"),
    "paged length count": (pages(actual_seq_lengths_kv=[5]), "1 lengths of key/value for 2"),
    "too few blocks in the table": (pages(actual_seq_lengths_kv=[5, 257]), "not all in 0..256"),
    "too few blocks in the cache": (pages(actual_seq_lengths_kv=[129, 130]), "need 4 blocks, the cache has 3"),
    "no such block": (pages(block_table=table([[1, 0], [0, 3]]).int()), "outside of 0..2"),
    "missing block": (pages(block_table=table([[1, 0], [0, -1]]).int()), "row 1 names a block outside"),
    "table dtype": (pages(block_table=table([[1, 0], [0, 2]])), "block_table torch.int64"),
    "table rows": (pages(block_table=table([[1, 0]]).int()), "1 rows for 2 sequences"),
    "block size": (
        pages(k=x(3, 64, G * D), v=x(3, 64, G * D), block_size=64, actual_seq_lengths_kv=[5, 100]),
        "of 128",
    ),
    "block size limit": (pages(k=x(3, 640, G * D), v=x(3, 640, G * D), block_size=640), "up to 512"),
    "decode block size": (
        pages(
            q=x(2, H, D),
            actual_seq_lengths=[1, 2],
            k=x(9, 24, 32),
            v=x(9, 24, 32),
            block_size=24,
            actual_seq_lengths_kv=[5, 9],
        ),
        "multiple of 16",
    ),
    "block size of the cache": (pages(block_size=256), "[blocks, block_size, heads * size]"),
    "width of a flat cache": (
        pages(k=wide_cache, v=wide_cache, q=x(6, H, 32768)),
        "at most 65535",
    ),
    "cache [N, K, G, D]": (pages(k=x(3, K, G, D), v=x(3, K, G, D)), "[blocks, heads, block_size, size]"),
    "BSND with cache [N, G, K, D]": (pages(layout="BSND", k=x(3, G, K, D), v=x(3, G, K, D)), "a cache of 3 dims"),
    "paged key and value differ": (pages(v=x(4, K, G * D)), "differ"),
    "paged head size": (pages(k=x(3, K, 64), v=x(3, K, 64)), "not 2 heads of 16"),
    "sparse mode": (batch(sparse_mode=5, atten_mask=TRIANGLE), "sparse_mode=5"),
    "TND all-mask": (tnd(sparse_mode=1, atten_mask=TRIANGLE), "sparse_mode=1 with TND"),
    "TND left-up": (tnd(sparse_mode=2, atten_mask=TRIANGLE), "sparse_mode=2 with TND"),
    "TND custom mask": (tnd(atten_mask=torch.zeros(6, 9).bool()), "an atten_mask with sparse_mode=0 in TND"),
    "no triangle": (tnd(sparse_mode=3), "atten_mask None"),
    "small triangle": (batch(sparse_mode=2, atten_mask=TRIANGLE[:6, :9]), "atten_mask [6, 9]"),
    "inverted triangle": (tnd(sparse_mode=4, atten_mask=~TRIANGLE), "above the diagonal"),
    "mask dtype": (batch(atten_mask=torch.zeros(6, 9)), "atten_mask of torch.float32"),
    "no mask": (batch(sparse_mode=1), "needs an atten_mask"),
    "mask shape": (batch(atten_mask=torch.zeros(6, 8).bool()), "atten_mask [6, 8]"),
    "mask batch": (batch(atten_mask=torch.zeros(3, 1, 6, 9).bool()), "atten_mask [3, 1, 6, 9]"),
    "mask heads": (batch(atten_mask=torch.zeros(2, H, 6, 9).bool()), "atten_mask [2, 4, 6, 9]"),
    "mask beyond alignment": (batch(atten_mask=torch.zeros(64, 64).bool()), "atten_mask [64, 64]"),
    "mask of a paged cache": (pages(layout="BSH", atten_mask=torch.zeros(3, 130).bool()), "256 keys"),
    "more rows than keys": (tnd(actual_seq_lengths_kv=[1, 9], **masked(3)), "sequence 0: 2 rows but 1 keys"),
    "empty band": (batch(sparse_mode=4, atten_mask=TRIANGLE, pre_tokens=1, next_tokens=-2), "an empty band"),
    "band before the rows": (batch(sparse_mode=4, atten_mask=TRIANGLE, pre_tokens=-7, next_tokens=8), "pre_tokens=-7"),
    "band after the keys": (
        batch(sparse_mode=4, atten_mask=TRIANGLE, pre_tokens=11, next_tokens=-10),
        "next_tokens=-10",
    ),
    "band of one row": (batch(rows=1, sparse_mode=4, atten_mask=TRIANGLE), "no effect on one query row"),
    "sink layout": (batch(V2, learnable_sink=x(H)), "TND alone"),
    "sink shape": (tnd(V2, learnable_sink=x(G)), "one per query head"),
    "sink dtype": (tnd(V2, learnable_sink=x(H).half()), "learnable_sink of torch.float16"),
    "sink head size": (tnd(V2, v=x(9, G, 144), learnable_sink=x(H)), "at most 128"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_the_documentation_says(name: str) -> None:
    forbidden, why = REFUSED[name]
    with pytest.raises(RuntimeError, match=re.escape(why)) as caught:
        forbidden()
    assert not isinstance(caught.value, NotImplementedError)


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "position bias": (tnd(pse_shift=x(1, H, 6, 9)), "pse_shift"),
    "MLA": (tnd(query_rope=x(6, H, 64), key_rope=x(9, G, 64)), "query_rope, key_rope"),
    "quantised cache": (tnd(antiquant_scale=x(2, 1)), "antiquant_scale"),
    "quantised key": (
        tnd(key_antiquant_scale=x(1), value_antiquant_scale=x(1)),
        "key_antiquant_scale, value_antiquant_scale",
    ),
    "quantised output": (tnd(quant_scale2=x(1)), "quant_scale2"),
    "quantised, v2": (tnd(V2, dequant_scale_key=x(1)), "dequant_scale_key"),
    "quant mode, v2": (tnd(V2, key_quant_mode=1), "key_quant_mode"),
    "shared prefix": (batch(key_shared_prefix=x(1, 4, G, D)), "key_shared_prefix"),
    "left padding": (batch(kv_padding_size=table([1])), "kv_padding_size"),
    "layout": (tnd(input_layout="NTD"), "input_layout='NTD'"),
    "NZ cache": (pages(k=x(3, G, 1, K, 16), v=x(3, G, 1, K, 16)), "NZ cache"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_no_host_kernel(name: str) -> None:
    asked, why = UNSUPPORTED[name]
    with pytest.raises(NotImplementedError, match=re.escape(why)):
        asked()
