"""Closed forms against the layout, against models built on no device, and against each other."""

from __future__ import annotations

import dataclasses
import importlib.util
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cppass.cost.formulas import CP, FORMS, ONE, PAIRS, RING, TP, ULYSSES, F, H, K, P, S, exact, total_received, value
from cppass.cost.model import MODELS, ModelShape
from cppass.demo.presets import PRESETS
from cppass.layout import zigzag

BOTH = sorted(MODELS.keys() & PRESETS.keys())


@settings(derandomize=True, max_examples=50, deadline=None, database=None)
@given(cp_size=st.integers(1, 64), blocks=st.integers(1, 40), prefix=st.integers(0, 500))
def test_every_rank_has_an_equal_share_of_the_pairs(cp_size: int, blocks: int, prefix: int) -> None:
    tokens = 2 * cp_size * blocks
    layout = zigzag((tokens,), cp_size)
    expected = int(PAIRS.subs({S: tokens, F: prefix})) // cp_size
    assert {layout.attention_pairs(rank, (prefix,)) for rank in range(cp_size)} == {expected}


@pytest.mark.parametrize("name", BOTH)
def test_shapes_agree_with_the_presets_of_the_host_job(name: str) -> None:
    shape, preset = MODELS[name], PRESETS[name]
    assert (preset.real_layers, preset.real_vocab) == (shape.layers, shape.vocab)
    same = set(dataclasses.asdict(shape)) & set(dataclasses.asdict(preset)) - {"layers", "vocab"}
    assert len(same) == 9
    for field in same:
        assert getattr(shape, field) == getattr(preset, field), field


@pytest.mark.parametrize("name", BOTH)
def test_weights_are_those_of_a_transformers_model(name: str) -> None:
    from transformers import AutoModelForCausalLM

    shape = dataclasses.replace(MODELS[name], layers=2)
    config = PRESETS[name].config(2, shape.vocab, 64)
    config.tie_word_embeddings = shape.tied
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) * shape.weight_bytes == exact(CP["weights"], shape, 4, 2)


def test_published_sizes() -> None:
    """Billions of parameters as the model cards give them."""
    billions = {name: exact(ONE["weights"], shape, 2) / 2 / 1e9 for name, shape in MODELS.items()}
    expected = {
        "qwen3-0.6b": 0.6,
        "qwen3-8b": 8.2,
        "qwen3-32b": 32.8,
        "qwen3-30b-a3b": 30.5,
        "qwen3-235b-a22b": 235.1,
    }
    assert {name: round(count, 1) for name, count in billions.items()} == expected


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("qwen3-0.6b", 1 / 2), ("qwen3-8b", 1 / 8), ("qwen3-30b-a3b", 1 / 8), ("qwen3-235b-a22b", 1 / 16)],
)
def test_bytes_against_tensor_parallelism(name: str, ratio: float) -> None:
    shape = MODELS[name]
    assert shape.kv_heads * shape.head_dim / (2 * shape.hidden) == ratio
    assert exact(CP["received"] / TP["received"], shape, 1024, 4) == sympy.nsimplify(ratio)


def test_an_all_gather_moves_less_than_ulysses_below_the_crossover() -> None:
    up_to_kv_heads = ULYSSES["received"].replace(sympy.Max, lambda _, split: split)
    crossover = (H + K) / K
    assert sympy.simplify((CP["received"] - up_to_kv_heads).subs(P, crossover)) == 0
    shape = MODELS["qwen3-8b"]  # 32 query heads, 8 KV heads: the crossover is 5
    assert [
        exact(CP["received"], shape, 960, ranks) < exact(ULYSSES["received"], shape, 960, ranks) for ranks in (2, 4, 8)
    ] == [True, True, False]


def test_one_rank_receives_nothing() -> None:
    for shape in MODELS.values():
        for scheme in FORMS:
            assert exact(total_received(scheme), shape, 4096, 1) == 0, scheme


def test_a_ring_moves_the_bytes_of_an_all_gather_in_more_launches() -> None:
    assert RING["received"] == CP["received"]
    assert (RING["collectives"].subs(P, 8), CP["collectives"]) == (7, 1)


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_all_ranks_are_those_of_one_device(name: str) -> None:
    shape, ranks = MODELS[name], 4
    for scheme in ("cp", "tp", "ulysses", "ring"):
        for part in ("linear", "attention"):
            whole = exact(ONE[part], shape, 4096, 1, 128)
            share = exact(FORMS[scheme][part], shape, 4096, ranks, 128) * ranks
            repeated = (
                2 * 4096 * shape.hidden * shape.experts * (ranks - 1) if (scheme, part) == ("tp", "linear") else 0
            )
            assert share - repeated == whole, (scheme, part)  # every rank of TP routes every token


@settings(derandomize=True, max_examples=30, deadline=None, database=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    scheme=st.sampled_from(sorted(FORMS)),
    ranks=st.sampled_from((1, 2, 4, 8, 64)),
    blocks=st.integers(1, 8000),
    prefix=st.integers(0, 10**6),
)
def test_fast_values_are_the_exact_ones(name: str, scheme: str, ranks: int, blocks: int, prefix: int) -> None:
    shape, tokens = MODELS[name], 2 * ranks * blocks
    for part, form in FORMS[scheme].items():
        expected = exact(form, shape, tokens, ranks, prefix)
        fast = value(scheme, part, shape, tokens, ranks, prefix)
        assert fast == pytest.approx(float(expected), rel=1e-12), part


def test_the_example_of_235b_says_the_same() -> None:
    """examples/qwen3_235b.py, with attention on 4 ranks of context parallelism alone, experts on 4."""
    example, shape, tokens = _example(), MODELS["qwen3-235b-a22b"], 32_768
    node = example.Node("prefill", tp=1, cp=4, dp=1)
    assert node.gathered(tokens) == exact(shape.layers * CP["received"], shape, tokens, 4)
    assert node.kv_per_token * tokens == exact(CP["cache"], shape, tokens, 4)
    norms = 2 * (shape.layers * (2 * shape.hidden + 2 * shape.head_dim) + shape.hidden)  # the example leaves them out
    whole = example.Node("one device", tp=1, cp=1, dp=1).weights
    assert Fraction(whole) == exact(ONE["weights"], shape, tokens) - norms


def _example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "qwen3_235b.py"
    spec = importlib.util.spec_from_file_location("qwen3_235b", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_heads_that_cannot_be_dealt_out() -> None:
    shape = ModelShape("odd", 1, 64, 64, heads=6, kv_heads=2, head_dim=16)
    assert [shape.splits_heads(ranks) for ranks in (1, 2, 3, 4, 6, 12)] == [True, True, False, False, True, False]
