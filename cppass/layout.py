"""Zigzag layout: which rows of a sequence each rank owns. Integers, SymInts and sympy expressions; no torch.fx.

A sequence of `tokens` new tokens is padded to `2 * cp_size` equal blocks of `block_rows` rows. Rank `r` owns block `r`
("prev") and block `2 * cp_size - 1 - r` ("next"); its local rows are the prev block followed by the next block. Early
blocks are cheap under a causal mask and late ones dear, so every rank gets the same attention work.

    cp_size = 2, 8 tokens                       cp_size = 2, 7 tokens (. is padding)
    rank 0   0 1 | 6 7                          rank 0   0 1 | 6 .
    rank 1   2 3 | 4 5                          rank 1   2 3 | 4 5
    gathered 0 1 6 7 2 3 4 5  (rank-major)

Padding exists only behind the last token, so restoring a sequence is reordering blocks and cutting the tail, and under
a causal mask no token ever sees a padding row.

Source: the zigzag split of SGLang PR #21685 and of ring-flash-attention; docs/how-it-works.md has the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

Size = TypeVar("Size")  # int, torch.SymInt or sympy.Expr


def blocks(cp_size: int) -> int:
    """Number of blocks a sequence is cut into."""
    return 2 * cp_size


def block_rows(tokens: Size, cp_size: int) -> Size:
    """Rows of one block: ceil(tokens / (2 * cp_size))."""
    total: Any = tokens
    return (total + (2 * cp_size - 1)) // (2 * cp_size)  # type: ignore[no-any-return]


def local_rows(tokens: Size, cp_size: int) -> Size:
    """Rows of one rank, padding included; the same on every rank, as collectives need."""
    rows: Any = block_rows(tokens, cp_size)
    return 2 * rows  # type: ignore[no-any-return]


def owned_blocks(rank: int, cp_size: int) -> tuple[int, int]:
    """The (prev, next) blocks of a rank."""
    return rank, 2 * cp_size - 1 - rank


def block_owner(block: int, cp_size: int) -> tuple[int, int]:
    """The (rank, half) that holds a block; half 0 is prev, 1 is next."""
    return (block, 0) if block < cp_size else (2 * cp_size - 1 - block, 1)


def block_span(block: int, tokens: int, cp_size: int) -> tuple[int, int]:
    """[start, end) of the real tokens of a block; empty where the block is all padding."""
    rows = block_rows(tokens, cp_size)
    return min(block * rows, tokens), min((block + 1) * rows, tokens)


def local_positions(tokens: int, cp_size: int, rank: int) -> Iterator[int | None]:
    """Natural position of every local row of a rank, None for padding."""
    rows = block_rows(tokens, cp_size)
    for block in owned_blocks(rank, cp_size):
        for position in range(block * rows, (block + 1) * rows):
            yield position if position < tokens else None


def row_owner(position: int, tokens: int, cp_size: int) -> tuple[int, int]:
    """The (rank, local row) that holds a natural position."""
    rows = block_rows(tokens, cp_size)
    rank, half = block_owner(position // rows, cp_size)
    return rank, half * rows + position % rows


def attention_pairs(tokens: int, cp_size: int, rank: int, prefix: int = 0) -> int:
    """(query, key) pairs a rank computes under a causal mask: its share of the attention FLOPs."""
    return sum(prefix + p + 1 for p in local_positions(tokens, cp_size, rank) if p is not None)
