"""The compiler's gate: the smallest even step whose predicted time is below one device's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cppass.cost import HARDWARE, NEVER, break_even_tokens
from cppass.cost.hardware import Hardware
from cppass.cost.model import MODELS
from cppass.cost.predict import break_even

DEVICE = HARDWARE["ascend-910b"]
GRAPH = {
    "flops_per_token": 36 * 386e6,
    "attention_flops_per_pair": 36 * 4 * 32 * 128.0,
    "gather_bytes_per_token": 36 * 4096.0,
    "sites": 36,
    "weight_bytes": 36 * 386e6,
}


def gain(tokens: int, cp_size: int, h: Hardware, graph: dict[str, float]) -> float:
    """Seconds won, written apart from the module: one device's time less that of the ranks."""
    compute, read = tokens * graph["flops_per_token"] / h.matmul_rate, graph["weight_bytes"] / h.memory_bandwidth
    attention = tokens * (tokens + 1) / 2 * graph["attention_flops_per_pair"] / h.attention_rate
    received = tokens * graph["gather_bytes_per_token"] * (cp_size - 1) / cp_size / h.gather_rate(cp_size)
    copied = 2 * tokens * graph["gather_bytes_per_token"] / h.memory_bandwidth
    alone = max(compute, read) + attention
    shared = max(compute / cp_size, read) + attention / cp_size
    return alone - (shared + received + copied + graph["sites"] * (h.latency + 2 * h.launch))


@settings(derandomize=True, deadline=None, database=None)
@given(
    linear=st.one_of(st.just(0.0), st.floats(1e3, 1e12)),
    pair=st.one_of(st.just(0.0), st.floats(1e2, 1e8)),
    moved=st.floats(1e2, 1e8),
    sites=st.integers(1, 200),
    cp_size=st.sampled_from((2, 3, 4, 8, 64)),
    latency=st.floats(1e-6, 1e-1),
    weights=st.one_of(st.just(0.0), st.floats(1e3, 1e12)),
)
def test_steps_from_it_on_gain_and_the_one_before_does_not(
    linear: float, pair: float, moved: float, sites: int, cp_size: int, latency: float, weights: float
) -> None:
    graph = {
        "flops_per_token": linear,
        "attention_flops_per_pair": pair,
        "gather_bytes_per_token": moved,
        "sites": sites,
        "weight_bytes": weights,
    }
    device = dataclasses.replace(DEVICE, latency=latency)
    found = break_even_tokens(**graph, cp_size=cp_size, hardware=device)  # type: ignore[arg-type]
    if found == NEVER:
        assert gain(2**50, cp_size, device, graph) <= 0
        return
    step = 2 * cp_size
    assert found % step == 0
    if found > 2**40:
        return  # a step is less than a rounding of the times
    slack = 1e-9 * (latency * sites + weights / device.memory_bandwidth + abs(gain(2 * found, cp_size, device, graph)))
    for tokens in (found, found + step, 2 * found, 10 * found, 1000 * found):
        assert gain(tokens, cp_size, device, graph) > -slack
    if found > step:
        assert gain(found - step, cp_size, device, graph) < slack


@settings(derandomize=True, deadline=None, database=None)
@given(rate=st.floats(1e8, 1e12), faster=st.floats(1, 100), cp_size=st.sampled_from((2, 4, 8)))
def test_faster_links_never_raise_it(rate: float, faster: float, cp_size: int) -> None:
    def of(r: float) -> int:
        device = dataclasses.replace(DEVICE, link_bandwidth=r, peer_bandwidth=r)
        return break_even_tokens(**GRAPH, cp_size=cp_size, hardware=device)  # type: ignore[arg-type]

    assert of(rate * faster) <= of(rate)


def test_without_attention_and_with_a_slow_link_it_is_never() -> None:
    graph = {**GRAPH, "attention_flops_per_pair": 0.0}
    slow = dataclasses.replace(DEVICE, link_bandwidth=1e6)
    assert break_even_tokens(**graph, cp_size=4, hardware=slow) == NEVER  # type: ignore[arg-type]
    assert break_even_tokens(**GRAPH, cp_size=1, hardware=DEVICE) == NEVER  # type: ignore[arg-type]


@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("device", HARDWARE)
def test_it_agrees_with_the_whole_model(device: str, cp_size: int) -> None:
    """The whole model overlaps, counts ops between matmuls and the LM head; the gate has what a graph gives."""
    whole = break_even(MODELS["qwen3-8b"], HARDWARE[device], cp_size)
    found = break_even_tokens(**GRAPH, cp_size=cp_size, hardware=HARDWARE[device])  # type: ignore[arg-type]
    assert whole is not None and whole / 2 <= found <= whole * 2


def test_without_the_bytes_of_weights_it_is_lower() -> None:
    graph = {**GRAPH, "weight_bytes": 0.0}
    bare, full = (break_even_tokens(**g, cp_size=4, hardware=DEVICE) for g in (graph, GRAPH))  # type: ignore[arg-type]
    assert bare < full


def test_the_gate_imports_neither_torch_nor_sympy() -> None:
    code = "import sys, cppass.cost; print({'torch', 'sympy', 'rich', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout == "set()\n"
