"""Feed-forward parts of a random layer, mixtures of experts among them: hidden states [B, S, F] in, [B, S, F] out.

Shape suffixes: B batch, S tokens, F hidden size, E experts.
"""

from __future__ import annotations

import torch
from fuzz.inputs import Inputs
from fuzz.tokenwise import Step
from torch import Tensor
from torch.nn.functional import gelu, one_hot, silu

E = 3


def _gated(x: Tensor, given: Inputs, a: int) -> Tensor:
    f = x.shape[-1]
    gate, up = (x @ given.weight(f, 2 * f)).chunk(2, -1)
    return (silu(gate) * up) @ given.weight(f, f)


def _plain(x: Tensor, given: Inputs, a: int) -> Tensor:
    f = x.shape[-1]
    return gelu(x.reshape(-1, f) @ given.weight(f, f)).view(x.shape) @ given.weight(f, f)


def _routed(x: Tensor, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B * S, F], weights and numbers of the two best experts of each."""
    rows = x.reshape(-1, x.shape[-1])
    top, picked = (rows @ given.weight(x.shape[-1], E)).softmax(-1).topk(2, -1)
    return rows, top / top.sum(-1, keepdim=True), picked


def _all_experts(rows: Tensor, given: Inputs) -> Tensor:
    """[B * S, E, F]: what each expert would make of each row."""
    f = rows.shape[-1]
    return torch.einsum("rf,efg->reg", rows, given.normal(E, f, f, scale=f**-0.5)).tanh()


def _by_scatter(x: Tensor, given: Inputs, a: int) -> Tensor:
    rows, top, picked = _routed(x, given)
    gates = torch.zeros(rows.shape[0], E, dtype=x.dtype).scatter(1, picked, top)
    return (_all_experts(rows, given) * gates[..., None]).sum(1).view(x.shape)


def _by_one_hot(x: Tensor, given: Inputs, a: int) -> Tensor:
    rows, top, picked = _routed(x, given)
    gates = (one_hot(picked, E) * top[..., None]).sum(1)
    return torch.einsum("re,reg->rg", gates, _all_experts(rows, given)).reshape(x.shape)


def _by_gather(x: Tensor, given: Inputs, a: int) -> Tensor:
    rows, top, picked = _routed(x, given)
    made = _all_experts(rows, given).gather(1, picked[..., None].expand(-1, -1, rows.shape[-1]))
    return (made * top[..., None]).sum(1).view(x.shape)


def _by_expert(x: Tensor, given: Inputs, a: int) -> Tensor:
    """A loop over experts; each takes all rows, weighted."""
    rows, top, picked = _routed(x, given)
    made = torch.zeros_like(rows)
    for e in range(E):
        weight = torch.where(picked == e, top, 0.0).sum(-1, keepdim=True)
        made = made + weight * (rows @ given.weight(rows.shape[-1], rows.shape[-1]))
    return made.view(x.shape)


def _by_sort(x: Tensor, given: Inputs, a: int) -> Tensor:
    """Rows sorted by expert, scaled by what their expert has, and put back."""
    rows, top, picked = _routed(x, given)
    values, order = torch.sort(picked.reshape(-1), stable=True)
    made = rows[order // 2] * given.normal(E, rows.shape[-1])[values]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return (made[back].view(-1, 2, rows.shape[-1]) * top[..., None]).sum(1).view(x.shape)


def _by_index_add(x: Tensor, given: Inputs, a: int) -> Tensor:
    """Rows sorted by expert and added where they belong."""
    rows, top, picked = _routed(x, given)
    values, order = torch.sort(picked.reshape(-1), stable=True)
    made = rows[order // 2] * given.normal(E, rows.shape[-1])[values] * top.reshape(-1)[order][:, None]
    return torch.zeros_like(rows).index_add(0, order // 2, made).view(x.shape)


def _with_loads(x: Tensor, given: Inputs, a: int) -> Tensor:
    """Experts that have many rows count less: all tokens decide."""
    rows, top, picked = _routed(x, given)
    loads = one_hot(picked, E).sum((0, 1)).to(x.dtype)
    gates = torch.zeros(rows.shape[0], E, dtype=x.dtype).scatter(1, picked, top) / (1 + loads)
    return (_all_experts(rows, given) * gates[..., None]).sum(1).view(x.shape)


SMOOTH: dict[str, Step] = {"gated": _gated, "plain": _plain}
SHARP: dict[str, Step] = {
    "by scatter": _by_scatter,
    "by one_hot": _by_one_hot,
    "by gather": _by_gather,
    "by expert": _by_expert,
    "by sort": _by_sort,
    "by index_add": _by_index_add,
    "with loads": _with_loads,
}
FEED_FORWARD: dict[str, Step] = SMOOTH | SHARP
