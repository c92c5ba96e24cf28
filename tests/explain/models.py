"""Models whose explanations are looked at: a small decoder, good, refused or broken in two; hostile names."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import cppass
from cppass.errors import Refusal
from cppass.inspection.modules import tree_of
from cppass.report import REFUSED

B, S, H, D = 1, 16, 2, 8
F = H * D


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(F, 3 * F, bias=False)
        self.out = nn.Linear(F, F, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        out = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(b, s, F))


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(dropout)
        self.mlp = nn.Sequential(nn.Linear(F, 2 * F), nn.SiLU(), nn.Linear(2 * F, F))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Decoder(nn.Module):
    """forward(ids [B, S]) -> logits of the last token [B, 1, 32]."""

    def __init__(self, layers: int = 3, dropout: float = 0.0, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, F)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.head = nn.Linear(F, 32, bias=False)
        self.breaks = breaks

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(x[:, -1:])


def ids(tokens: int = S) -> Tensor:
    return torch.arange(tokens)[None] % 32


@functools.cache
def explained(tokens: int = S, cp_size: int = 2, dynamic: bool | None = None, **how: Any) -> cppass.Explanation:
    """The explanation of a decoder that is built as `how` says, worked out once."""
    return cppass.explain(Decoder(**how).eval(), ids(tokens), cp_size=cp_size, dynamic=dynamic)


HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"&{{ 7 * 7 }}"


def hostile(text: str = HOSTILE) -> Any:
    """An explanation in which every text that a model could choose is this one."""
    found = explained(layers=2)
    view = found.graph_view

    def renamed(nodes: Any) -> Any:
        names = {n.name: f"{n.name}{text}" for n in nodes}
        return tuple(
            dataclasses.replace(
                n,
                name=names[n.name],
                call=n.call + text,
                op=n.op + text,
                module=n.module.replace("layers", text.replace(".", "")),
                module_type=n.module_type + text,
                where=text,
                inputs=tuple(names[i] for i in n.inputs),
            )
            for n in nodes
        )

    nodes = renamed(view.nodes)
    refusal = Refusal("CP101", nodes[-2].name, text, text, text, text, text)
    report = dataclasses.replace(
        view.report,
        status=REFUSED,
        reason=text,
        refusals=(refusal,),
        notes=(text,),
        sites=tuple(dataclasses.replace(s, form=text, mask=text, where=text, module=text) for s in view.report.sites),
        gathers=tuple(dataclasses.replace(g, nodes=(text,), why=text) for g in view.report.gathers),
    )
    hostile_view = dataclasses.replace(
        view, report=report, nodes=nodes, after=renamed(view.after), modules=tree_of(nodes)
    )
    return dataclasses.replace(
        found, title=text, status=REFUSED, reason=text, graphs=(hostile_view,), breaks=(text,), notes=(text,)
    )
