"""Zigzag layout: which rows of each sequence a rank owns. Integers, SymInts, sympy expressions; no torch.fx.

Every sequence of a step is cut into `2 * cp_size` contiguous blocks of nearly equal length. Rank `r` owns block `r`
("prev") and block `2 * cp_size - 1 - r` ("next") of every sequence. Its local rows are the prev blocks of all
sequences, then their next blocks, then padding up to the number of rows that every rank has, since collectives need
equal sizes. Early blocks are cheap under a causal mask and late ones dear, so every rank gets the same attention work.

    cp_size = 2, 8 tokens               7 tokens (. is padding)           sequences 0..3 and 4..11
    rank 0   0 1 | 6 7                  rank 0   0 1 | 6 .                rank 0   0 4 5 | 3 10 11
    rank 1   2 3 | 4 5                  rank 1   2 3 | 4 5                rank 1   1 6 7 | 2 8 9
    gathered 0 1 6 7 2 3 4 5  (rank-major)

Which blocks are one row longer is the remainder policy. "first": the first `length mod 2 * cp_size` blocks, as SGLang
shards. "balanced": the blocks take turns over the whole step, so that halves of all ranks differ by one row at most;
both halves then have room for equally many rows, each padded at its end: the cut between them is a constant.

    cp_size = 2, three sequences of 5 tokens (rows 0..4, 5..9, 10..14)
    first      rank 0   0 1 5 6 10 11 | 4 9 14           rank 1   2 7 12 | 3 8 13 . . .
    balanced   rank 0   0 1 5 10 | 4 9 13 14             rank 1   2 6 7 11 | 3 8 12 .

Source: the zigzag split of SGLang PR #21685 and of ring-flash-attention; docs/how-it-works.md has the pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

Half = Literal[0, 1]  # 0 is prev, 1 is next
Remainder = Literal["first", "balanced"]


def blocks(cp_size: int) -> int:
    """Number of blocks a sequence is cut into."""
    return 2 * cp_size


def owned_blocks(rank: int, cp_size: int) -> tuple[int, int]:
    """The (prev, next) blocks of a rank."""
    return rank, 2 * cp_size - 1 - rank


def block_owner(block: int, cp_size: int) -> tuple[int, Half]:
    """The (rank, half) that holds a block."""
    return (block, 0) if block < cp_size else (2 * cp_size - 1 - block, 1)


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """The layout of one step.

    Attributes:
        lengths: new tokens of each sequence: ints, or anything with integer arithmetic (SymInt, sympy, Number).
        cp_size: number of ranks P.
        even: 2P is known to divide every length. Then there is no padding, and symbolic sizes are simpler.
        remainder: which blocks are one row longer.
        rows: local rows where they are given (a bucket that the step fits into); None for as few as there can be.
    """

    lengths: tuple[Any, ...]
    cp_size: int
    even: bool = False
    remainder: Remainder = "first"
    rows: Any = None

    @property
    def tokens(self) -> Any:
        """Rows of the step."""
        return _total(self.lengths)

    @property
    def local_rows(self) -> Any:
        """Rows of one rank, padding included; the same on every rank.

        Computed ones are exact for one sequence and for balanced blocks, else an upper bound.
        """
        n = blocks(self.cp_size)
        if self.rows is not None:
            return self.rows
        if self.remainder == "balanced":
            return (self.tokens + (n - 1)) // n * 2
        if self.even:
            return 2 * _total(length // n for length in self.lengths)
        return _total((length + (n - 1)) // n + (length + (self.cp_size - 1)) // n for length in self.lengths)

    def block_rows(self, sequence: int, block: int) -> Any:
        """Rows of a block; ceil((length - block) / 2P) where the first ones take the remainder."""
        n, length = blocks(self.cp_size), self.lengths[sequence]
        if self.remainder == "balanced":
            return length // n + (length % n - self._turn(sequence, block) + (n - 1)) // n
        return length // n if self.even else (length + (n - 1 - block)) // n

    def block_start(self, sequence: int, block: int) -> Any:
        """Where a block starts in its sequence."""
        n, length = blocks(self.cp_size), self.lengths[sequence]
        if self.even:
            return length // n * block
        if isinstance(length, int) and self.remainder == "first":
            return length // n * block + min(length % n, block)
        return _total(self.block_rows(sequence, b) for b in range(block))  # graphs have no min

    def _turn(self, sequence: int, block: int) -> Any:
        """How many blocks take a remainder row of this sequence before this one does: 0 to 2P - 1.

        Ranks take turns, with their prev blocks and then their next ones, from where the sequence before left off.
        """
        rank, half = block_owner(block, self.cp_size)
        taken = _total(self.lengths[:sequence])
        return (rank + self.cp_size * half - taken) % blocks(self.cp_size)

    def half_rows(self, rank: int, half: Half) -> list[Any]:
        """Rows of a rank's half, per sequence: query lengths of its attention call."""
        block = owned_blocks(rank, self.cp_size)[half]
        return [self.block_rows(sequence, block) for sequence in range(len(self.lengths))]

    def half_ends(self, rank: int, half: Half) -> list[Any]:
        """Where a rank's half ends in each sequence: with the prefix, key/value lengths of its attention call."""
        block = owned_blocks(rank, self.cp_size)[half]
        return [
            self.block_start(sequence, block) + self.block_rows(sequence, block)
            for sequence in range(len(self.lengths))
        ]

    def real_rows(self, rank: int) -> Any:
        """Rows of a rank that are no padding."""
        return _total(self.half_rows(rank, 0)) + _total(self.half_rows(rank, 1))

    def spans(self, rank: int) -> Iterator[tuple[Any, Any]]:
        """(first natural row, rows) of every piece of a rank's local rows, in local order, padding not included."""
        for block in owned_blocks(rank, self.cp_size):
            first = 0
            for sequence, length in enumerate(self.lengths):
                yield first + self.block_start(sequence, block), self.block_rows(sequence, block)
                first = first + length

    def homes(self) -> Iterator[tuple[int, Any, Any]]:
        """(rank, first local row, rows) of every block, in natural order: where a gathered row is found."""
        n = blocks(self.cp_size)
        firsts = [[self._first_local_row(block, s) for block in range(n)] for s in range(len(self.lengths))]
        for sequence in range(len(self.lengths)):
            for block in range(n):
                rank, _ = block_owner(block, self.cp_size)
                yield rank, firsts[sequence][block], self.block_rows(sequence, block)

    def _first_local_row(self, block: int, sequence: int) -> Any:
        rank, half = block_owner(block, self.cp_size)
        return self._half_start(rank, half) + _total(self.block_rows(s, block) for s in range(sequence))

    def _half_start(self, rank: int, half: Half) -> Any:
        """The local row at which a half starts."""
        if not half:
            return 0
        return self.local_rows // 2 if self.remainder == "balanced" else _total(self.half_rows(rank, 0))

    # -- ints only --

    def positions(self, rank: int) -> Iterator[int | None]:
        """Natural row of every local row, None for padding."""
        found: list[int | None] = [None] * self.local_rows
        spans = list(self.spans(rank))
        for half, own in enumerate((spans[: len(self.lengths)], spans[len(self.lengths) :])):
            row = self._half_start(rank, half)  # type: ignore[arg-type]
            for first, rows in own:
                found[row : row + rows] = range(first, first + rows)
                row += rows
        yield from found

    def owner(self, row: int) -> tuple[int, int]:
        """The (rank, local row) that holds a natural row."""
        first = 0
        for rank, local, rows in self.homes():
            if row < first + rows:
                return rank, local + row - first
            first += rows
        raise IndexError(f"row {row} of {self.tokens}")

    def attention_pairs(self, rank: int, prefixes: tuple[int, ...]) -> int:
        """(query, key) pairs a rank computes under a causal mask: its share of the attention FLOPs."""
        pairs = 0
        for half in (0, 1):
            for rows, end, prefix in zip(self.half_rows(rank, half), self.half_ends(rank, half), prefixes, strict=True):
                pairs += rows * (prefix + end) - rows * (rows - 1) // 2
        return pairs


def zigzag(lengths: tuple[int, ...], cp_size: int) -> Zigzag:
    """The layout of known lengths."""
    return Zigzag(lengths, cp_size, all(length % blocks(cp_size) == 0 for length in lengths))


def _total(sizes: Any) -> Any:
    total: Any = 0
    for size in sizes:
        total = size if isinstance(total, int) and total == 0 else total + size
    return total
