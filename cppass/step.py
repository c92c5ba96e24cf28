"""The sequences of one forward: their lengths as the graph knows them, and the layout that follows."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from cppass.errors import Refusal
from cppass.explain_node import refuse
from cppass.layout import Zigzag, blocks
from cppass.rules import shape_of
from cppass.site import AttentionSite
from cppass.tokens import Size, size_of

Length = int | torch.SymInt


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward.

    Attributes:
        ends: where each sequence ends in the token axis (cumulative lengths), as ints or nodes of the graph; () where
            the token axis is one sequence.
        layout: the layout, its lengths as ints or sympy expressions.
    """

    ends: tuple[int | fx.Node, ...]
    layout: Zigzag


def step_of(sites: tuple[AttentionSite, ...], cp_size: int) -> Step | Refusal:
    """The step that all sites of a graph share: cross-attention and encoders with sequences of their own have none.

    Comparing symbolic lengths installs guards: a later call with other relations between them gets its own graph.
    """
    first, tokens = sites[0], _tokens(sites[0])
    for site in sites:
        if shape_of(site.query)[site.query_dim] != shape_of(first.query)[first.query_dim]:
            return _unlike(site, f"{_tokens(site)} query rows", f"{tokens}")
        if _sizes(site.ends) != _sizes(first.ends):
            return _unlike(site, f"sequences that end at {_sizes(site.ends)}", f"{_sizes(first.ends)}")
    lengths = lengths_of(first)
    if first.ends and not bool(sum(lengths) == tokens):
        return refuse(
            "CP109",
            first.node,
            f"the query lengths add up to {sum(lengths)}, but the query has {tokens} rows",
            "pass cumulative query lengths whose last one is the number of query rows",
        )
    for site in sites:
        if _has_mask_over_one_row(site, cp_size):
            return refuse(
                "CP103",
                site.node,
                f"a sliding window or a mask [S, T] over {tokens} rows of a dense layout: {cp_size} ranks have "
                "halves of one row, for which the op takes neither",
                f"TND, or at least {2 * blocks(cp_size)} tokens",
            )
    even = all(isinstance(n, int) for n in lengths) or first.fused is not None
    even = even and bool(sum(n % blocks(cp_size) for n in lengths) == 0)
    return Step(first.ends, Zigzag(tuple(size_of(n) for n in lengths), cp_size, even))


def _has_mask_over_one_row(site: AttentionSite, cp_size: int) -> bool:
    """The comparison is a guard."""
    fused = site.fused
    if fused is None or fused.input_layout == "TND":
        return False
    own_mask = fused.sparse_mode in (0, 1) and site.mask is not None and len(shape_of(site.mask)) == 2
    if not own_mask and fused.sparse_mode != 4:
        return False
    return bool(_tokens(site) < 2 * blocks(cp_size))


def _unlike(site: AttentionSite, seen: str, others: str) -> Refusal:
    return refuse(
        "CP105",
        site.node,
        f"attention over {seen} in a graph that also has attention over {others}",
        "compile the two parts on their own",
    )


def too_short(sites: tuple[AttentionSite, ...], cp_size: int, min_tokens: int) -> str:
    """Why a step is too short to be shared, "" where it is not. The comparisons are guards, too."""
    reasons = [_too_short(lengths_of(site), blocks(cp_size), min_tokens) for site in sites]
    return "" if "" in reasons else reasons[0]


def _too_short(lengths: list[Length], least: int, min_tokens: int) -> str:
    total, each = sum(lengths), "" if len(lengths) == 1 else f" in {len(lengths)} sequences, each"
    if not any(bool(n >= least) for n in lengths):
        return f"{total} tokens{each}, fewer than 2 * cp_size = {least}"
    if min_tokens > least and bool(total < min_tokens):
        return f"{total} tokens, fewer than min_tokens = {min_tokens}"
    return ""


def lengths_of(site: AttentionSite) -> list[Length]:
    """New tokens of each sequence, as ints or SymInts."""
    if not site.ends:
        return [_tokens(site)]
    ends = [_value(end) for end in site.ends]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _tokens(site: AttentionSite) -> Length:
    return site.query.meta["val"].shape[site.query_dim]  # type: ignore[no-any-return]


def _value(end: int | fx.Node) -> Any:
    return end.meta["val"] if isinstance(end, fx.Node) else end


def _sizes(ends: tuple[int | fx.Node, ...]) -> tuple[Size, ...]:
    return tuple(size_of(_value(end)) for end in ends)
