"""Does a rule mean what it says? The op is run on every rank's rows and compared with the rows of the whole.

rule      operands (Local dim 1, whole) -> output Local dim 1
meaning   op(shard(x, dim 1), w)  ==  shard(op(x, w), dim 1)          for every rank of every group size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from cppass.axes import operand_names
from cppass.errors import ExtensionError, OptionError
from cppass.extend.register import overload_of
from cppass.layout import zigzag
from cppass.op_rules import rule_of
from cppass.ops import MEANINGS
from cppass.rules import Transfer, tensor_operands
from cppass.tokens import State, Tokens

TRIALS = 3  # draws of random numbers
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class RuleCheck:
    """What was tried.

    Attributes:
        op: the op by name.
        carried: dimensions in which tokens were let through, with equal results: "x dim 1 -> output dim 1".
        mixed: dimensions in which the rule says that tokens are mixed; there the pass gathers.
        skipped: dimensions that are too short to be cut.
    """

    op: str
    carried: tuple[str, ...]
    mixed: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: local rows give the rows of the whole"]
        for what, found in (("tokens pass", self.carried), ("mixed", self.mixed), ("too short", self.skipped)):
            lines += [f"  {what:<12} {', '.join(found)}"] if found else []
        return "\n".join(lines)


def check_rule(
    op: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    cp_sizes: Sequence[int] = (2, 3),
    keep_values: bool = False,
    tolerance: float | None = None,
) -> RuleCheck:
    """Try an op's rule on one call: wherever it lets tokens through, local rows must give local rows.

    Args:
        op: as for cppass.rule; it must run on the tensors given.
        args: of an example call; dimensions that may carry tokens have 2 * cp_size rows or more.
        kwargs: of the same call.
        cp_sizes: numbers of ranks to try.
        keep_values: False draws floating-point tensors anew (normal numbers); True takes them as they are, where the op
            wants others (probabilities). Integers are always taken as they are.
        tolerance: of the largest value, at least of 1; by default 1e-5 for float32.

    Raises:
        ExtensionError: CP205, the rule is wrong, with the dimension and the rank; CP206, nothing could be seen: the
            rule lets tokens through nowhere, dimensions are too short, or all rows are alike.
        OptionError: CP021, there is no such op, or it has no rule.
    """
    call = _Call(overload_of(op), args, kwargs or {})
    rule = rule_of(call.node)
    if rule is None:
        raise OptionError("CP021", f"{call.name} has no rule", "register one with cppass.rule")
    carried: dict[str, None] = {}
    mixed, skipped = [], []
    for slot, (name, x) in enumerate(zip(operand_names(call.node), call.tensors, strict=True)):
        for dim, rows in enumerate(x.shape):
            place = f"{name} dim {dim}"
            if rows < 2 * min(cp_sizes):
                skipped.append(place)
                continue
            transfer = rule.forward(call.node, slot, Tokens(dim), rows)
            if transfer is None:
                mixed.append(place)
                continue
            for cp_size in cp_sizes:
                if rows >= 2 * cp_size:
                    call.check(transfer, rows, cp_size, place, keep_values, tolerance)
            carried[f"{place} -> output dim {getattr(transfer.out, 'dim', '?')}"] = None
    if not carried:
        raise _unseen(call.name, "the rule lets no tokens through in any dimension that is long enough", min(cp_sizes))
    return RuleCheck(call.name, tuple(carried), tuple(mixed), tuple(skipped))


class _Call:
    """One call: as a node, and as numbers."""

    def __init__(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.op, self.name = op, op.name()
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        graph, nodes = fx.Graph(), list[Any]()
        given: dict[fx.Node, Tensor] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                node = graph.placeholder(f"x{len(given)}")
                node.meta["val"] = given[node] = leaf
                nodes.append(node)
            else:
                nodes.append(leaf)
        node_args, node_kwargs = pytree.tree_unflatten(nodes, spec)
        self.node = graph.call_function(op, node_args, node_kwargs)
        self.tensors = [given[x] for x in tensor_operands(self.node)]
        self.node.meta["val"] = self._raw(self.tensors)

    def _raw(self, tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda n: next(rest))
        with torch.no_grad():
            return self.op(*args, **kwargs)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        result = self._raw(tensors)
        return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]

    def check(
        self, way: Transfer, rows: int, cp_size: int, place: str, keep_values: bool, tolerance: float | None
    ) -> None:
        """Raise where the op on local rows is not local rows of the op."""
        claim = f"tokens in {place}, {way.out}, {cp_size} ranks"
        for seed in range(1 if keep_values else TRIALS):
            tensors = self.tensors if keep_values else [_drawn(x, seed + i) for i, x in enumerate(self.tensors)]
            whole = self.run(tensors)
            parts = [_cut(x, state, rows, cp_size) for x, state in zip(tensors, way.operands, strict=True)]
            expected = [self._expected(x, way.out, rows, cp_size, claim) for x in whole]
            self._visible(whole, way.out)
            for rank in range(cp_size):
                try:
                    seen = self.run([part[rank] for part in parts])
                except Exception as error:
                    why = f"the op raised {type(error).__name__} on local rows: {error}"
                    raise _wrong(self.name, claim, rank, why) from error
                for x, y in zip(seen, (part[rank] for part in expected), strict=True):
                    why = _difference(x, y, tolerance)
                    if why:
                        raise _wrong(self.name, claim, rank, why)

    def _expected(self, x: Tensor, out: State, rows: int, cp_size: int, claim: str) -> list[Tensor]:
        if not isinstance(out, Tokens) or out.dim >= x.dim() or x.shape[out.dim] != rows:
            raise _wrong(self.name, claim, 0, f"an output of the shape {list(x.shape)} does not have these rows there")
        return _cut(x, out, rows, cp_size)

    def _visible(self, whole: list[Tensor], out: State) -> None:
        """Values in which a mistake would show."""
        if any(x.is_floating_point() and bool(x.isnan().any()) for x in whole):
            raise _unseen(
                self.name, "the op returns NaN for normally distributed numbers (keep_values=True keeps yours)"
            )
        dim = out.dim if isinstance(out, Tokens) else 0
        if not any(bool((x != x.narrow(dim, 0, 1)).any()) for x in whole):
            raise _unseen(self.name, f"all rows of the output are alike in dim {dim}; give other values")


def _drawn(x: Tensor, seed: int) -> Tensor:
    if not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype).to(x.device)


def _cut(x: Tensor, state: State | None, rows: int, cp_size: int) -> list[Tensor]:
    """Every rank's part of a value in a state; None is the whole value."""
    if state is None:
        return [x] * cp_size
    assert isinstance(state, Tokens)
    even = zigzag((rows,), cp_size).even
    return MEANINGS["shard"]([x] * cp_size, state.dim, int(state.inner), [rows], cp_size, even)


def _difference(seen: Tensor, expected: Tensor, tolerance: float | None) -> str:
    """What is wrong, "" where the two are equal up to rounding."""
    if seen.shape != expected.shape or seen.dtype != expected.dtype:
        return f"{list(seen.shape)} {seen.dtype} instead of {list(expected.shape)} {expected.dtype}"
    if not seen.is_floating_point() and not seen.is_complex():
        return "" if torch.equal(seen, expected) else "other integers than those of the whole"
    allowed = TOLERANCE.get(seen.dtype, 1e-5) if tolerance is None else tolerance
    error = float((seen - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    return "" if error <= allowed * scale else f"values differ by {error:.2g} (allowed {allowed * scale:.2g})"


def _wrong(name: str, claim: str, rank: int, why: str) -> ExtensionError:
    return ExtensionError(
        "CP205",
        f"the rule of {name} is wrong: {claim}: rank {rank}: {why}",
        "let the rule return None, or no label for that axis, where the op mixes rows",
    )


def _unseen(name: str, why: str, cp_size: int = 0) -> ExtensionError:
    more = f"give tensors with {2 * cp_size} rows or more" if cp_size else "give an example call that shows something"
    return ExtensionError("CP206", f"nothing is proven of the rule of {name}: {why}", more)
