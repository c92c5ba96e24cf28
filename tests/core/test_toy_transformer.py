"""A whole little decoder: two sites, three collectives, the same logits and caches on every rank."""

from __future__ import annotations

import pytest
import torch
from core import toy_transformer as toy

import cppass
from cppass.ops import CANONICAL


def test_one_gather_per_layer_and_the_last_token() -> None:
    gm = toy.traced(16)
    report = cppass.run_pass(gm, toy.inputs(16), cp_size=2, lower=False)
    assert (report.status, len(report.sites), report.notes) == ("rewritten", toy.LAYERS, ())
    assert [g.why for g in report.gathers] == ["K and V of a site"] * toy.LAYERS + ["1 selected rows"]
    names = [CANONICAL[n.target] for n in gm.graph.nodes if n.target in CANONICAL]
    assert names.count("attention") == names.count("gather") == toy.LAYERS
    assert names.count("gather_rows") == 1
    assert names.count("shard") == 2  # the token ids, and the positions for rope


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_else_travels(strict: bool) -> None:
    assert cppass.run_pass(toy.traced(16), toy.inputs(16), cp_size=2, strict=strict).status == "rewritten"


@pytest.mark.parametrize("lower", [True, False], ids=["lowered", "meanings"])
@pytest.mark.parametrize(("tokens", "cp_size"), [(5, 2), (13, 3), (16, 4)])
def test_logits_and_caches(tokens: int, cp_size: int, lower: bool) -> None:
    own = [x.clone() for x in toy.inputs(tokens)]
    with torch.no_grad():
        logits = toy.Toy()(*own)
    ranks = cppass.simulate(toy.traced(tokens), toy.inputs(tokens), cp_size, lower=lower)
    for seen, after in ranks:
        torch.testing.assert_close(seen, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after, own, rtol=1e-4, atol=1e-4)
        assert torch.equal(seen, ranks[0][0])
        assert all(torch.equal(x, y) for x, y in zip(after, ranks[0][1], strict=True))


def test_in_place_writes_beside_parameters() -> None:
    """The same graph before it is functional: make_fx has named its parameters as the pass's own tracing would."""
    gm = toy.traced(16, functional=False)
    assert cppass.run_pass(gm, toy.inputs(16), cp_size=2).status == "rewritten"


def test_another_token_gives_other_logits() -> None:
    """Control: the first token matters to the last one's logits."""
    ids, *rest = toy.inputs(16)
    other = ids.clone()
    other[0, 0] += 1
    with torch.no_grad():
        difference = toy.Toy()(ids, *rest) - toy.Toy()(other, *[x.clone() for x in toy.inputs(16)[1:]])
    assert difference.abs().max() > 1e-2
