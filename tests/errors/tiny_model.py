"""A decoder of one layer in plain torch, small enough to be compiled a hundred times.

Shape suffixes: B batch, S tokens, T rows of the cache, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HIDDEN, VOCABULARY, POSITIONS = 16, 32, 64


class Tiny(nn.Module):
    """forward(ids [B, S]) -> logits [B, S, VOCABULARY]; with a cache, keys and values [B, G, T, D], through it."""

    def __init__(
        self, heads: int = 4, groups: int | None = None, head_dim: int = 4, causal: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.groups, self.head_dim = heads, groups or heads, head_dim
        self.causal, self.dropout = causal, dropout
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.places = nn.Embedding(POSITIONS, HIDDEN)
        self.project = nn.Linear(HIDDEN, (heads + 2 * self.groups) * head_dim)
        self.out = nn.Linear(heads * head_dim, HIDDEN)
        self.vocabulary = nn.Linear(HIDDEN, VOCABULARY)
        self.eval()

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Sequence[Tensor] | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        x = self.words(ids)
        if positions is not None:
            x = x + self.places(positions)
        return self.vocabulary(self.hidden_states(x, mask, cache, first))

    def hidden_states(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Sequence[Tensor] | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        b, s, _ = x.shape
        rows = self.project(x).view(b, s, self.heads + 2 * self.groups, self.head_dim).transpose(1, 2)
        q, k, v = rows.split([self.heads, self.groups, self.groups], 1)
        if cache is not None:
            places = torch.arange(s) + (0 if first is None else first)
            k, v = (c.index_copy_(2, places, new) for c, new in zip(cache, (k, v), strict=True))
            mask = torch.arange(k.shape[2]) <= places[:, None]
        return x + self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None,
            enable_gqa=self.groups != self.heads,
        )


def token_ids(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def caches(batch: int, rows: int, groups: int = 4, head_dim: int = 4) -> list[Tensor]:
    """Keys and values, empty."""
    return [torch.zeros(batch, groups, rows, head_dim) for _ in range(2)]


def visible(rows: int) -> Tensor:
    """A causal mask, True where a key is seen."""
    return torch.ones(rows, rows, dtype=torch.bool).tril()
