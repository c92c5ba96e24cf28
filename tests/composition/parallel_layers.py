"""Layers of models that are cut over other groups than the one that shares the sequence.

Shape suffixes: T rows of the step that a rank holds, F features, K experts per token, E experts, V rows of the
embedding. n ranks of the group.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

from cppass.demo.npu.moe import Experts
from cppass.demo.presets import Preset

npu = torch.ops.npu


@dataclasses.dataclass(frozen=True)
class Part:
    """One rank of a group, and what it holds of a tensor."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: Any) -> Part:
        """Of a one-dimensional DeviceMesh."""
        return cls(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def __call__(self, x: Tensor, dim: int = 0, pieces: int = 1) -> Tensor:
        """This rank's share of each of `pieces` equal pieces, along `dim`.

        [q0 q1 | k0 k1], 2 pieces, rank 1 of 2 -> [q1 | k1]
        """
        return torch.cat([piece.chunk(self.size, dim)[self.rank] for piece in x.chunk(pieces, dim)], dim)


class Summed(nn.Module):
    """layer(x), summed over the group: what a row-parallel projection or this rank's experts leave to do.

    how: "functional", "in place" (as runners call dist.all_reduce), or "not at all" (wrong: a negative control).
    """

    def __init__(self, layer: nn.Module, part: Part, how: str = "functional") -> None:
        super().__init__()
        self.layer, self.group, self.how = layer, part.group, how

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        if self.how == "functional":
            return functional.all_reduce(out, "sum", self.group)
        if self.how == "in place":
            dist.all_reduce(out, group=self.group)
        return out


class VocabEmbedding(nn.Module):
    """Rows [V / n, F] of the embedding: zeros for ids of other ranks, to be summed."""

    def __init__(self, weight: Tensor, part: Part) -> None:
        super().__init__()
        self.weight = nn.Parameter(part(weight), requires_grad=False)
        self.first = part.rank * self.weight.shape[0]

    def forward(self, ids_T: Tensor) -> Tensor:
        own_T = (ids_T >= self.first) & (ids_T < self.first + self.weight.shape[0])
        rows = nn.functional.embedding(torch.where(own_T, ids_T - self.first, 0), self.weight)
        return rows * own_T.unsqueeze(-1)


class VocabHead(nn.Module):
    """Logits of this rank's V / n tokens, then of all."""

    def __init__(self, weight: Tensor, part: Part) -> None:
        super().__init__()
        self.weight, self.group = nn.Parameter(part(weight), requires_grad=False), part.group

    def forward(self, x: Tensor) -> Tensor:
        return functional.all_gather_single(x @ self.weight.t(), 1, self.group)


class OwnExperts(Experts):
    """Experts [first, first + E / n) of E: every row goes through K of them, with weight 0 where it chose another one.

    Sizes do not depend on the routing, as graph mode wants it. The sum over the group is that of all experts.
    """

    def __init__(self, whole: Experts, preset: Preset, part: Part) -> None:
        own = whole.experts // part.size
        super().__init__(dataclasses.replace(preset, experts=own), whole.gate_up.dtype)
        self.gate, self.own, self.first = whole.gate, own, part.rank * own
        self.gate_up = nn.Parameter(part(whole.gate_up), requires_grad=False)
        self.down = nn.Parameter(part(whole.down), requires_grad=False)

    def forward(self, x_TF: Tensor) -> Tensor:
        weights_TK, experts_TK = self.chosen(x_TF)
        weights_TK = weights_TK * ((experts_TK >= self.first) & (experts_TK < self.first + self.own))
        rows, places, counts, _ = npu.npu_moe_init_routing_v2(
            x_TF, experts_TK % self.own, active_num=-1, expert_num=self.own, expert_tokens_num_type=1,
            expert_tokens_num_flag=True, active_expert_range=[0, self.own], quant_mode=-1,
        )  # fmt: skip
        rows = self.through(rows, counts)
        return npu.npu_moe_finalize_routing(  # type: ignore[no-any-return]
            rows, None, None, None, weights_TK, places, None, drop_pad_mode=2
        )

    def chosen(self, x_TF: Tensor) -> tuple[Tensor, Tensor]:
        """Weights that sum to one, and the numbers of the experts, [T, K] both."""
        weights_TK, experts_TK, _ = npu.npu_moe_gating_top_k_softmax(self.gate(x_TF), None, self.top_k)
        return weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK

    def through(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert through this rank's experts."""
        how: dict[str, Any] = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 3}
        rows = npu.npu_swiglu(npu.npu_grouped_matmul([rows], [self.gate_up], **how)[0])
        return npu.npu_grouped_matmul([rows], [self.down], **how)[0]  # type: ignore[no-any-return]


class ExchangedExperts(OwnExperts):
    """Pairs travel to the rank of their expert and back, by two all-to-alls whose sizes depend on the routing.

    The sizes are read back from the device, so the exchange is not part of any graph. Every rank of the group is handed
    the same rows: each dispatches a share of them, and the shares are gathered in the end.
    """

    def __init__(self, whole: Experts, preset: Preset, part: Part) -> None:
        super().__init__(whole, preset, part)
        self.part = part

    def forward(self, x_TF: Tensor) -> Tensor:
        return self.exchange(x_TF, *self.chosen(x_TF))

    @torch._dynamo.disable
    def exchange(self, x_TF: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        share = [chunk.tensor_split(self.part.size)[self.part.rank] for chunk in (x_TF, weights_TK, experts_TK)]
        mine, weights, experts = share[0], share[1], share[2].flatten()
        order = experts.argsort(stable=True)
        sent = [int(n) for n in torch.bincount(experts // self.own, minlength=self.part.size)]
        received = self._all_to_all(torch.tensor(sent), [1] * self.part.size, [1] * self.part.size).tolist()
        rows = self._all_to_all(mine[order // self.top_k], received, sent)
        numbers = self._all_to_all(experts[order], received, sent) - self.first
        by_expert = numbers.argsort(stable=True)
        counts = torch.bincount(numbers, minlength=self.own)
        done = torch.empty_like(rows)
        done[by_expert] = self.through(rows[by_expert], counts)
        pairs = torch.empty(len(order), x_TF.shape[1])
        pairs[order] = self._all_to_all(done, sent, received)
        out = (pairs.view(-1, self.top_k, x_TF.shape[1]) * weights.unsqueeze(-1)).sum(1)
        shares = [torch.empty_like(chunk) for chunk in x_TF.tensor_split(self.part.size)]
        dist.all_gather(shares, out, group=self.part.group)
        return torch.cat(shares)

    def _all_to_all(self, x: Tensor, received: list[int], sent: list[int]) -> Tensor:
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.part.group)
        return out


class ScatteredSum(nn.Module):
    """Sequence parallelism: this rank's T / n rows of the sum over the group."""

    def __init__(self, layer: nn.Module, part: Part) -> None:
        super().__init__()
        self.layer, self.group = layer, part.group

    def forward(self, x: Tensor) -> Tensor:
        return functional.reduce_scatter_single(self.layer(x), "sum", 0, self.group)


class Gathered(nn.Module):
    """layer(all T rows), from each rank's T / n; or all rows of the first result of a layer that returns two."""

    def __init__(self, layer: nn.Module, part: Part, *, after: bool = False) -> None:
        super().__init__()
        self.layer, self.group, self.after = layer, part.group, after

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        if not self.after:
            return self.layer(functional.all_gather_single(x, 0, self.group))
        out, *rest = self.layer(x, *more)
        return functional.all_gather_single(out, 0, self.group), *rest
