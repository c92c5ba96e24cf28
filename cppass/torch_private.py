"""Private parts of torch that cppass needs, in one place. Seen in torch 2.13."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from cppass.errors import CPError

RESTARTS = (RestartAnalysis, SkipFrame)  # Dynamo's own control flow; not failures


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode of a graph's metadata, None where no node has a fake tensor."""
    for node in graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return None


def compile_number() -> tuple[str, int] | None:
    """(compile id as text, how often this frame was compiled before) while Dynamo compiles, else None."""
    current: Any = torch._guards.CompileContext.current_compile_id()
    return None if current is None else (str(current), int(current.frame_compile_id or 0))


def dynamo_inputs(gm: fx.GraphModule) -> list[str]:
    """What the compiled function calls each input of a Dynamo graph, in order: "position_ids", "metadata.slots[0]".

    before:  L['metadata'].slot_mapping            after:  metadata.slot_mapping
    """
    names = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            name = getattr(source, "name", "")
            text = str(name() if callable(name) else name)
            names.append(re.sub(r"^L\['(\w+)'\]", r"\1", text))
    return names


def aot_inputs(graph: fx.Graph, dynamo_names: Sequence[str]) -> dict[str, str]:
    """The same names by placeholder of the graph that AOTAutograd made of it, "" for what is no input of it."""
    found = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            index = getattr(node.meta.get("desc"), "idx", None)
            known = isinstance(index, int) and index < len(dynamo_names)
            found[node.name] = dynamo_names[index] if known else ""  # type: ignore[index]
    return found


def resolve_group(name: str) -> Any:
    """The process group that functional collectives know by this name.

    Raises:
        RuntimeError, ValueError: there is none.
    """
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def store_of_group(name: str) -> Any:
    """The store by which the ranks of this process group found each other; None for a group that only pretends to be.

    Raises:
        RuntimeError, ValueError: there is no such group.
        CPError: CP504, torch keeps its stores elsewhere.
    """
    group = resolve_group(name)
    try:
        backend, store = torch.distributed.distributed_c10d._world.pg_map[group]
    except (AttributeError, KeyError, TypeError) as error:
        why = f"torch {torch.__version__} does not tell the store of a process group: {error!r}"
        raise CPError("CP504", why, "install torch 2.13") from error
    return None if backend == "fake" else store


def prefixed(store: Any, prefix: str) -> Any:
    """The store with a prefix before every key; a public class that torch's own stubs do not export."""
    return torch.distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def timeout_of_group(name: str) -> float:
    """Seconds that collectives of this process group wait for a rank; infinite where torch does not tell."""
    try:
        group = resolve_group(name)
        return min(group._get_backend(device).options._timeout.total_seconds() for device in group._device_types)  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError, ValueError):
        return float("inf")


def ranks_of_group(name: str) -> frozenset[int] | None:
    """Global ranks of the process group of this name, None where there is none."""
    try:
        return frozenset(torch.distributed.get_process_group_ranks(resolve_group(name)))
    except (RuntimeError, ValueError, AttributeError):
        return None


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal whatever the symbols are; installs no guard."""
    return bool(statically_known_true(a == b))


def hinted(x: torch.Tensor) -> tuple[int, ...]:
    """Sizes in the call that is compiled, symbolic ones by their hints; installs no guard."""
    return tuple(int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in x.shape)


def zeros_like(x: torch.Tensor) -> torch.Tensor:
    """A real tensor of the sizes that a fake one has in the call that is compiled."""
    with unset_fake_temporarily():
        return torch.zeros(hinted(x), dtype=x.dtype, device=x.device)


def hints_of(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The value of every symbol of a graph in the call that is compiled; installs no guard."""
    hints: dict[sympy.Symbol, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                hints[size.node.expr] = int(size.node.hint)
    return hints


def graph_breaks() -> dict[str, int]:
    """Why Dynamo broke graphs so far in this process -> how often."""
    from torch._dynamo.utils import counters

    return {str(reason): int(times) for reason, times in counters["graph_break"].items()}


def is_unbacked(value: int | torch.SymInt) -> bool:
    """Whether a number was read from a tensor while tracing (item, tolist), so that no input of the graph gives it."""
    return isinstance(value, torch.SymInt) and bool(free_unbacked_symbols(value))


def is_plain_fake(x: torch.Tensor) -> bool:
    """A fake tensor that is its sizes, strides, dtype and device, and whose sizes are known."""
    numbers = (*x.shape, *x.stride(), x.storage_offset())
    plain = type(x) is FakeTensor and x.layout is torch.strided and x.constant is None and not x.requires_grad
    return plain and not any(is_unbacked(n) for n in numbers)


@contextmanager
def shapes_under(mode: FakeTensorMode) -> Iterator[None]:
    """Ops called in here make fake tensors, by the shape functions that tracing uses.

    Without the Python dispatcher, ops such as constant_pad_nd run C++ code, which makes numbers of symbolic sizes.
    """
    with mode, enable_python_dispatcher():
        yield


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one is a view of the other, or both of a third."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def fake_like(like: torch.Tensor, of: torch.Tensor | None) -> torch.Tensor:
    """A fake tensor with the sizes and strides of another: a view of `of`, or with memory of its own.

    What running an op under the fake mode ends in, without running it (a tenth of the time).
    """
    assert isinstance(like, FakeTensor)
    sizes, strides, mode = tuple(like.shape), like.stride(), like.fake_mode
    with unset_fake_temporarily():
        with in_kernel_invocation_manager(mode):
            if of is None:
                elem = torch.empty_strided(sizes, strides, dtype=like.dtype, device="meta")
            else:
                elem = torch.as_strided(of, sizes, strides, like.storage_offset())
        return FakeTensor(mode, elem, like.device)


def overload_of(op: Any) -> Any:
    """The overload behind "ns::op", "ns::op.overload", torch.ops.ns.op, or what torch.library.custom_op returned.

    Raises:
        LookupError: there is no such op, or it has several overloads and none is named; says which there are.
    """
    if isinstance(op, torch._ops.OpOverload):
        return op
    packet, wanted = getattr(op, "_opoverload", op), "default"
    if isinstance(op, str):
        namespace, _, name = op.partition("::")
        name, _, overload = name.partition(".")
        packet, wanted = getattr(getattr(torch.ops, namespace or "?"), name or "?", None), overload or "default"
    if isinstance(packet, torch._ops.OpOverload):
        return packet
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise LookupError("there is no such op (yet)")
    known = packet.overloads()  # type: ignore[no-untyped-call]
    if wanted not in known:
        raise LookupError(f"name one of its overloads: {', '.join(known)}")
    return getattr(packet, wanted)


def trace_artifact(name: str, encoding: str, payload: Callable[[], Any]) -> None:
    """An artifact in the log that TORCH_TRACE asks for; `payload` is called only where there is one.

    Args:
        encoding: "string", or "json" for lists and dicts.
    """
    torch._logging.trace_structured(  # type: ignore[attr-defined]
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def profiling() -> bool:
    """Whether torch.profiler records in this thread."""
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def without_fakes() -> AbstractContextManager[Any]:
    """Real tensors can be made in here while Dynamo or a compiler has its fake mode on."""
    return unset_fake_temporarily()


class OpLibrary:
    """Ops of one namespace, defined with schema, kernel and shape function (torch.library, typed)."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]

    def define(
        self, name: str, schema: str, run: Callable[..., Any], shape: Callable[..., Any], dispatch_key: str
    ) -> None:
        self._library.define(name + schema)  # type: ignore[no-untyped-call]
        self._library.impl(name, run, dispatch_key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{self.namespace}::{name}", shape, lib=self._library)
