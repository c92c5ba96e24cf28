"""What users do with a compiled model, on real ranks; each function returns what ranks/test_scenarios.py checks."""

from __future__ import annotations

import copy
import unittest.mock
import warnings
from collections.abc import Callable
from typing import Any

import qwen
import torch
import torch.distributed as dist
from prefill_case import difference
from transformers import CompileConfig, GenerationConfig

import cppass

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {}


def scenario(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


def run_scenarios(rank: int, names: list[str]) -> dict[str, Any]:
    """Every scenario's result, or the error it ended with."""
    results: dict[str, Any] = {}
    for name in names:
        torch._dynamo.reset()
        cppass.clear_reports()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                results[name] = SCENARIOS[name]()
            except Exception as error:
                results[name] = {"error": repr(cppass.unwrap(error))}
        results[name]["warnings"] = [str(w.message) for w in caught if issubclass(w.category, cppass.CPWarning)]
    return results


def compiled(
    family: str = "dense", attention: str = "sdpa", dynamic: bool | None = None, **options: Any
) -> tuple[Any, Any]:
    model = qwen.model(family, attention)
    return model, torch.compile(model, backend="npu_cp", dynamic=dynamic, options=options)


def steps(model: Any, run: Any, kind: str, lengths: list[int], **kwargs: Any) -> tuple[float, float]:
    """Feed `lengths` tokens at a time to both; the largest error of logits and of caches."""
    ids = qwen.token_ids(1, sum(lengths))
    ours, theirs = (qwen.cache(kind, model.config, 1) for _ in range(2))
    worst, start = 0.0, 0
    with torch.no_grad():
        for length in lengths:
            chunk = ids[:, start : start + length]
            expected = model(chunk, **qwen.handed(theirs), **kwargs).logits
            worst = max(worst, difference(expected, run(chunk, **qwen.handed(ours), **kwargs).logits))
            start += length
    return worst, max(difference(a, b) for a, b in zip(qwen.rows(theirs), qwen.rows(ours), strict=True))


def statuses() -> list[tuple[str, str]]:
    return [(r.status, r.sites[0].mask if r.sites else "") for r in cppass.reports()]


@scenario
def prefill_then_decode() -> dict[str, Any]:
    model, run = compiled(dynamic=True)
    return {"errors": steps(model, run, "static early", [37, 1, 1, 1]), "reports": statuses()}


@scenario
def second_chunk_on_a_filled_static_cache() -> dict[str, Any]:
    model, run = compiled()
    return {"errors": steps(model, run, "static early", [16, 16, 13]), "reports": statuses()}


@scenario
def second_chunk_on_a_filled_dynamic_cache() -> dict[str, Any]:
    model, run = compiled(dynamic=True)
    return {"errors": steps(model, run, "dynamic", [16, 21, 13]), "reports": statuses()}


@scenario
def one_graph_for_many_lengths() -> dict[str, Any]:
    model, run = compiled(dynamic=True)
    errors = [steps(model, run, "static early", [length])[0] for length in (37, 64, 16, 53, 8)]
    return {"errors": errors, "reports": statuses()}


@scenario
def padding_mask() -> dict[str, Any]:
    model, run = compiled(dynamic=False)
    ids, mask = qwen.token_ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        got = run(ids, attention_mask=mask).logits
    return {"errors": (difference(expected[mask.bool()], got[mask.bool()]),), "notes": cppass.reports()[-1].notes}


@scenario
def packed_sequences() -> dict[str, Any]:
    model, run = compiled(dynamic=False)
    ids = qwen.token_ids(1, 24)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        got = run(ids, position_ids=positions, use_cache=False).logits
    return {"errors": (difference(expected, got),), "notes": cppass.reports()[-1].notes}


@scenario
def last_token_logits() -> dict[str, Any]:
    model, run = compiled()
    errors = [steps(model, run, "static early", [n], logits_to_keep=k)[0] for n, k in ((37, 1), (37, 3), (64, 1))]
    return {"errors": errors, "gathers": [g.why for g in cppass.reports()[0].gathers]}


@scenario
def hidden_states_and_attention_weights() -> dict[str, Any]:
    model, run = compiled(attention="eager", dynamic=False)
    ids = qwen.token_ids(1, 21)
    wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    with torch.no_grad():
        expected, got = model(ids, **wanted), run(ids, **wanted)
    pairs = zip(expected.hidden_states + expected.attentions, got.hidden_states + got.attentions, strict=True)
    return {"errors": [difference(a, b) for a, b in pairs], "forms": [s.form for s in cppass.reports()[-1].sites]}


@scenario
def inputs_embeds() -> dict[str, Any]:
    model, run = compiled(dynamic=False)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(qwen.token_ids(2, 21))
        expected, got = model(inputs_embeds=embeds).logits, run(inputs_embeds=embeds).logits
    return {"errors": (difference(expected, got),), "reports": statuses()}


@scenario
def generate() -> dict[str, Any]:
    """m.compile(...), since generate() of a torch.compile(m) wrapper calls the module underneath, uncompiled."""
    model = qwen.model("dense", "sdpa")
    ids = qwen.token_ids(1, 21)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, generation_config=settings)
    model.compile(backend="npu_cp", dynamic=True)
    try:
        got = model.generate(ids, generation_config=settings)
    finally:
        model._compiled_call_impl = None
    return {"equal": torch.equal(expected, got), "reports": statuses()}


