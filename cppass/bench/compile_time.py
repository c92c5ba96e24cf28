"""Section `compile`: what the pass adds to a compilation. Widths are tiny: compile time follows the number of nodes.

Dynamo and AOT autograd run as they do under the backend; the pass (rewrite and host lowering) is timed inside the
inference compiler, so that both come from one compilation. The compiled code is not run: it ends at the first line.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from cppass.bench.ratio import Ratio
from cppass.bench.table import Bars, Table
from cppass.config import CPConfig
from cppass.demo.display import Display
from cppass.demo.model import cache_argument
from cppass.errors import CPError
from cppass.pipeline import rewrite_graph
from cppass.report import REWRITTEN
from cppass.target import Ranks, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, StaticCache

CP_SIZE, TOKENS, CACHE = 2, 64, 512
KV_HEADS, HEAD_DIM = 2, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    family: "dense" (Qwen3) or "moe" (Qwen3-MoE with 8 experts).
    layers: of the model.
    dynamic: torch.compile's `dynamic`.
    """

    family: str
    layers: int
    dynamic: bool = False

    @property
    def kind(self) -> str:
        return f"{self.family} {'dynamic' if self.dynamic else 'static'}"


CASES = (
    *(Case("dense", layers) for layers in (12, 36)),
    *(Case("moe", layers) for layers in (12, 94)),
    *(Case("dense", layers, dynamic=True) for layers in (12, 36)),
)
QUICK = tuple(dataclasses.replace(case, layers=4 if case.layers == 12 else 8) for case in CASES)
TURNS, QUICK_TURNS = 3, 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """One case, compiled several times.

    Attributes:
        nodes: of the graph that the pass takes.
        rest: seconds of Dynamo and AOT autograd, one number per compilation.
        rewrite, lower: seconds of the two parts of the pass.
    """

    case: Case
    nodes: int
    rest: tuple[float, ...]
    rewrite: tuple[float, ...]
    lower: tuple[float, ...]

    @property
    def passes(self) -> tuple[float, ...]:
        return tuple(a + b for a, b in zip(self.rewrite, self.lower, strict=True))

    @property
    def share(self) -> Ratio:
        """The pass over Dynamo and AOT autograd."""
        return Ratio.of(self.passes, self.rest)

    @property
    def per_layer(self) -> tuple[float, ...]:
        """Seconds of the pass per layer."""
        return tuple(seconds / self.case.layers for seconds in self.passes)


