"""zigzag_attention against a softmax written out in fp64, row by row of the layout.

Shape suffixes as in lowering/host/attention.py: B, H, G, S local rows, T keys, D, E.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cppass.layout import zigzag
from lowering.host import attention
from lowering.host.attention import zigzag_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TOKENS = (1, 2, 5, 13, 16, 37, 64)
RANKS = [(P, rank) for P in (1, 2, 3, 4) for rank in range(P)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny calls: waking a second thread for each costs more than it brings, most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def positions(tokens: int, cp_size: int, rank: int) -> Tensor:
    """Natural position of each local row; padding rows are at ``tokens``."""
    return torch.tensor([tokens if p is None else p for p in zigzag((tokens,), cp_size).positions(rank)])


def visibility(row_S: Tensor, keys: int, prefix: int, window: int = 0) -> Tensor:
    back_ST = prefix + row_S[:, None] - torch.arange(keys)
    return (back_ST >= 0) & (back_ST < window) if window else back_ST >= 0


def reference(q_BHSD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale + mask) v in fp64; a row that sees nothing is zeros."""
    R = q_BHSD.shape[1] // k_BGTD.shape[1]
    k_BHTD, v_BHTE = (x.double().repeat_interleave(R, dim=1) for x in (k_BGTD, v_BGTE))
    scores = q_BHSD.double() @ k_BHTD.transpose(2, 3) * (q_BHSD.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num() @ v_BHTE


def inputs(
    rows: int,
    keys: int,
    *,
    B: int = 1,
    H: int = 4,
    G: int = 2,
    D: int = 8,
    E: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + keys)
    shapes = ((B, H, rows, D), (B, G, keys, D), (B, G, keys, E))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def check_causal(
    tokens: int, cp_size: int, rank: int, *, prefix: int = 0, window: int = 0, surplus: int = 3, **shape: object
) -> None:
    """One causal case: numbers, zero padding rows, layout, dtype; NaN beyond the last key must not leak."""
    row_S = positions(tokens, cp_size, rank)
    used = prefix + tokens
    q, k, v = inputs(len(row_S), used + surplus, **shape)  # type: ignore[arg-type]
    k[:, :, used:] = v[:, :, used:] = torch.nan
    out = zigzag_attention(
        q, k, v, prefix=prefix, layout=zigzag((tokens,), cp_size), rank=rank, causal=True, window=window
    )
    assert out.dtype is q.dtype
    assert out.transpose(1, 2).is_contiguous()
    want = reference(q, k[:, :, :used], v[:, :, :used], visibility(row_S, used, prefix, window))
    real = row_S < tokens
    tol = TOLERANCE[q.dtype]
    torch.testing.assert_close(out[:, :, real].double(), want[:, :, real], rtol=tol, atol=tol)
    assert not out[:, :, ~real].any()


@pytest.mark.parametrize("prefix", [0, 7, 32])
@pytest.mark.parametrize("tokens", TOKENS)
def test_causal(tokens: int, prefix: int) -> None:
    for (cp_size, rank), (H, G) in itertools.product(RANKS, [(4, 4), (6, 2), (3, 1)]):
        check_causal(tokens, cp_size, rank, prefix=prefix, H=H, G=G)


@pytest.mark.parametrize("window", [1, 4, 16, 1000])
@pytest.mark.parametrize("tokens", TOKENS)
def test_window(tokens: int, window: int) -> None:
    for (cp_size, rank), prefix in itertools.product(RANKS, [0, 7, 32]):
        check_causal(tokens, cp_size, rank, prefix=prefix, window=window)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("D", "E"), [(8, 8), (8, 5), (5, 12), (1, 1), (24, 16)])
def test_dtypes_and_head_sizes(dtype: torch.dtype, D: int, E: int) -> None:
    for (cp_size, rank), window in itertools.product(RANKS, [0, 9]):
        check_causal(37, cp_size, rank, prefix=7, window=window, B=2, D=D, E=E, dtype=dtype)


@pytest.mark.parametrize("window", [0, 300, 900])
def test_rows_in_several_pieces(window: int) -> None:
    """Blocks of 530 rows: longer than a masked piece, and past the row counts where the kernel changes its blocking."""
    for rank in range(2):
        check_causal(4 * 530 - 5, 2, rank, prefix=3, window=window, H=2, G=1)


