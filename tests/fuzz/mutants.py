"""Mutants of rewritten graphs: what verification says of them, and whether they compute something else.

A mutant that the shape functions refuse, or that cannot run, gives no wrong number: it is malformed. One that gives the
same numbers is equivalent. Of the others, the share that verification notices is its score.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fuzz.attention import Attention
from fuzz.check import Case, as_list, cloned, traced
from fuzz.mutations import MUTATIONS, Mutate
from fuzz.npu_batches import Batch
from fuzz.npu_batches import case_of as batch_case
from fuzz.programs import Layer, Program, case_of
from runner.sharded_snippets import BATCH, NAMED, UNEVEN, attend, layer_of, rows_of
from runner.sharded_snippets import Layer as ShardedLayer
from runner.sharded_snippets import traced as traced_runner
from torch import Tensor, fx

from cppass.capture import capture
from cppass.errors import VerifyError
from cppass.match import find_sites
from cppass.plan import make_plan
from cppass.prepare import prepare
from cppass.rewrite import rewrite
from cppass.shard import propagate
from cppass.sharded_inputs import entering_inputs
from cppass.sharded_plan import make_sharded_plan
from cppass.sharded_rewrite import rewrite_sharded
from cppass.sharded_verify import verify_sharded
from cppass.simulator import run_in_lockstep
from cppass.step import Step, step_of
from cppass.torch_private import fake_mode_of
from cppass.verify import verify

TRIES = 4
NO_PLACE, MALFORMED, EQUIVALENT, CAUGHT, SURVIVED = "no place", "malformed", "equivalent", "caught", "survived"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A rewritten graph.

    Attributes:
        graph: with canonical ops; mutants are edited copies of it.
        check: verification of such a graph.
        inputs: of each rank.
        results: what each rank returns and has in its inputs after the run.
    """

    graph: fx.Graph
    check: Callable[[fx.Graph], None]
    inputs: Sequence[Sequence[Tensor]]
    results: list[list[Tensor]]


def subject(graph: fx.Graph, check: Callable[[fx.Graph], None], inputs: Sequence[Sequence[Tensor]]) -> Subject:
    check(graph)
    return Subject(graph, check, inputs, results(graph, inputs))


def results(graph: fx.Graph, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    gm = fx.GraphModule(graph.owning_module, graph)
    given = [cloned(own) for own in inputs]
    with torch.no_grad():
        outputs = run_in_lockstep([gm] * len(given), given)
    return [as_list(seen) + after for seen, after in zip(outputs, given, strict=True)]


# -- subjects ----------------------------------------------------------------------------------------------------------


def replicated(case: Case) -> Subject:
    graph = prepare(capture(traced(case), case.inputs))
    sites = find_sites(graph).sites
    step = step_of(sites, case.cp_size)
    assert isinstance(step, Step)
    plan = make_plan(graph, sites, propagate(graph, sites), step, False)
    assert not plan.refusals
    return subject(rewrite(graph, plan), lambda mutant: verify(mutant, plan), [case.inputs] * case.cp_size)


def sharded(packed: bool, even: bool) -> Subject:
    batch, cp_size = BATCH if even else UNEVEN, 2
    plans = [batch.plan(cp_size, rank) for rank in range(cp_size)]
    inputs = [(plan.shard(rows_of(batch)), *layer_of(batch, plan).tensors) for plan in plans]

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        layer = ShardedLayer(*tensors)
        out = attend(x, layer, plans[0], packed=packed)
        return out.index_select(0, layer.last - 1)

    graph = prepare(capture(traced_runner(run, inputs[0]), inputs[0]))
    entering = entering_inputs(graph, NAMED.items(), None)
    plan = make_sharded_plan(graph, find_sites(graph).sites, entering, cp_size, "balanced")
    assert not plan.refusals
    return subject(rewrite_sharded(graph, plan), lambda mutant: verify_sharded(mutant, plan), inputs)


CACHED = Attention(cache="index_copy_", prefix=3, counted=True, mask="k <= q", turn="half")
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "two layers, cache, last token": lambda: replicated(
        case_of(
            Program(
                tokens=16,
                hidden=16,
                entry="ids",
                layers=(Layer(CACHED, feed_forward="gated"), Layer(CACHED)),
                returned=("last",),
                tail=(("last", 1, 0),),
            )
        )
    ),
    "uneven, growing cache, window, three ranks": lambda: replicated(
        case_of(
            Program(
                cp_size=3,
                batch=2,
                tokens=13,
                layers=(Layer(Attention(4, 2, cache="cat", prefix=3, mask="window of 3", turn="interleaved")),),
                returned=("caches", "hidden"),
                tail=(("scale", 0, 1),),
            )
        )
    ),
    "padding mask, tokens mixed": lambda: replicated(
        case_of(
            Program(
                tokens=12,
                layers=(Layer(Attention(mask="padding", normed=True), after=(("mixing: cumsum", 0), ("rms norm", 0))),),
                returned=("logits",),
            )
        )
    ),
    "written out, experts": lambda: replicated(
        case_of(
            Program(
                tokens=13,
                layers=(
                    Layer(Attention(form="soft-capped", mask="k <= q"), feed_forward="by sort"),
                    Layer(Attention(form="written out", mask="k <= q", hidden="where -inf"), (("columns rolled", 0),)),
                ),
            )
        )
    ),
    "paged": lambda: replicated(batch_case(Batch(lengths=(16, 8), prefixes=(5, 0)))),
    "paged, uneven": lambda: replicated(batch_case(Batch(lengths=(13, 1, 6), prefixes=(0, 9, 3), lse=True))),
    "packed, the write after": lambda: replicated(batch_case(Batch(form="fresh", lengths=(11, 8), prefixes=(0, 0)))),
    "sharded, paged": lambda: sharded(False, True),
    "sharded, packed": lambda: sharded(True, False),
}


