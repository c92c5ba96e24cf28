"""find_sites on snippets: each form of attention, repeated KV heads, each form of a KV write.

Shape suffixes: B batch, H query heads, G key/value heads, S tokens, T keys, D head size.
"""

from __future__ import annotations

import pytest
import torch
from core.attention_forms import (
    REPEATS,
    B,
    D,
    Function,
    G,
    H,
    S,
    caches,
    causal,
    found,
    hidden,
    in_float32,
    qkv,
    repeat_kv,
    soft_capped,
    with_sink,
    with_weights,
    written_out,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppass.site import Causal, Rewrite

aten = torch.ops.aten


# -- forms -------------------------------------------------------------------------------------------------------------

SDPA, FLASH = "scaled_dot_product_attention", "scaled_dot_product_attention (CPU flash)"
WRITTEN_OUT, ROW_BY_ROW = "softmax(q @ k.T) @ v", "softmax(q @ k.T, ...) @ v"


FORMS: dict[str, tuple[Function, bool, str, Rewrite, Causal | None, float | None]] = {
    "sdpa": (causal, True, SDPA, Rewrite.ZIGZAG, Causal(), None),
    "sdpa without a mask": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.3),
        True,
        SDPA,
        Rewrite.ZIGZAG,
        None,
        0.3,
    ),
    "flash": (causal, False, FLASH, Rewrite.ZIGZAG, Causal(), None),
    "flash with a mask": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=hidden(S, S), scale=0.3),
        False,
        FLASH,
        Rewrite.ZIGZAG,
        Causal(),
        0.3,
    ),
    "written out": (written_out, False, WRITTEN_OUT, Rewrite.ZIGZAG, Causal(), 0.5),
    "written out in float32": (in_float32, False, WRITTEN_OUT, Rewrite.ZIGZAG, Causal(), 0.25),
    "soft cap": (soft_capped, False, ROW_BY_ROW, Rewrite.ROWWISE, None, None),
    "weights are an output": (with_weights, False, ROW_BY_ROW, Rewrite.ROWWISE, None, None),
    "sink": (with_sink, False, ROW_BY_ROW, Rewrite.ROWWISE, None, None),
}


@pytest.mark.parametrize(
    ("function", "pre_dispatch", "form", "rewrite", "mask", "scale"), FORMS.values(), ids=FORMS.keys()
)
def test_forms(
    function: Function, pre_dispatch: bool, form: str, rewrite: Rewrite, mask: Causal | None, scale: float | None
) -> None:
    seen = found(function, *qkv(), pre_dispatch=pre_dispatch)
    assert not seen.refusals
    (site,) = seen.sites
    assert (site.form, site.rewrite, site.causal, site.scale) == (form, rewrite, mask, scale)
    assert (site.key_fresh.source.name, site.value_fresh.source.name) == ("k_1", "v_1")


# -- KV heads repeated -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", REPEATS.values(), ids=REPEATS.keys())
def test_repeats_are_peeled(function: Function) -> None:
    """What travels and what attention reads are the G heads, not the H heads they are repeated to."""
    (site,) = found(function, *qkv(G)).sites
    assert (site.key.name, site.value.name) == ("k_1", "v_1")


@pytest.mark.parametrize(
    "tiled",
    [
        lambda k: k.repeat(1, H // G, 1, 1),  # heads 0 1 0 1, not 0 0 1 1
        lambda k: repeat_kv(k, H // G).flip(1),
        lambda k: k[:, None].expand(B, H // G, G, S, D).reshape(B, H, S, D),
    ],
    ids=["tiled", "reordered", "repeated in front"],
)
def test_other_orders_of_heads_are_not_peeled(tiled: Function) -> None:
    (site,) = found(lambda q, k, v: causal(q, tiled(k), tiled(v)), *qkv(G)).sites
    assert site.key.name != "k_1"
    assert site.key.meta["val"].shape[1] == H


# -- KV writes ---------------------------------------------------------------------------------------------------------


def index_put(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    return aten.index_put(cache, [None, None, positions], new)


WRITES: dict[str, tuple[Function, tuple[str, ...]]] = {
    "index_copy": (lambda cache, new, at: cache.index_copy(2, at, new), ("index_copy",)),
    "index_put": (lambda cache, new, at: index_put(cache, at, new), ("index_put",)),
    "slice_scatter": (lambda cache, new, at: torch.slice_scatter(cache, new, 2, 1, 1 + S), ("slice_scatter",)),
    "cat": (lambda cache, new, at: torch.cat([cache, new], 2), ("cat",)),
    "cat, counted from the end": (lambda cache, new, at: torch.cat([cache, new], -2), ("cat",)),
    "cat, part of it read": (lambda cache, new, at: torch.cat([cache, new], 2)[:, :, 2:], ("cat",)),
    "cat, cloned": (lambda cache, new, at: torch.cat([cache, new.clone()], 2).contiguous(), ("cat",)),
    "written twice": (
        lambda cache, new, at: cache.index_copy(2, at, torch.cat([cache[:, :, :0], new], 2)),
        ("index_copy", "cat"),
    ),
}


@pytest.mark.parametrize(("write", "nodes"), WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("repeats", [1, H // G])
def test_write_forms(write: Function, nodes: tuple[str, ...], repeats: int) -> None:
    """The rows of this step are found behind the write (and behind a repeat of what was written)."""

    def step(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, at: Tensor) -> Tensor:
        k, v = write(kc, k, at), write(vc, v, at)
        if repeats > 1:
            k, v = repeat_kv(k, repeats), repeat_kv(v, repeats)
        return scaled_dot_product_attention(q, k, v)

    heads = H // repeats
    (site,) = found(step, *qkv(heads), *caches(heads), torch.arange(S)).sites
    assert (site.key_fresh.source.name, site.value_fresh.source.name) == ("k_1", "v_1")
    assert site.key_fresh.form == nodes[0]
    assert tuple(w.name.rstrip("_0123456789") for w in site.key_fresh.writes) == nodes


def test_repeated_tokens_are_no_repeated_heads() -> None:
    """[B, H, n * S, D]: the same ops as a repeat of heads, but for the view."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(B, H, 2, S, D).reshape(B, H, 2 * S, D) for x in (k, v))
        return scaled_dot_product_attention(q, k, v)

    (site,) = found(step, *qkv()).sites
    assert tuple(site.key.meta["val"].shape) == (B, H, 2 * S, D)


def test_cat_on_another_dimension_is_no_write() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, torch.cat([k, k], 1), torch.cat([v, v], 1))

    (site,) = found(step, *qkv(G)).sites
    assert (site.key_fresh.form, site.key_fresh.source.name) == ("", "cat")