@pytest.mark.parametrize(("causal_rows", "masked_rows"), [(1, 1), (2, 3), (5, 4)])
def test_any_piece_size(monkeypatch: pytest.MonkeyPatch, causal_rows: int, masked_rows: int) -> None:
    monkeypatch.setattr(attention, "_CAUSAL_ROWS", causal_rows)
    monkeypatch.setattr(attention, "_MASKED_ROWS", masked_rows)
    for (cp_size, rank), window in itertools.product(RANKS, [0, 1, 6]):
        check_causal(37, cp_size, rank, prefix=7, window=window)


MASKS = {
    "none": None,
    "causal [S, T]": ("S", "T"),
    "[1, T]": (1, "T"),
    "[S, 1]": ("S", 1),
    "[T]": ("T",),
    "[B, 1, 1, T]": ("B", 1, 1, "T"),
    "[1, H, S, T]": (1, "H", "S", "T"),
    "[B, H, S, T]": ("B", "H", "S", "T"),
    "[B, 1, S, 1]": ("B", 1, "S", 1),
}


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks(shape: tuple[int | str, ...] | None, kind: torch.dtype) -> None:
    """Not causal: T has nothing to do with tokens, and the mask is for the local rows."""
    keys = 21
    for (cp_size, rank), tokens in itertools.product(RANKS, [1, 5, 16, 37]):
        row_S = positions(tokens, cp_size, rank)
        q, k, v = inputs(len(row_S), keys, B=2)
        sizes = {"B": 2, "H": 4, "S": len(row_S), "T": keys}
        mask = None
        if shape is not None:
            generator = torch.Generator().manual_seed(tokens)
            mask = torch.randn([sizes.get(n, n) for n in shape], generator=generator)  # type: ignore[misc]
            mask = mask > -0.5 if kind is torch.bool else mask.masked_fill(mask < -0.5, -torch.inf).to(kind)
        out = zigzag_attention(q, k, v, mask=mask, prefix=0, layout=zigzag((tokens,), cp_size), rank=rank, causal=False)
        want = reference(q, k, v, torch.ones(1, dtype=torch.bool) if mask is None else mask)
        real = row_S < tokens
        torch.testing.assert_close(out[:, :, real].double(), want[:, :, real], rtol=1e-5, atol=1e-5)
        assert not out[:, :, ~real].any()
        assert out.transpose(1, 2).is_contiguous()


def test_a_causal_mask_says_the_same_as_causal() -> None:
    for cp_size, rank in RANKS:
        row_S = positions(37, cp_size, rank)
        q, k, v = inputs(len(row_S), 60)
        where = {"prefix": 7, "layout": zigzag((37,), cp_size), "rank": rank}
        want = zigzag_attention(q, k, v, causal=True, **where)
        seen_ST = visibility(row_S, 60, 7)
        for mask in (seen_ST, seen_ST[None, None].expand(1, 4, -1, -1), torch.where(seen_ST, 0.0, -1e9)):
            out = zigzag_attention(q, k, v, mask=mask, causal=False, **where)
            real = row_S < 37
            torch.testing.assert_close(out[:, :, real], want[:, :, real])


def test_keys_no_row_sees_may_hold_anything() -> None:
    q, k, v = inputs(16, 40)
    mask = torch.zeros(16, 40, dtype=torch.bool)
    mask[:, 5:20] = True
    want = reference(q, k, v, mask)
    k[:, :, 20:] = v[:, :, 20:] = k[:, :, :5] = v[:, :, :5] = torch.nan
    out = zigzag_attention(q, k, v, mask=mask, prefix=0, layout=zigzag((16,), 1), rank=0, causal=False)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", ["BSHD", "BHDS", "one row for all"])
