"""Graphs that are refused, or found to be wrong: one trigger a code, by run_pass, explain, simulate and npu_pass."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from core.snippets import SNIPPETS, traced
from errors.bad import Bad
from npu.fused_snippets import BLOCK, MASK, D, dense, fused, paged
from npu.fused_snippets import traced as traced_npu
from runner.sharded_snippets import BATCH, NAMED, PLAN, Layer, attend, layer_of, layer_run, rows_of
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout, scaled_dot_product_attention

import cppass
from cppass.match import find_sites
from cppass.pipeline import rewrite_graph
from cppass.plan import make_plan
from cppass.prepare import prepare
from cppass.rewrite import rewrite
from cppass.shard import propagate
from cppass.simulator import _Lockstep
from cppass.step import Step, step_of
from cppass.verify import verify
from lowering.npu.hoist import hoist

aten, npu = torch.ops.aten, torch.ops.npu
Q, K, V = SNIPPETS["causal"].inputs(16)


def run_pass(function: Callable[..., Any], *inputs: Any, mode: str = "fake", **options: Any) -> Callable[[], Any]:
    """Trace a function and run the pass on it, for two ranks."""

    def act() -> Any:
        with torch.no_grad():
            gm = make_fx(function, tracing_mode=mode)(*inputs)
        return cppass.run_pass(gm, inputs, **{"cp_size": 2, **options})

    return act


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


# -- attention that is not rewritten -----------------------------------------------------------------------------------


@torch.library.custom_op("cppass_error_tests::paged_flash_attention", mutates_args=())
def paged_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v)


paged_flash_attention.register_fake(lambda q, k, v: torch.empty_like(q))


def flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


def flash_with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.25, True)[0]


def softmax_of_a_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x[0, 0] for x in (q, k, v))
    return torch.softmax(q @ k.t(), -1) @ v


def over_two_prompts(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Any:
    return causal(q, k, v), causal(other, other, other)


def in_a_branch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, causal, lambda q, k, v: q.clone(), (q, k, v))


def summed_over_the_same_ranks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(causal(q, k, v), "sum", "tp"))


def write_in_one_op(x: Tensor, kc: Tensor, vc: Tensor, slots: Tensor) -> Any:
    rows = x.view(-1, 2, D)
    npu_write = torch.ops.atb._npu_reshape_and_cache
    npu_write(rows, rows, kc, vc, slots)
    ends = {"actual_seq_qlen": [16], "actual_seq_kvlen": [16]}
    return fused("v2", rows, rows, rows, 2, 2, input_layout="TND", sparse_mode=3, atten_mask=MASK, **ends)[0]


PAGES = [torch.zeros(1, BLOCK, 2, D) for _ in range(2)]
SHORT = paged([10, 6], actual_seq_qlen=[10, 15])
BAND = dense("BSND", 1, 16, sparse_mode=5, atten_mask=MASK)

FIND = {
    "attention of an op nobody knows": Bad(
        "CP101",
        run_pass(paged_flash_attention, Q, K, V),
        ("cppass_error_tests.paged_flash_attention", "at node paged_flash_attention"),
        "scaled_dot_product_attention",
    ),
    "attention with dropout": Bad("CP102", run_pass(flash_with_dropout, Q, K, V), ("dropout_p=0.25",), "model.eval()"),
    "attention over a matrix": Bad("CP103", run_pass(softmax_of_a_matrix, Q, K, V), ("[16, 8]", "[B*H, S, D]"), "sdpa"),
    "the log-sum-exp of attention": Bad("CP104", run_pass(flash, Q, K, V), ("log-sum-exp",), "output alone"),
    "attention over two prompts": Bad(
        "CP105",
        run_pass(over_two_prompts, Q, K, V, torch.ones(1, 4, 24, 8)),
        ("24 query rows", "attention over 16"),
        "on their own",
    ),
    "a model without a graph": Bad(
        "CP106", lambda: cppass.explain(lambda: 3, cp_size=2), ("no graph",), "graph_breaks"
    ),
    "attention in a branch": Bad("CP107", run_pass(in_a_branch, Q, K, V), ("cond body", "hang"), "out of the body"),
    "query lengths that leave rows over": Bad(
        "CP109", run_pass(SHORT.run, *SHORT.inputs), ("add up to 15", "16 rows"), "whose last one is"
    ),
    "a sparse mode of another kind": Bad(
        "CP110", run_pass(BAND.run, *BAND.inputs), ("sparse_mode 5", "npu_fused_infer_attention_score_v2"), "fallback"
    ),
    "a cache write that is part of another op": Bad(
        "CP111",
        lambda: _refused(
            cppass.explain(write_in_one_op, torch.ones(16, 2 * D), *PAGES, torch.arange(16).int(), cp_size=2)
        ),
        ("atb._npu_reshape_and_cache", "writes the KV cache"),
        "npu_scatter_pa_kv_cache",
    ),
    "a sum over the ranks that share the sequence": Bad(
        "CP112",
        run_pass(summed_over_the_same_ranks, Q, K, V, group="tp"),
        ("all_reduce", "'tp'", "different rows"),
        "options={'group': mesh['cp']}",
    ),
}


def _refused(report: cppass.Report) -> None:
    """explain tells what the pass would refuse; it raises nothing."""
    raise cppass.RefusedError(report.refusals)


# -- what happens to token rows ----------------------------------------------------------------------------------------


def retention_behind_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    x = causal(q, k, v)
    return (x @ x.transpose(2, 3) * decay) @ x


def running_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cummax(causal(q, k, v), 2)[0] * 2


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dropout(causal(q, k, v), 0.5)


def of_two_parts(a: Tensor, b: Tensor) -> Tensor:
    x = torch.cat([a, b], 2)
    return causal(x, x, x) * 2


SHARD = {
    "retention": Bad(
        "CP201",
        run_pass(retention_behind_attention, Q, K, V, torch.ones(16, 16)),
        ("aten.bmm", "mixes rows"),
        "fallback",
    ),
    "an op without a rule, strictly": Bad(
        "CP202", run_pass(running_maximum, Q, K, V, strict=True), ("aten.cummax", "strict=True"), "strict=False"
    ),
    "random numbers": Bad("CP203", run_pass(dropped, Q, K, V), ("draws random numbers",), "model.eval()"),
    "tokens of two inputs": Bad(
        "CP302", run_pass(of_two_parts, Q, K[:, :, :9], mode="symbolic"), ("not one of any input",), "dynamic=False"
    ),
}


# -- inputs="sharded" --------------------------------------------------------------------------------------------------

LAYER, ROWS = layer_of(BATCH, PLAN), PLAN.shard(rows_of(BATCH))
SHARDED = {"inputs": "sharded", "sharded_inputs": NAMED}


def sharded(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Callable[[], Any]:
    return run_pass(function, *inputs, *LAYER.tensors, **{**SHARDED, **options})


def mean_of_all_rows(x: Tensor, *tensors: Tensor) -> Tensor:
    return attend(x, Layer(*tensors)).mean(0)


def whole_queries(x: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
    return attend(x, Layer(*tensors), queries=y)


def more_tokens_than_rows(x: Tensor, *tensors: Tensor) -> Tensor:
    return attend(x, Layer(*tensors), cu_q=[13, 63, 65])


def fewer_slots(x: Tensor, *tensors: Tensor) -> Tensor:
    layer = Layer(*tensors)
    return attend(x, dataclasses.replace(layer, slots=layer.slots[:32]))


def sdpa(x: Tensor, *tensors: Tensor) -> Tensor:
    q = (x @ tensors[0]).view(1, -1, 4, D).transpose(1, 2)
    return causal(q, q, q)


STEP = {
    "a dimension that the input lacks": Bad(
        "CP011",
        sharded(layer_run, ROWS, sharded_inputs={"arg0_1": 2}),
        ("'arg0_1'", "dimension 2", "[32, 32]"),
        "counts tokens",
    ),
    "attention that is not in TND": Bad("CP113", sharded(sdpa, ROWS), ("scaled_dot_product",), "inputs='replicated'"),
    "a step above its rows": Bad(
        "CP114", sharded(more_tokens_than_rows, ROWS), ("65 tokens", "32 local rows"), "larger bucket"
    ),
    "a mean over rows of all ranks": Bad(
        "CP310", sharded(mean_of_all_rows, ROWS), ("aten.mean", "different ranks"), "index_select(hidden, 0, cu_q - 1)"
    ),
    "a query that is whole": Bad(
        "CP311", sharded(whole_queries, ROWS, torch.ones_like(ROWS)), ("the query", "every rank"), "sharded_inputs"
    ),
    "inputs of no such name": Bad(
        "CP312",
        sharded(layer_run, ROWS, sharded_inputs={"input_ids": 0}),
        ("input_ids",),
        "as the model's forward does",
    ),
    "slots of one rank's rows": Bad("CP313", sharded(fewer_slots, ROWS), ("32 slots",), "plan.slot_mapping"),
}


# -- lowering ----------------------------------------------------------------------------------------------------------

PAGED = paged([16, 16])


def symbolic_lengths_in_the_hook() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by torchair 2.13.0
        torchair = importlib.import_module("torchair")
    snippet = dense("BSH", 1, 16, sparse_mode=3, atten_mask=MASK)
    config = torchair.CompilerConfig()
    config.mode = "reduce-overhead"
    with torch.no_grad():
        gm = make_fx(snippet.run, tracing_mode="symbolic")(*snippet.inputs)
    cppass.npu_pass(cp_size=2)(gm, snippet.inputs, config)


def a_length_that_is_no_arithmetic() -> None:
    """Refused earlier (CP103) in graphs that models have; here the lowered graph is damaged."""
    gm = traced_npu(PAGED)
    hoist(gm, PAGED.inputs, gm.graph.find_nodes(op="call_function", target=aten.mm.default)[:1])


def run_without_lowering() -> None:
    gm = traced(SNIPPETS["causal"], 16)
    cppass.run_pass(gm, (Q, K, V), cp_size=2, lower=False)
    gm(Q, K, V)


LOWER = {
    "a graph that was not lowered": Bad("CP401", run_without_lowering, ("cppass::",), "cppass.simulate"),
    "fused attention on the host target": Bad(
        "CP505",
        lambda: cppass.run_pass(traced_npu(PAGED), PAGED.inputs, cp_size=2, target="host"),
        ("cppass::fused_attention", "no host form"),
        "target='npu'",
    ),
    "a length that is no arithmetic": Bad("CP506", a_length_that_is_no_arithmetic, ("no arithmetic",), "list of ints"),
    "symbolic lengths in the hook": Bad("CP507", symbolic_lengths_in_the_hook, ("ACL graph",), "backend='npu_cp'"),
    "one call on the host": Bad("CP508", run_pass(causal, Q, K, V, attention_calls=1), ("attention_calls=1",), "leave"),
}


# -- bugs of cppass, caught: the plan or the graph is damaged here -----------------------------------------------------


def planned() -> tuple[fx.Graph, Any]:
    graph = prepare(traced(SNIPPETS["causal"], 16))
    sites = find_sites(graph).sites
    step = step_of(sites, 2)
    assert isinstance(step, Step)
    plan = make_plan(graph, sites, propagate(graph, sites), step, False)
    return rewrite(graph, plan), plan


def a_site_too_many() -> None:
    graph, plan = planned()
    verify(graph, dataclasses.replace(plan, sites=plan.sites * 2))


def local_rows_as_the_output() -> None:
    graph, plan = planned()
    (attention,) = (n for n in graph.nodes if n.target is torch.ops.cppass.attention.default)
    (output,) = graph.find_nodes(op="output")
    output.args = (attention,)
    verify(graph, plan)


def ranks_with_different_graphs() -> None:
    rewritten, plain = traced(SNIPPETS["causal"], 16), traced(SNIPPETS["causal"], 16)
    rewrite_graph(rewritten, cppass.CPConfig(cp_size=2), 2)
    _Lockstep([rewritten, plain], [[Q, K, V], [Q, K, V]]).run()


CAUGHT = {
    "a site that was not rewritten": Bad("CP402", a_site_too_many, ("2 attention sites", "1 rewritten"), "report"),
    "local rows as an output": Bad("CP403", local_rows_as_the_output, ("illegal rewrite", "output"), "report"),
    "ranks with different graphs": Bad("CP404", ranks_with_different_graphs, ("different nodes",), "report"),
}

GRAPHS = {**FIND, **SHARD, **STEP, **LOWER, **CAUGHT}