@dataclasses.dataclass(frozen=True)
class CompileResult:
    costs: tuple[Cost, ...]

    def growth(self, cost: Cost) -> Ratio:
        """Seconds per layer over those of the first case of the kind, turn by turn: 1 where the pass is linear."""
        return Ratio.of(cost.per_layer, self._base(cost).per_layer)

    def _base(self, cost: Cost) -> Cost:
        return next(c for c in self.costs if c.case.kind == cost.case.kind)

    def table(self) -> Table:
        return Table(
            "time of the pass against Dynamo and AOT autograd",
            (
                "model, layers",
                "nodes",
                "Dynamo + AOT, s",
                "pass, s",
                "share",
                "ms per layer",
                "growth",
            ),
            tuple(
                (
                    f"{cost.case.kind}, {cost.case.layers}",
                    f"{cost.nodes:,}",
                    f"{statistics.median(cost.rest):.2f}",
                    f"{statistics.median(cost.passes):.3f}",
                    cost.share.text("%", 100, 1),
                    f"{statistics.median(cost.per_layer) * 1e3:.1f}",
                    self.growth(cost).text() if cost is not self._base(cost) else "1",
                )
                for cost in self.costs
            ),
            (
                f"Tiny widths, {TOKENS} tokens, static cache, P = {CP_SIZE}, one thread, {len(self.costs[0].rest)} "
                "compilations of each, all cases in turns: the median (least..most). The pass is the rewrite and the "
                "host lowering, both inside AOT autograd's inference compiler; share is the pass over the rest.",
                "ms per layer is the pass over the layers, and growth is that over the first row of the same kind: "
                "1 is linear, and less is a cost that comes once per graph.",
            ),
        )

    def bars(self) -> Bars:
        return Bars(
            "time of the pass over that of Dynamo and AOT autograd",
            "share, %",
            tuple(f"{c.case.kind}\n{c.case.layers} layers" for c in self.costs),
            (("pass", tuple(100 * c.share.median for c in self.costs)),),
            (tuple((100 * c.share.spread[0], 100 * c.share.spread[1]) for c in self.costs),),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(quick: bool, display: Display) -> CompileResult:
    return measure_cases(QUICK if quick else CASES, QUICK_TURNS if quick else TURNS, display)


def measure_cases(cases: Sequence[Case], turns: int, display: Display) -> CompileResult:
    """Compile every case in every turn.

    Raises:
        CPError: CP653, the pass refuses or leaves alone a graph, or a model has several.
    """
    display.start("compile", 1 + turns * len(cases))
    with one_thread():
        display.step("warm-up")
        for case in {case.kind: dataclasses.replace(case, layers=1) for case in cases}.values():
            compile_once(case)
        samples: dict[Case, list[Sample]] = {case: [] for case in cases}
        for turn in range(turns):
            for case in cases:
                display.step(f"{case.kind}, {case.layers} layers, {turn + 1} of {turns}")
                samples[case].append(compile_once(case))
    display.finish()
    return CompileResult(
        tuple(
            Cost(
                case,
                found[0].nodes,
                tuple(s.whole - s.rewrite - s.lower for s in found),
                tuple(s.rewrite for s in found),
                tuple(s.lower for s in found),
            )
            for case, found in samples.items()
        )
    )


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds of one compilation; `whole` holds the other two."""

    nodes: int
    whole: float
    rewrite: float
    lower: float


class _Reached(Exception):
    """The compiled code was called: compilation is over."""


def compile_once(case: Case) -> Sample:
    """Compile a new model of the case from nothing."""
    torch._dynamo.reset()
    model, cache = build(case)
    seen: list[tuple[int, float, float]] = []

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes, start = len(gm.graph.nodes), time.perf_counter()
        report = rewrite_graph(gm, CPConfig(cp_size=CP_SIZE, min_tokens=0), CP_SIZE)
        middle = time.perf_counter()
        load("host").lower(gm, Ranks(0, CP_SIZE, "0"), CPConfig(cp_size=CP_SIZE))
        seen.append((nodes, middle - start, time.perf_counter() - middle))
        if report.status != REWRITTEN:
            raise CPError("CP653", f"{case}: the graph was {report.status}: {report.reason}", "this is a bug of cppass")

        def stop(*args: Any) -> Any:
            raise _Reached

        return stop

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, keep_inference_input_mutations=True)
    forward = torch.compile(model, backend=backend, dynamic=case.dynamic)
    ids = torch.randint(0, 128, (1, TOKENS))
    gc.collect()
    start = time.perf_counter()
    try:
        with torch.no_grad():
            forward(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(model.forward): cache})
    except _Reached:
        pass
    whole = time.perf_counter() - start
    torch._dynamo.reset()
    if len(seen) != 1:
        raise CPError("CP653", f"{case}: compiled as {len(seen)} graphs; one is expected", "this is a bug of cppass")
    return Sample(seen[0][0], whole, *seen[0][1:])


def build(case: Case) -> tuple[PreTrainedModel, StaticCache]:
    """A tiny model and an empty cache of it, allocated."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache

    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 2 * KV_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": 128,
        "attn_implementation": "sdpa",
    }
    moe: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    model: PreTrainedModel = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **moe))
        if case.family == "moe"
        else Qwen3ForCausalLM(Qwen3Config(**shape))
    )
    model.train(False)
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    cache.early_initialization(1, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    return model, cache


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch, as a rank has; what was set before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
