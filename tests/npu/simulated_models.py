"""One step of a demo model on P ranks in one process: weights and caches are inputs of the graph, as compilers have it.

Shape suffixes: B sequences, T rows of the step (padding included), V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import cppass
from cppass.demo.npu.dense import Decoder, Qwen3
from cppass.demo.npu.forward_metadata import Step, causal_mask, plan_step
from cppass.demo.npu.moe import Qwen3Moe
from cppass.demo.presets import PRESETS

BLOCKS, BLOCK_SIZE, POSITIONS = 12, 128, 1536
KINDS: dict[str, Any] = {"dense": (Qwen3, "qwen3-tiny"), "moe": (Qwen3Moe, "qwen3-moe-tiny")}
MASK = causal_mask()
TENSORS = ("slot_mapping", "block_table", "cu_q_tensor", "mask")  # of the metadata; its lists stay lists of ints


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one rank, or one device, has after a step: logits [B, V] and, per layer, the caches of keys and of values.

    hidden: [T, F] of the last norm, of every row; None unless asked for.
    """

    logits: Tensor
    caches: list[Tensor]
    hidden: Tensor | None = None


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """Weights by seed; norms that do something, and caches that are full of what nobody may read or overwrite."""
    torch.manual_seed(seed)
    model_type, preset = KINDS[kind]
    model: Decoder = model_type(PRESETS[preset], blocks=BLOCKS, block_size=BLOCK_SIZE, positions=POSITIONS, dtype=dtype)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and module.weight.dim() == 1:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    for cache in cached(model):
        cache.normal_()
    return model


def widened(model: Decoder, kind: str) -> Decoder:
    """The same weights, rope tables and caches in float32."""
    wide = build(kind)
    for ours, theirs in zip(_state(wide).values(), _state(model).values(), strict=True):
        ours.copy_(theirs)
    return wide


def cached(model: Decoder) -> list[Tensor]:
    return [x for cache in model.caches() for x in (cache.k, cache.v)]


def planned(lengths: list[int], prefixes: list[int] | None = None, padded_to: int | None = None) -> Step:
    """A step on shuffled blocks that stay where they are from step to step."""
    blocks: dict[str, Any] = {"block_size": BLOCK_SIZE, "blocks": BLOCKS, "shuffle": 5, "mask": MASK}
    return plan_step(lengths, prefixes, capacity=BLOCKS // len(lengths) * BLOCK_SIZE, padded_to=padded_to, **blocks)


def token_ids(plan: Step) -> Tensor:
    """[T]: random, in the padding too."""
    count = plan.position_ids.numel()
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(count))


def alone(model: Decoder, ids: Tensor, plan: Step, *, hidden: bool = False, caches: list[Tensor] | None = None) -> Ran:
    """On one device; the model's own caches stay as they are. `caches`: those of an earlier step."""
    run, inputs = _as_function(model, ids, plan, hidden)
    for own, given in zip(_caches_of(model, inputs), caches or (), strict=caches is not None):
        own.copy_(given)
    return _ran(model, run(*inputs), inputs, hidden)


def on_ranks(model: Decoder, ids: Tensor, plan: Step, cp_size: int, *, hidden: bool = False) -> list[Ran]:
    """On every rank, the graphs that ranks would run; the model's own caches stay as they are."""
    run, inputs = _as_function(model, ids, plan, hidden)
    assert _report(run, inputs, cp_size).status == "rewritten"  # else every rank would run the whole step
    ranks = cppass.simulate(_traced(run, inputs), inputs, cp_size)
    return [_ran(model, seen, after, hidden) for seen, after in ranks]


def report(model: Decoder, ids: Tensor, plan: Step, cp_size: int) -> cppass.Report:
    return _report(*_as_function(model, ids, plan, False), cp_size)


def rewritten(model: Decoder, ids: Tensor, plan: Step, cp_size: int) -> fx.GraphModule:
    """The graph of every rank, in ops that name no rank."""
    run, inputs = _as_function(model, ids, plan, False)
    gm = _traced(run, inputs)
    assert cppass.run_pass(gm, inputs, cp_size=cp_size, lower=False).status == "rewritten"
    return gm


def _as_function(model: Decoder, ids: Tensor, plan: Step, hidden: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step as a function of tensors, and copies of these."""
    state = _state(model)

    def run(ids: Tensor, position_ids: Tensor, *rest: Tensor) -> Any:
        metadata = dataclasses.replace(plan.metadata, **dict(zip(TENSORS, rest, strict=False)))
        own, kept = dict(zip(state, rest[len(TENSORS) :], strict=True)), []
        hook = model.norm.register_forward_hook(lambda _, __, out: kept.append(out[0]))
        logits = torch.func.functional_call(model, own, (ids, position_ids, metadata))
        hook.remove()
        return (logits, *kept) if hidden else logits

    given = (ids, plan.position_ids, *(getattr(plan.metadata, name) for name in TENSORS), *state.values())
    return run, tuple(x.clone() for x in given)


def _state(model: Decoder) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _caches_of(model: Decoder, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Among the inputs of `_as_function`."""
    own = zip(_state(model), inputs[2 + len(TENSORS) :], strict=True)
    return [x for name, x in own if name.endswith((".cache.k", ".cache.v"))]


def _ran(model: Decoder, seen: Any, after: Sequence[Tensor], hidden: bool) -> Ran:
    caches = _caches_of(model, after)
    return Ran(seen[0], caches, seen[1]) if hidden else Ran(seen, caches)


def _report(run: Callable[..., Any], inputs: tuple[Any, ...], cp_size: int) -> cppass.Report:
    return cppass.run_pass(_traced(run, inputs), inputs, cp_size=cp_size, lower=False)


def _traced(run: Callable[..., Any], inputs: tuple[Any, ...]) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(run, tracing_mode="fake")(*inputs)
