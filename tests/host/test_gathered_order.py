"""Writes by index: rows stay as the all-gather leaves them, positions are permuted once; K and V are not copied."""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass.rules import name_of
from lowering.host.target import LOWERINGS

LAYERS, ROWS = 2, 40


def model(
    x_BSF: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, positions: Tensor, mask: Tensor, *caches: Tensor
) -> Tensor:
    for kc, vc in zip(caches[::2], caches[1::2], strict=True):
        q, k, v = ((x_BSF @ w).unflatten(2, (-1, 8)).transpose(1, 2) for w in (wq, wk, wv))
        kc.index_copy_(2, positions, k)
        vc.index_copy_(2, positions, v)
        out = scaled_dot_product_attention(q, kc, vc, attn_mask=mask, enable_gqa=True)
        x_BSF = x_BSF + out.transpose(1, 2).flatten(2) @ wq.t()
    return x_BSF


def inputs(tokens: int, batch: int = 2, prefix: int = 5) -> tuple[Tensor, ...]:
    rand = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, width, generator=rand) / 4 for width in (32, 16, 16)]
    positions = torch.arange(tokens) + prefix
    mask = (torch.arange(ROWS) <= positions[:, None])[None, None]
    caches = [torch.randn(batch, 2, ROWS, 8, generator=rand) for _ in range(2 * LAYERS)]
    return torch.randn(batch, tokens, 16, generator=rand), *weights, positions, mask, *caches


def ops(tokens: int) -> list[str]:
    gm = make_fx(model, tracing_mode="fake")(*inputs(tokens))
    assert cppass.run_pass(gm, inputs(tokens), cp_size=2).status == "rewritten"
    return [name_of(node) for node in gm.graph.nodes]


def largest_error(tokens: int, cp_size: int) -> float:
    own = [x.clone() for x in inputs(tokens)]
    expected = model(*own)
    error = 0.0
    for seen, after in cppass.simulate(model, inputs(tokens), cp_size):
        pairs = [(seen, expected), *zip(after[6:], own[6:], strict=True)]
        error = max(error, *(float((a - b).abs().max()) for a, b in pairs))
    return error


@pytest.mark.parametrize(("tokens", "cp_size"), [(16, 2), (24, 3), (16, 4), (13, 2)])
def test_ranks_equal_one_device(tokens: int, cp_size: int) -> None:
    assert largest_error(tokens, cp_size) < 1e-5


def test_even_lengths_make_no_copy() -> None:
    even = ops(16)
    assert even.count("cppass_host::pack") == LAYERS + 1  # and the output
    assert even.count("cppass_host::gathered_order") == 1  # shared by the layers
    assert even.count("cppass_host::unpack") == 1  # the output alone


def test_uneven_lengths_do() -> None:
    assert ops(13).count("cppass_host::unpack") == LAYERS + 1


def test_positions_that_are_not_permuted_are_noticed() -> None:
    """Control."""

    def as_they_are(emit: Any, node: Any, ranks: Any) -> Any:
        return emit(torch.ops.aten.clone.default, node.args[0])

    with unittest.mock.patch.dict(LOWERINGS, {"gathered_order": as_they_are}):
        assert largest_error(16, 2) > 1e-1
