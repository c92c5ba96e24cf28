"""Random batches through attention of torch_npu's ops: sequences of any lengths on any prefixes, packed or paged.

Shape suffixes: T rows of all sequences, B sequences, S rows of one, F hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from fuzz.check import Case
from fuzz.inputs import Inputs
from fuzz.programs import DTYPES, SHARP, Named, stepped, steps
from hypothesis import strategies as st
from npu.fused_snippets import MASK, WRITES, Snippet, dense, paged, rand
from torch import Tensor

LAYOUTS = ("BSH", "BSND", "BNSD")


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step of one layer.

    Attributes:
        cp_size: ranks.
        form: "paged": the cache is written, then read by block table; "fresh": packed keys are read, the cache written
            after; or a dense layout.
        lengths, prefixes: new and cached tokens of each sequence; a dense form has as many rows in each.
        version, write, heads, groups: of the snippet.
        mode: "causal", "window", "everything" or "own mask".
        sink, lse: further operands and results.
        before, after: steps on the rows around it.
        calls: attention calls a site.
    """

    cp_size: int = 2
    form: str = "paged"
    lengths: tuple[int, ...] = (8,)
    prefixes: tuple[int, ...] = (0,)
    version: str = "v2"
    write: str = "nd_update"
    heads: int = 4
    groups: int = 2
    mode: str = "causal"
    sink: bool = False
    lse: bool = False
    before: tuple[Named, ...] = ()
    after: tuple[Named, ...] = ()
    calls: int = 2
    dtype: str = "float32"

    def snippet(self) -> Snippet:
        options: dict[str, Any] = {"version": self.version, "heads": self.heads, "groups": self.groups}
        options |= {"window": {"sparse_mode": 4, "pre_tokens": 5, "next_tokens": 0}}.get(self.mode, {})
        if self.form in LAYOUTS:
            return self._dense(options)
        options |= {"learnable_sink": rand(self.heads)} if self.sink else {}
        spare = 2 * len(self.lengths) if self.calls == 1 else 0  # both halves' pages are counted
        return paged(
            list(self.lengths), list(self.prefixes), write=WRITES[self.write], fresh=self.form == "fresh", lse=self.lse,
            dtype=DTYPES[self.dtype], spare=spare, **options,
        )  # fmt: skip

    def _dense(self, options: dict[str, Any]) -> Snippet:
        rows = self.lengths[0]
        if self.mode in ("causal", "window"):
            options = {"sparse_mode": 3, "atten_mask": MASK} | options
        elif self.mode == "own mask":
            options |= {"atten_mask": torch.ones(rows, rows, dtype=torch.bool).triu(2)}
        return dense(self.form, len(self.lengths), rows, **options)


def case_of(batch: Batch) -> Case:
    snippet = batch.snippet()
    count = len(snippet.inputs)

    def run(inputs: Inputs, x: Tensor, *rest: Tensor) -> list[Tensor]:
        x = stepped(batch.before, x, inputs)
        seen = snippet.run(x, *rest)
        out, *others = seen if isinstance(seen, (tuple, list)) else (seen,)
        return [stepped(batch.after, out, inputs), *others]

    own = tuple(x.clone() for x in snippet.inputs)
    first = Inputs(dtype=DTYPES[batch.dtype])
    run(first, *own)
    return Case(
        lambda *given: run(Inputs(given[count:]), *given[:count]),
        [*snippet.inputs, *first.made],
        None,
        batch.cp_size,
        {"attention_calls": batch.calls},
    )


# -- drawing one -------------------------------------------------------------------------------------------------------


def _lengths(least: int) -> st.SearchStrategy[list[int]]:
    """Up to four sequences; one is long enough to be shared."""
    others = st.lists(st.one_of(st.just(1), st.integers(1, 40), st.integers(1, 9)), max_size=3)
    return st.tuples(st.integers(least, 50), others, st.integers(0, 3)).map(
        lambda drawn: [*drawn[1][: drawn[2]], drawn[0], *drawn[1][drawn[2] :]]
    )


def _smooth(named: tuple[Named, ...]) -> tuple[Named, ...]:
    """Without what jumps, since these run in float32."""
    return tuple((name, choice) for name, choice in named if name not in SHARP)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    cp_size = draw(st.sampled_from([2, 3, 4, 5]))
    form = draw(st.sampled_from(["paged", "paged", "paged", "fresh", "fresh", *LAYOUTS]))
    lengths = draw(_lengths(2 * cp_size))
    prefixes = [0] * len(lengths)
    mode, sink, lse, calls = "causal", False, False, 2
    version = draw(st.sampled_from(["v2", "v1"]))
    if form in LAYOUTS:
        lengths = [draw(st.integers(2 * cp_size, 30))] * draw(st.sampled_from([1, 2]))
        mode = draw(st.sampled_from(["causal", "everything", "window", "own mask"]))
    else:
        mode = draw(st.sampled_from(["causal", "causal", "window"]))
        sink, lse = version == "v2" and draw(st.booleans()), draw(st.booleans())
    if form == "paged":
        prefixes = [draw(st.one_of(st.just(0), st.integers(1, 200))) for _ in lengths]
        calls = draw(st.sampled_from([2, 1]))
    groups = draw(st.sampled_from([2, 1, 4]))
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16"])) if form not in LAYOUTS else "float32"
    before, after = (draw(steps(2)) if dtype == "float32" else () for _ in range(2))  # bfloat16: the op's own rounding
    return Batch(
        cp_size, form, tuple(lengths), tuple(prefixes), version, draw(st.sampled_from(list(WRITES))),
        groups * draw(st.sampled_from([1, 2])), groups, mode, sink, lse, _smooth(before),
        _smooth(after), calls, dtype,
    )  # fmt: skip
