"""Every rank computes what one device computes: outputs to rounding, written caches to the bit, all ranks alike.

Run in one process by cppass.simulate: the lowered graphs, and the canonical graph by its ops' meanings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.attention_forms import repeat_kv
from core.snippets import SNIPPETS, B, D, F, G, H, Snippet, causal, qkv, rand, traced
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import cppass

TOKENS = (1, 2, 5, 13, 16, 37, 64)
Ranks = list[tuple[list[Tensor], list[Tensor]]]
traced_once = functools.cache(traced)  # simulate changes a copy


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Thousands of tiny calls: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def alone(run: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, inputs after the run) of one device."""
    own = [x.clone() for x in inputs]
    return as_list(run(*own)), own


def simulated(run: Callable[..., Any], inputs: tuple[Any, ...], cp_size: int, **options: Any) -> Ranks:
    return [(as_list(out), after) for out, after in cppass.simulate(run, inputs, cp_size, **options)]


def check(snippet: Snippet, tokens: int, cp_size: int, lower: bool) -> None:
    inputs = snippet.inputs(tokens)
    outputs, written = alone(snippet.run, inputs)
    ranks = simulated(traced_once(snippet, tokens), inputs, cp_size, lower=lower)
    for seen, after in ranks:
        torch.testing.assert_close(seen, outputs, rtol=snippet.tolerance, atol=snippet.tolerance)
        torch.testing.assert_close(after, written, rtol=snippet.tolerance, atol=snippet.tolerance)
        own, first = [*seen, *after], [*ranks[0][0], *ranks[0][1]]
        assert all(torch.equal(x, y) for x, y in zip(own, first, strict=True))  # every rank, every bit
    touched = tuple(i for i, (x, y) in enumerate(zip(inputs, written, strict=True)) if not torch.equal(x, y))
    assert touched == snippet.written


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("name", ["causal", "cache, in place"])
def test_lowered(name: str, cp_size: int, tokens: int) -> None:
    check(SNIPPETS[name], tokens, cp_size, lower=True)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("name", ["causal", "cache, in place"])
def test_meanings(name: str, cp_size: int, tokens: int) -> None:
    check(SNIPPETS[name], tokens, cp_size, lower=False)


@pytest.mark.parametrize(("tokens", "cp_size"), [(5, 2), (13, 3), (37, 2)])
@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize("name", [name for name in SNIPPETS if name not in ("causal", "cache, in place")])
def test_other_forms(name: str, lower: bool, tokens: int, cp_size: int) -> None:
    check(SNIPPETS[name], tokens, cp_size, lower)


def test_returned_caches_have_the_bits_of_one_device() -> None:
    """Rows of K and V move, they are not computed again: equal to the bit, however they are returned."""
    snippet = SNIPPETS["cache"]
    inputs = snippet.inputs(13)
    (_, keys, values), _ = alone(snippet.run, inputs)
    for (_, seen_keys, seen_values), _ in simulated(snippet.run, inputs, 3):
        assert torch.equal(seen_keys, keys)
        assert torch.equal(seen_values, values)


def test_a_wrong_mask_is_noticed() -> None:
    """Control: one key more per row moves the result by far more than the tolerance."""
    (plain,), _ = alone(causal, qkv(16))
    one_more = torch.ones(16, 16, dtype=torch.bool).tril(1)
    other = scaled_dot_product_attention(*qkv(16), attn_mask=one_more)
    assert (plain - other).abs().max() > 1e-2


