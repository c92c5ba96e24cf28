"""The closed forms of context parallelism equal counts of rewritten graphs of transformers' models, exactly."""

from __future__ import annotations

import pytest
from cost.graph_counts import counted, shape_of

from cppass.cost.formulas import CP, LAST_ROW, exact, total_flops, total_received

CASES = [
    (family, cp_size, prefix) for family in ("dense", "moe") for cp_size, prefix in ((2, 0), (4, 0), (64, 0), (4, 24))
] + [("moe-batched", 2, 0)]


@pytest.mark.parametrize(("family", "cp_size", "prefix"), CASES)
def test_closed_forms_equal_the_graph(family: str, cp_size: int, prefix: int) -> None:
    tokens = 4 * cp_size if cp_size > 8 else 32
    shape, graph = shape_of(family), counted(family, tokens, cp_size, prefix)

    def of(form: object) -> object:
        return exact(form, shape, tokens, cp_size, prefix)

    assert graph.matmul_flops == of(shape.layers * CP["linear"] + CP["head"])
    assert set(graph.attention_flops) == {of(shape.layers * CP["attention"])}
    assert {graph.matmul_flops + of_rank for of_rank in graph.attention_flops} == {of(total_flops("cp"))}
    assert graph.received == (of(CP["received"]),) * shape.layers + (of(LAST_ROW),)
    assert sum(graph.received) == of(total_received("cp"))
    assert len(graph.received) == shape.layers * of(CP["collectives"]) + 1
    assert graph.parameters * shape.weight_bytes == of(CP["weights"])
    assert graph.gathered == (of(CP["buffers"]),) * shape.layers
    assert graph.cached == of(CP["cache"])


def test_uneven_tokens_differ_by_padding_alone() -> None:
    """33 tokens on 2 ranks: 17 rows a rank, 34 gathered; the closed form says 33."""
    shape, graph = shape_of("dense"), counted("dense", 33, 2, 0)
    per_token = 2 * shape.kv_heads * shape.head_dim * shape.activation_bytes
    assert graph.received[0] == 17 * per_token
    assert exact(CP["received"], shape, 33, 2) == 33 * per_token / 2