@scenario
def generate_with_a_static_cache_and_compile_config() -> dict[str, Any]:
    model = qwen.model("dense", "sdpa")
    ids = qwen.token_ids(1, 21)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, cache_implementation="static")
    settings.compile_config = CompileConfig(backend="npu_cp", fullgraph=False, dynamic=True)
    expected = model.generate(
        ids, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    )
    model.compile(backend="npu_cp", dynamic=True)
    try:
        got = model.generate(ids, generation_config=settings)
    finally:
        model._compiled_call_impl = None
    return {"equal": torch.equal(expected, got), "reports": statuses()}


class Broken(torch.nn.Module):
    """A model whose second half is in a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = qwen.model("dense", "sdpa").model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model(ids, use_cache=False).last_hidden_state
        torch._dynamo.graph_break()
        positions = torch.arange(ids.shape[1])[None]
        cos, sin = self.model.rotary_emb(x, positions)
        torch._dynamo.graph_break()
        for layer in self.model.layers:
            x = layer(x, position_embeddings=(cos, sin), attention_mask=None)
        return x


@scenario
def graph_break() -> dict[str, Any]:
    model = Broken().eval()
    ids = qwen.token_ids(2, 21)
    with torch.no_grad():
        expected = model(ids)
        got = torch.compile(model, backend="npu_cp", dynamic=False)(ids)
    return {"errors": (difference(expected, got),), "reports": statuses()}


@scenario
def moe_with_batched_experts() -> dict[str, Any]:
    model, run = compiled("moe-batched", dynamic=False)
    return {"errors": steps(model, run, "static early", [37]), "notes": cppass.reports()[-1].notes}


@scenario
def bfloat16() -> dict[str, Any]:
    """Distances to the same weights in float32: ours, and eager's on one device."""
    model = copy.deepcopy(qwen.model("dense", "sdpa")).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    run = torch.compile(model, backend="npu_cp", dynamic=False)
    ids = qwen.token_ids(1, 64)
    with torch.no_grad():
        logits = [m(ids, use_cache=False).logits.float() for m in (exact, model, run)]
    return {"eager": difference(logits[0], logits[1]), "ours": difference(logits[0], logits[2])}


@scenario
def min_tokens_leaves_short_prefills_alone() -> dict[str, Any]:
    model, run = compiled(dynamic=True, min_tokens=32)
    errors = [steps(model, run, "static early", [n])[0] for n in (37, 20)]
    return {"errors": errors, "reports": statuses(), "reasons": [r.reason for r in cppass.reports()]}


@scenario
def broken_layouts_are_noticed() -> dict[str, Any]:
    """Controls: contiguous sharding, and gathered rows left in rank-major order."""
    errors = {}
    for name, function in {
        "owned_blocks": lambda rank, cp_size: (2 * rank, 2 * rank + 1),
        "block_owner": lambda block, cp_size: (block // 2, block % 2),
    }.items():
        torch._dynamo.reset()
        model, run = compiled(dynamic=False)
        with unittest.mock.patch(f"cppass.layout.{name}", function):
            errors[name] = max(steps(model, run, "static early", [64]))
    return {"differences": errors}


@scenario
def inductor() -> dict[str, Any]:
    model, run = compiled(dynamic=False, inner="inductor")
    return {"errors": steps(model, run, "static early", [37, 1]), "reports": statuses()}


@scenario
def subgroup_by_mesh() -> dict[str, Any]:
    mesh = dist.init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "cp"))
    model, run = compiled(dynamic=False, group=mesh["cp"])
    errors = list(steps(model, run, "static early", [21]))
    model, run = compiled(dynamic=False, group=mesh["cp"].get_group())
    errors += steps(model, run, "static early", [21])
    model, run = compiled(dynamic=False, group=mesh["cp"].get_group().group_name)
    errors += steps(model, run, "static early", [21])
    return {"errors": errors, "reports": statuses()}


@scenario
def different_token_ids_are_noticed() -> dict[str, Any]:
    _, run = compiled(dynamic=False, check_inputs=True)
    ids = qwen.token_ids(1, 21)
    with torch.no_grad():
        run(ids, use_cache=False)
        run(qwen.token_ids(1, 21, seed=dist.get_rank()), use_cache=False)
    return {}


@scenario
def gradients_are_refused() -> dict[str, Any]:
    _, run = compiled()
    run(qwen.token_ids(1, 21))
    return {}


@scenario
def a_group_without_this_rank_is_refused() -> dict[str, Any]:
    group = dist.new_group([0])
    _, run = compiled(group=group)
    with torch.no_grad():
        run(qwen.token_ids(1, 21))
    return {"status": cppass.reports()[-1].status}


@scenario
def suppressed_errors_are_refused() -> dict[str, Any]:
    with torch._dynamo.config.patch(suppress_errors=True), torch.no_grad():
        _, run = compiled()
        run(qwen.token_ids(1, 21))
    return {}


@scenario
def recompile_limit_is_reported() -> dict[str, Any]:
    model, run = compiled(dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        errors = [steps(model, run, "static early", [n])[0] for n in (8, 9, 10)]
    return {"errors": errors, "reasons": [r.reason for r in cppass.reports()]}
