"""The parts an explanation is made of, each alone: folded modules, paired rows, layouts, the cost curve."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import fx

from cppass.cost import HARDWARE, break_even_tokens
from cppass.cost.curve import step_seconds
from cppass.explain_node import module_of, modules_of, refuse
from cppass.inspection.layout import describe
from cppass.inspection.modules import repeated, tree_of
from cppass.inspection.pairs import rows_of
from cppass.inspection.text import bar
from cppass.inspection.units import folded, octets, seconds
from cppass.inspection.views import ModuleView, NodeState, NodeView
from cppass.layout import Zigzag

LOCAL, FULL = NodeState("local", "local in dim 1", 1), NodeState("full", "full")


def node(name: str, module: str = "", op: str = "aten.mm.default", state: NodeState = LOCAL, **how: Any) -> NodeView:
    return NodeView(name, op, "[1, 8]", "float32", f"{op}()", state, module, **how)


def outline(module: ModuleView) -> list[Any]:
    return [(m.path, len(m.same), m.nodes, outline(m)) for m in module.children]


# -- modules ----------------------------------------------------------------------------------------------------------


def test_equal_layers_are_folded_and_different_ones_are_not() -> None:
    nodes = [node("embed", "m.embed")]
    for layer in range(5):
        state = FULL if layer == 3 else LOCAL
        nodes += [node(f"q{layer}", f"m.layers.{layer}.q"), node(f"o{layer}", f"m.layers.{layer}.o", state=state)]
    assert outline(tree_of(nodes)) == [
        (
            "m",
            0,
            11,
            [
                ("m.embed", 0, 1, []),
                (
                    "m.layers",
                    0,
                    10,
                    [
                        ("m.layers.0", 3, 2, [("m.layers.0.q", 0, 1, []), ("m.layers.0.o", 0, 1, [])]),
                        ("m.layers.3", 0, 2, [("m.layers.3.q", 0, 1, []), ("m.layers.3.o", 0, 1, [])]),
                        ("m.layers.4", 0, 2, [("m.layers.4.q", 0, 1, []), ("m.layers.4.o", 0, 1, [])]),
                    ],
                ),
            ],
        )
    ]
    (fold,) = repeated(tree_of(nodes))
    assert folded(fold.same) == "m.layers.0 .. 2"


def test_equal_siblings_with_names_of_their_own_stay_apart() -> None:
    """k_proj and v_proj are alike, and not the same."""
    assert [m.same for m in tree_of([node("k", "k_proj"), node("v", "v_proj")]).children] == [(), ()]


def test_a_tree_counts_roles_and_states_of_all_that_is_below() -> None:
    tree = tree_of([node("a", "m.x", role="gather"), node("b", "m", state=FULL), node("c")])
    assert (tree.nodes, tree.roles, tree.kinds) == (3, {"gather": 1}, {"local": 2, "full": 1})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self'].model.layers.slice(None, 28, None).0.self_attn", "model.layers.0.self_attn"),
        ("L['self'].layers[3].attention", "layers.3.attention"),
        ("L['self']._modules['model'].norm", "model.norm"),
        ("L['self']", ""),
        ("L['args'][0].model.norm", "model.norm"),
        ("getattr(L['self'], 'two words').norm", "two words.norm"),
        ("L['model'].norm", "model.norm"),
        ("model.norm", "model.norm"),
    ],
)
def test_module_paths_as_people_write_them(path: str, expected: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["nn_module_stack"] = {"key": (path, "somewhere.Attention")}
    assert (module_of(x), modules_of(x)) == (expected, {expected: "Attention"})


# -- side by side -----------------------------------------------------------------------------------------------------


def test_rows_pair_what_is_the_same_and_keep_both_orders() -> None:
    before = [
        node("x", op="input"),
        node("mm", "q"),
        node("sdpa", "a", "aten.sdpa", role="attention"),
        node("mm_1", "o"),
    ]
    after = [
        node("x", op="input"),
        node("shard", "q", "cppass.shard.default"),
        node("mm_5", "q"),
        node("gather", "a", "cppass.gather.default"),
        node("attention", "a", "cppass.attention.default", role="attention"),
        node("mm_6", "o"),
    ]
    assert rows_of(before, after) == [(0, 0), (None, 1), (1, 2), (None, 3), (2, 4), (3, 5)]


def test_rows_of_a_node_that_moved_are_not_paired_across_the_others() -> None:
    names = ["a", "b", "c", "d"]
    before = [node(n, n) for n in names]
    after = [node(n, n) for n in ["d", "a", "b", "c"]]
    rows = rows_of(before, after)
    assert rows == [(None, 0), (0, 1), (1, 2), (2, 3), (3, None)]
    assert [b for b, _ in rows if b is not None] == [0, 1, 2, 3] == [a for _, a in rows if a is not None]


# -- layout -----------------------------------------------------------------------------------------------------------


def test_the_layout_of_uneven_sequences() -> None:
    view = describe(Zigzag((5, 4), 2))
    assert [rank.spans for rank in view.ranks] == [
        ((0, 0, 2), (0, 5, 1), (1, 4, 1), (1, 8, 1)),
        ((0, 2, 1), (0, 6, 1), (1, 3, 1), (1, 7, 1)),
    ]
    assert [rank.rows for rank in view.ranks] == [5, 4]
    assert sum(rank.share for rank in view.ranks) == pytest.approx(1)
    assert all(abs(rank.share - 0.5) < 0.1 for rank in view.ranks)


def test_bars_show_which_blocks_a_rank_owns() -> None:
    assert [bar(rank, 6).strip() for rank in range(3)] == ["#....#", ".#..#.", "..##.."]
    assert bar(0, 64) == ""


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", ["ascend-910b", "host-core"])
@pytest.mark.parametrize("cp_size", [2, 8])
def test_the_curves_cross_at_the_break_even(hardware: str, cp_size: int) -> None:
    """The two sides are the ones whose difference break_even_tokens solves."""
    work, sites, weights = (2 * 8e9, 4 * 36 * 4096.0, 36 * 4096.0), 36, 16e9
    device = HARDWARE[hardware]
    least = break_even_tokens(*work, sites, cp_size, device, weight_bytes=weights)

    def gains(tokens: int) -> bool:
        one, ranks = (step_seconds(*work, sites, p, device, tokens, weight_bytes=weights) for p in (1, cp_size))
        return ranks < one

    assert gains(least) and not gains(least - 2 * cp_size)


def test_without_sites_to_wait_for_ranks_share_the_matmuls() -> None:
    device = dataclasses.replace(HARDWARE["host-core"], memory_bandwidth=1e30)
    one = step_seconds(1e9, 0, 0, 0, 1, device, 100)
    assert step_seconds(1e9, 0, 0, 0, 4, device, 100) == pytest.approx(one / 4)


def test_numbers_for_people() -> None:
    assert [octets(n) for n in (0, 999, 1000, 67_100_000, 4.5e14, None)] == [
        *("0 B", "999 B", "1.0 kB", "67.1 MB", "450000 GB", "symbolic")
    ]
    assert [seconds(n) for n in (1.9712, 0.2841, 3e-5, 1e5)] == ["1.97 s", "284 ms", "30 us", "100,000 s"]


def test_refused_nodes_know_their_module() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.ops.aten.relu.default, (x,))
    made.meta["nn_module_stack"] = {"key": ("L['self'].layers.0", torch.nn.ReLU)}
    assert "at node relu_default (aten.relu.default) of layers.0" in refuse("CP101", made, "why").place()