# -- one mutant --------------------------------------------------------------------------------------------------------


def judged(whole: Subject, mutate: Mutate, r: random.Random) -> str:
    """What a mutant is; see the module's docstring."""
    graph = fx.Graph(whole.graph.owning_module)
    graph.output(graph.graph_copy(whole.graph, {}))
    if not mutate(graph, r):
        return NO_PLACE
    try:
        describe(graph)
        same = _same(results(graph, whole.inputs), whole.results)
    except Exception:
        return MALFORMED
    return EQUIVALENT if same else CAUGHT if _noticed(whole, graph) else SURVIVED


def _noticed(whole: Subject, graph: fx.Graph) -> bool:
    try:
        whole.check(graph)
    except VerifyError:
        return True
    return False


def describe(graph: fx.Graph) -> None:
    """Metadata of what the mutation changed, as a rewriter would have left it."""
    graph.lint()
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it reports each shape that does not fit
    with fake_mode_of(graph):  # type: ignore[union-attr]
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def _same(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    return all(_close(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True))


def _close(x: Any, y: Tensor) -> bool:
    if not isinstance(x, Tensor) or x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-5, equal_nan=True)


@dataclasses.dataclass
class Score:
    """Verdicts by mutation; survivors as (subject, mutation, seed)."""

    counts: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    survivors: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)

    def of(self, kind: str | None = None) -> tuple[int, int]:
        """(caught, caught or survived), of one kind or of all."""
        chosen = [self.counts[kind]] if kind is not None else list(self.counts.values())
        caught = sum(c[CAUGHT] for c in chosen)
        return caught, caught + sum(c[SURVIVED] for c in chosen)

    def lines(self) -> list[str]:
        rows = [f"{'mutation':<38} caught  of  equivalent  malformed"]
        for kind, c in self.counts.items():
            caught, all_of = self.of(kind)
            rows.append(f"{kind:<38} {caught:>6} {all_of:>4} {c[EQUIVALENT]:>10} {c[MALFORMED]:>10}")
        caught, all_of = self.of()
        return [*rows, f"score: {caught} of {all_of} ({100 * caught / max(all_of, 1):.1f} %)"]


def _judged(whole: Subject, mutate: Mutate, r: random.Random, counts: collections.Counter[str]) -> str:
    """The verdict on a mutant that runs, if there is one in a few tries."""
    for _ in range(TRIES):
        verdict = judged(whole, mutate, r)
        counts[verdict] += 1
        if verdict in (EQUIVALENT, CAUGHT, SURVIVED):
            break
    return verdict


def scored(rounds: int, seed: int) -> Score:
    """Every mutation of every subject, `rounds` times."""
    score = Score({name: collections.Counter() for name in MUTATIONS})
    for name, build in SUBJECTS.items():
        whole = build()
        for kind, mutate in MUTATIONS.items():
            for i in range(rounds):
                verdict = _judged(whole, mutate, random.Random(f"{seed} {name} {kind} {i}"), score.counts[kind])
                if verdict == SURVIVED:
                    score.survivors.append((name, kind, i))
    return score