def test_any_memory_layout(stored: str) -> None:
    """The kernel misreads rows that are not dense (it is not the dispatcher that checks); they are copied first."""
    q, k, v = inputs(16, 16)
    if stored == "one row for all":
        q, k, v = (x[:, :, :1].expand_as(x) for x in (q, k, v))
    else:
        a, b = (1, 2) if stored == "BSHD" else (2, 3)
        q, k, v = (x.transpose(a, b).contiguous().transpose(a, b) for x in (q, k, v))
    out = zigzag_attention(q, k, v, prefix=0, layout=zigzag((16,), 1), rank=0, causal=True)
    want = reference(q, k, v, visibility(torch.arange(16), 16, 0))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_scale() -> None:
    q, k, v = inputs(16, 16, E=11)
    out = zigzag_attention(q, k, v, prefix=0, layout=zigzag((16,), 1), rank=0, causal=True, scale=0.7)
    want = reference(q, k, v, visibility(torch.arange(16), 16, 0), scale=0.7)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_nothing_to_attend_to() -> None:
    where = {"prefix": 0, "layout": zigzag((4,), 1), "rank": 0, "causal": False}
    q, k, v = inputs(4, 0)
    out = zigzag_attention(q, k, v, **where)  # type: ignore[arg-type]
    assert out.shape == (1, 4, 4, 8)
    assert not out.any()
    assert zigzag_attention(q[:0], k[:0], v[:0], **where).shape == (0, 4, 4, 8)  # type: ignore[arg-type]


def test_large_scores_do_not_overflow_the_merge() -> None:
    q, k, v = inputs(32, 64)
    out = zigzag_attention(q * 300, k * 300, v, prefix=0, layout=zigzag((64,), 2), rank=1, causal=True)
    want = reference(q * 300, k * 300, v, visibility(positions(64, 2, 1), 64, 0))
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", ["start one key early", "start one key late", "contiguous layout", "own block only"])
def test_negative_control(wrong: str) -> None:
    """The tolerance tells a wrong layout from rounding: each of these is off by more than 1000 times as much."""
    row_S = positions(37, 2, 1)
    q, k, v = inputs(len(row_S), 60)
    out = zigzag_attention(q, k, v, prefix=7, layout=zigzag((37,), 2), rank=1, causal=True)
    mask = {
        "start one key early": visibility(row_S, 60, 6),
        "start one key late": visibility(row_S, 60, 8),
        "contiguous layout": visibility(torch.arange(len(row_S)) + len(row_S) - 1, 60, 7),
        "own block only": visibility(row_S, 60, 7) & ~visibility(row_S // 9 * 9 - 1, 60, 7),
    }[wrong]
    assert (out - reference(q, k, v, mask)).abs().max() > 1e-2


SHAPES = {"q": (1, 4, 19, 8), "k": (1, 2, 50, 8), "v": (1, 2, 50, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 4, 18, 8)}, r"q \(1, 4, 18, 8\).*expected 19 local rows in q for 37 tokens on 2 ranks"),
        ({"q": (4, 19, 8)}, r"q \(4, 19, 8\).*expected q \[B, H, S, D\]"),
        ({"q": (1, 4, 19, 6)}, "equal B, G, T, D"),
        ({"q": (2, 4, 19, 8)}, "equal B, G, T, D"),
        ({"v": (1, 2, 49, 8)}, "equal B, G, T, D"),
        ({"q": (1, 3, 19, 8)}, "expected the 3 query heads to be a multiple of 2 key heads"),
        ({"k": (1, 2, 43, 8), "v": (1, 2, 43, 8)}, "saw 43 keys; expected at least 44"),
        ({"rank": 2}, "saw rank=2, cp_size=2"),
        ({"layout": zigzag((0,), 2)}, "saw tokens=0"),
        ({"prefix": -1}, "prefix=-1"),
        ({"window": -1}, "saw window=-1"),
        ({"window": 4, "causal": False}, "window=4, causal=False"),
        ({"mask": torch.ones(19, 50)}, r"causal=True and a mask \(19, 50\)"),
        ({"mask": torch.ones(37, 50), "causal": False}, r"mask \(37, 50\).*broadcastable to \(1, 4, 19, 50\)"),
        ({"mask": torch.ones(19, 50, dtype=torch.int64), "causal": False}, "mask of torch.int64; expected bool"),
        ({"dtype": torch.bfloat16}, "q torch.float32, k torch.bfloat16"),
    ],
    ids=str,
)
def test_errors_name_what_was_seen_and_what_is_expected(change: dict[str, object], message: str) -> None:
    call: dict[str, object] = {"prefix": 7, "layout": zigzag((37,), 2), "rank": 1, "causal": True, **change}
    dtype = call.pop("dtype", torch.float32)
    q, k, v = (torch.zeros(call.pop(name, shape)) for name, shape in SHAPES.items())  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=message):
        zigzag_attention(q, k.to(dtype), v.to(dtype), **call)