def test_rows_in_the_wrong_order_are_noticed() -> None:
    """Control: gathered rows that are not put back in order."""
    (plain,), _ = alone(causal, qkv(16))
    unordered = plain[:, :, [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert (plain - unordered).abs().max() > 1e-1


@pytest.mark.parametrize("heads", [1, G])
@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize("scaled", ["keys", "values"])
def test_one_of_keys_and_values_changes_after_its_repeat(scaled: str, lower: bool, heads: int) -> None:
    """The other's repeat stays, too: attention has as many key heads as value heads."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_kv(k, H // heads), repeat_kv(v, H // heads)
        return causal(q, k * 0.5, v) if scaled == "keys" else causal(q, k, v * 0.5)

    check(Snippet(run, lambda tokens: qkv(tokens, heads)), 13, 2, lower)


# -- shapes and strides ------------------------------------------------------------------------------------------------


def batched(heads: int = H, tokens: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return rand(2, heads, tokens, D), rand(2, heads, tokens, D, seed=1), rand(2, heads, tokens, D, seed=2)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, F]."""
    return causal(q, k, v).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


STRIDES: dict[str, Callable[..., Any]] = {
    "flattened": lambda q, k, v: merged(q, k, v).view(-1),
    "batch merged with tokens": lambda q, k, v: merged(q, k, v).view(16, F),
    "half of the tokens, viewed": lambda q, k, v: merged(q, k, v)[:, :4].reshape(2, -1),
    "split along the tokens, viewed": lambda q, k, v: torch.cat(
        [half.view(2, -1) for half in torch.split(merged(q, k, v), 4, 1)], 1
    ),
    "unbound along the batch, viewed": lambda q, k, v: torch.stack([x.view(-1) for x in merged(q, k, v).unbind(0)]),
    "mixed over tokens, viewed": lambda q, k, v: merged(q, k, v).cumsum(1).view(2, -1),
    "as columns": lambda q, k, v: merged(q, k, v).permute(2, 0, 1).contiguous().view(F, -1),
    "an input is an output": lambda q, k, v: (causal(q, k, v), q, k.transpose(2, 3)),
    "no output of attention": lambda q, k, v: (causal(q, k, v).sum() * 0 + q).contiguous(),
}


@pytest.mark.parametrize("run", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
def test_strides_after_a_gather(run: Callable[..., Any], lower: bool) -> None:
    """Gathered values have rows first in memory; views behind them have to work for a batch of two as well."""
    check(Snippet(run, lambda tokens: batched(tokens=tokens)), 8, 2, lower)


@pytest.mark.parametrize("tokens", [8, 13])
@pytest.mark.parametrize("start", [0, 3, -1, -3])
def test_a_few_rows(start: int, tokens: int) -> None:
    """Slices of one to three tokens, wherever they are and whoever owns them."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = causal(q, k, v)
        return out[:, :, start:] if start < 0 else out[:, :, start : start + 2]

    check(Snippet(run, qkv), tokens, 2, True)


def dead(layers: int) -> Callable[..., Tensor]:
    """Layers of attention whose result nothing uses."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q
        for _ in range(layers):
            out = causal(out, k, v)
        return q * 2

    return run


@pytest.mark.parametrize("layers", [1, 2])
def test_dead_attention_is_no_error(layers: int) -> None:
    """Like any dead code, it may go."""
    check(Snippet(dead(layers), qkv), 8, 2, True)


# -- masks whose description the attention kernel has to accept ------------------------------------------------------


def behind(offset: int, keys: int = 0) -> Callable[..., Tensor]:
    """Rows that see the keys up to row + offset."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(k.shape[2]) <= (torch.arange(q.shape[2]) + offset)[:, None]
        return torch.nan_to_num(scaled_dot_product_attention(q, k, v, attn_mask=mask))

    return run


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize("offset", [-1, 0, 1, 4])
def test_causal_masks_off_the_diagonal(offset: int, lower: bool) -> None:
    """k <= q + offset without a cache: row 0 sees nothing (-1), or the last rows see every key (1, 4)."""
    check(Snippet(behind(offset), qkv), 8, 2, lower)


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize(("length", "keys"), [(0, 12), (2, 12), (0, 8), (2, 8)])
def test_lengths_at_the_edges(length: int, keys: int, lower: bool) -> None:
    """k < q + n: with n = 0 the first row sees nothing; with 8 keys and n = 2 the last row could see one more."""

    def run(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        mask = torch.arange(k.shape[2]) < (torch.arange(q.shape[2]) + n)[:, None]
        return torch.nan_to_num(scaled_dot_product_attention(q, k, v, attn_mask=mask))

    check(Snippet(run, lambda tokens: (*other_keys(keys), torch.tensor(length))), 8, 2, lower)


@pytest.mark.parametrize("length", [0, 2])
def test_a_row_whose_keys_are_all_hidden_by_a_number(length: int) -> None:
    """0 or -1e9 is added to the scores: where every key gets -1e9, softmax sees them all alike."""

    def run(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        mask = torch.arange(k.shape[2]) < (torch.arange(q.shape[2]) + n)[:, None]
        return scaled_dot_product_attention(q, k, v, attn_mask=torch.where(mask, 0.0, -1e9))

    check(Snippet(run, lambda tokens: (*other_keys(12), torch.tensor(length))), 8, 2, True)


def other_keys(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return rand(B, H, 8, D), rand(B, H, keys, D, seed=1), rand(B, H, keys, D, seed=2)


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
def test_is_causal_counts_from_the_first_key(lower: bool) -> None:
    check(Snippet(causal, lambda tokens: other_keys(12)), 8, 2, lower)


def test_is_causal_over_fewer_keys_is_refused() -> None:
    with pytest.raises(cppass.RefusedError, match="CP103"):
        cppass.simulate(causal, other_keys(5), 2)


def test_grouped_heads_travel_once() -> None:
    """G heads are gathered, not the H heads that they are repeated to."""
    snippet = SNIPPETS["growing cache, window, grouped heads"]
    report = cppass.run_pass(traced(snippet, 8), snippet.inputs(8), cp_size=2)
    assert report.gathers[0].received_bytes == 2 * G * 8 * D * 4 // 2


# -- row numbers of a local sort, looked up in a table of another axis ---------------------------------------------


def looked_up(take: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Expert rows are taken at table[order], where the table is longer than the sorted axis."""

    def run(q: Tensor, k: Tensor, v: Tensor, router: Tensor, table: Tensor) -> Tensor:
        x = causal(q, k, v).transpose(1, 2).reshape(-1, F)
        picked = torch.softmax(x @ router, -1).topk(2, -1)[1].reshape(-1)
        order = torch.sort(picked)[1]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return x[take(table, order) // 2][back].view(-1, 2, F).sum(1)

    return run


TAKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda table, order: table[order],
    "index_select": lambda table, order: table.index_select(0, order),
    "gather": lambda table, order: table.gather(0, order),
    "index, as long as the axis": lambda table, order: table[: order.shape[0]][order],
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES.keys())
def test_row_numbers_mean_nothing_in_another_table(take: Callable[[Tensor, Tensor], Tensor]) -> None:
    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return (*qkv(tokens), rand(F, 4), torch.arange(2 * tokens + 9) * 5 % 12)

    check(Snippet(looked_up(take), inputs), 13, 2, True)


@pytest.mark.parametrize("output", ["rows", "rows and order"])
def test_rows_sorted_by_an_input(output: str) -> None:
    """Rows sorted by token id: the order is cheap to compute whole, but only the order of local rows fits them."""

    def run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Any:
        x = causal(q, k, v).transpose(1, 2).reshape(-1, F)
        order = torch.sort(ids)[1]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        rows = (x[order] * 2)[back]
        return (rows, order) if output == "rows and order" else rows

    check(Snippet(run, lambda tokens: (*qkv(tokens), torch.arange(tokens) * 7 % 5)), 13, 2, True)


# -- values in front of the first product: cheap, so both kinds of them are wanted -------------------------------------


def attended(x: Tensor, w: Tensor) -> Tensor:
    """[S, F] -> [S, F]: projections and attention."""
    q, k, v = ((x @ w[:, i * F : (i + 1) * F]).view(1, -1, H, D).transpose(1, 2) for i in range(3))
    return causal(q, k, v).transpose(1, 2).reshape(-1, F)


def halves(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """One element of a tuple is projected, the other one is an output."""
    a, b = torch.split(torch.cat([x, x + 1], -1), F, -1)
    return attended(a, w), b


def largest(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    values, where = x.topk(F // 2, -1)
    return attended(torch.cat([values, values], -1), w), where


def normalised(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.nn.functional.layer_norm(x, [F])
    return attended(x, w), x


def shuffled(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by token id and put back; the orders are those of all tokens where they are outputs."""
    order = torch.sort(ids)[1]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return (x[order] * 2)[back], order, back


def with_order(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    x, order, _ = shuffled(x + w[ids, :F], ids)
    return attended(x, w), order


def with_inverse(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    x, _, back = shuffled(x + w[ids, :F], ids)
    return attended(x, w), back


def beside_attention(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    x = x + w[ids, :F]
    y, _, back = shuffled(x, ids)
    return attended(x, w) + y @ w[:, :F], back


WANTED = [halves, largest, normalised, with_order, with_inverse, beside_attention]


@pytest.mark.parametrize("run", WANTED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
def test_values_wanted_whole_and_local(run: Callable[..., Any], lower: bool) -> None:
    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return rand(tokens, F), rand(F, 3 * F) / F, torch.arange(tokens) * 7 % 5

    check(Snippet(run, inputs, tolerance=1e-4), 13, 2, lower)
