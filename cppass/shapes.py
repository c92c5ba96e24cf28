"""What a call returns, by what it is given: layers repeat, so an op is run on fake tensors once and then remembered.

    first layer   mm(x [64, 128], w [128, 256])   run on fake tensors: [64, 256], memory of its own
    next layers   the same call                   [64, 256], new memory: no op is run

A result that is a view of an operand is a view of the operand at hand, so whoever looks at who shares whose memory
(npugraph_ex does, before it writes in place) sees what running the op would show.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import fx

from cppass import torch_private
from cppass.tokens import size_of, sizes_of

Value: TypeAlias = Any  # of node.meta["val"]


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How one tensor of a result is made again: with the strides of `like`, in memory of its own or an operand's."""

    like: torch.Tensor
    of: int | None


class Shapes:
    """Values of calls, on the fake tensors of a graph; on real ones, where a graph's metadata holds real tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        self.mode = torch_private.fake_mode_of(graph)
        self._known: dict[Hashable, Any] = {}  # call -> recipes, in the structure of its result; None: always run it
        self._signatures: dict[int, tuple[torch.Tensor, Hashable]] = {}

    def __call__(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """What `target` returns, for arguments whose nodes stand for their values."""
        args, kwargs = fx.map_arg(args, _value), fx.map_arg(kwargs, _value)
        if self.mode is None:
            return target(*args, **kwargs)
        operands: list[torch.Tensor] = []
        key = (target, self._key(args, operands), self._key(kwargs, operands))
        recipe = self._known.get(key)
        if recipe is not None:
            return self._made(recipe, operands)
        with torch_private.shapes_under(self.mode):
            result = target(*args, **kwargs)
        self._known[key] = _recipes(result, operands)
        return result

    def _key(self, value: Any, operands: list[torch.Tensor]) -> Hashable:
        """Arguments as a key; tensors by what a shape function may ask of them."""
        if isinstance(value, torch.Tensor):
            operands.append(value)
            return self._signature(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._key(v, operands) for v in value)
        if isinstance(value, dict):
            return tuple((name, self._key(v, operands)) for name, v in value.items())
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return ("symbolic", value.node.expr)
        if isinstance(value, slice):
            return ("slice", str(value))
        return (type(value), repr(value) if isinstance(value, float) else value)

    def _signature(self, x: torch.Tensor) -> Hashable:
        known = self._signatures.get(id(x))
        if known is None:
            sizes, strides = sizes_of(x.shape), tuple(size_of(s) for s in x.stride())
            signature = (sizes, strides, size_of(x.storage_offset()), x.dtype, x.device, x.requires_grad, x.is_conj())
            known = self._signatures[id(x)] = (x, signature)  # holding x keeps its id its own
        return known[1]

    def _made(self, recipe: Any, operands: list[torch.Tensor]) -> Value:
        if isinstance(recipe, _Recipe):
            of = None if recipe.of is None else operands[recipe.of]
            return torch_private.fake_like(recipe.like, of)
        if isinstance(recipe, (list, tuple)):
            return type(recipe)(self._made(r, operands) for r in recipe)
        return recipe  # a number


def _recipes(result: Any, operands: list[torch.Tensor]) -> Any:
    """Recipes in the structure of a result; None where it cannot be made again from its operands' sizes alone."""
    if type(result) in (list, tuple):
        parts = [_recipes(r, operands) for r in result]
        alone = [p.like for p in parts if isinstance(p, _Recipe) and p.of is None]
        shared = any(torch_private.same_memory(a, b) for a, b in itertools.combinations(alone, 2))
        return None if shared or any(p is None for p in parts) else type(result)(parts)
    if isinstance(result, torch.Tensor):
        if not torch_private.is_plain_fake(result) or any(result is x for x in operands):
            return None
        of = next((i for i, x in enumerate(operands) if torch_private.same_memory(x, result)), None)
        return None if of is not None and operands[of].dtype != result.dtype else _Recipe(result, of)
    known = isinstance(result, int) or (isinstance(result, torch.SymInt) and not torch_private.is_unbacked(result))
    return result if known else None


def _value(node: fx.Node) -> Value:
    return node.meta["val"]
