"""A random model as data that prints itself: layers of attention and steps around it, and what is returned.

`Program.run` is the model, `programs()` draws one. fuzz/shrink.py makes one that fails as small as it can be.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from fuzz.attention import FORMS, KNOWN, PROJECTIONS, REPEATS, SHARP_FORMS, STRANGE, Attention, attend
from fuzz.caches import CACHES, WITH_SPARE_ROWS, WITHOUT_PREFIX
from fuzz.check import Case
from fuzz.experts import FEED_FORWARD
from fuzz.experts import SHARP as SHARP_EXPERTS
from fuzz.inputs import Inputs
from fuzz.masks import ADDED, MASKS, PLAIN
from fuzz.mixing import MIXING
from fuzz.mixing import SHARP as SHARP_MIXING
from fuzz.ropes import ANGLES, TURNS
from fuzz.tail import AMPLIFYING, TAIL, tail_step
from fuzz.tail import SHARP as SHARP_TAIL
from fuzz.tokenwise import SHARP as SHARP_STEPS
from fuzz.tokenwise import TOKENWISE, rms_norm
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import embedding

Named = tuple[str, int]  # a step and its choice
VOCABULARY = 11
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SIMPLEST = Attention()
STEPS = TOKENWISE | {f"mixing: {name}": step for name, step in MIXING.items()}
SHARP = {*SHARP_STEPS, *(f"mixing: {name}" for name in SHARP_MIXING)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """steps, attention, residual, more steps, feed-forward ("" for none)."""

    attention: Attention = SIMPLEST
    before: tuple[Named, ...] = ()
    after: tuple[Named, ...] = ()
    feed_forward: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and what it is given.

    Attributes:
        cp_size: ranks.
        batch, tokens, hidden: B, S, F.
        entry: "rows": hidden states are the input; "ids": token ids are.
        layers: in order.
        tail: steps (name, dim, choice) on the last hidden states.
        returned: which outputs beside the last value: "hidden" (of every layer), "last" (logits of the last token),
            "logits" (of all), "caches".
        dtype: of weights and values.
        symbolic: traced with symbolic sizes.
        strict: the pass's option.
    """

    cp_size: int = 2
    batch: int = 1
    tokens: int = 8
    hidden: int = 8
    entry: str = "rows"
    layers: tuple[Layer, ...] = (Layer(),)
    tail: tuple[tuple[str, int, int], ...] = ()
    returned: tuple[str, ...] = ()
    dtype: str = "float64"
    symbolic: bool = False
    strict: bool = False

    def run(self, given: Inputs) -> list[Tensor]:
        x = self._entry(given)
        outputs: list[Tensor] = []
        for layer in self.layers:
            x, caches = _layer(layer, x, given)
            outputs += caches if "caches" in self.returned else []
            outputs += [x] if "hidden" in self.returned else []
        if "last" in self.returned:
            outputs.append(x[:, -1:] @ given.weight(self.hidden, VOCABULARY))
        if "logits" in self.returned:
            outputs.append(x @ given.weight(self.hidden, VOCABULARY))
        for name, dim, choice in self.tail:
            x = tail_step(name, x, dim, choice)
        return [*outputs, x]

    def _entry(self, given: Inputs) -> Tensor:
        if self.entry == "rows":
            return given.normal(self.batch, self.tokens, self.hidden)
        ids = given.integers(VOCABULARY, self.batch, self.tokens)
        return embedding(ids, given.normal(VOCABULARY, self.hidden))

    @property
    def functional(self) -> bool:
        """Whether it writes to no input."""
        return not any(layer.attention.cache in IN_PLACE for layer in self.layers)


def case_of(program: Program) -> Case:
    """The program with inputs of its dtype, and what it gives on them in float64."""
    first = Inputs()
    program.run(first)
    dtype = DTYPES[program.dtype]
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in first.made]
    exact = None
    if dtype != torch.float64:
        wide = [x.double() if x.is_floating_point() else x.clone() for x in inputs]
        exact = (program.run(Inputs(wide)), wide)
    other = None
    if program.symbolic:
        longer = dataclasses.replace(program, tokens=program.tokens + 9, symbolic=False)
        other = case_of(longer)
    options = {"strict": program.strict}
    return Case(
        lambda *given: program.run(Inputs(given)), inputs, exact, program.cp_size, options, program.symbolic, other
    )


IN_PLACE = {"index_copy_", "index_put_", "slice assigned", "narrow, copy_", "filled rows", "heads behind"}


def stepped(named: tuple[Named, ...], x: Tensor, given: Inputs) -> Tensor:
    """Steps on [B, S, F] or [S, F]; other shapes stay as they are."""
    if x.dim() > 3 or not named:
        return x
    rows = x if x.dim() == 3 else x[None]
    for name, choice in named:
        rows = STEPS[name](rows, given, choice)
    return rows if x.dim() == 3 else rows[0]


def _layer(layer: Layer, x: Tensor, given: Inputs) -> tuple[Tensor, list[Tensor]]:
    x = stepped(layer.before, x, given)
    out, caches = attend(layer.attention, rms_norm(x, given), given)
    x = x + out @ given.weight(out.shape[-1], x.shape[-1])
    x = stepped(layer.after, x, given)
    if layer.feed_forward:
        x = x + FEED_FORWARD[layer.feed_forward](rms_norm(x, given), given, 0)
    return x, caches


# -- drawing one -------------------------------------------------------------------------------------------------------


def _one_in(n: int) -> st.SearchStrategy[bool]:
    """True once in n draws; False is simpler."""
    return st.integers(0, n - 1).map(lambda i: i == n - 1)


def _of(names: Any) -> st.SearchStrategy[str]:
    return st.sampled_from(list(names))


@st.composite
def steps(draw: st.DrawFn, most: int) -> tuple[Named, ...]:
    """Token-wise ones; one in eight mixes tokens."""
    found = []
    for _ in range(draw(st.integers(0, most))):
        mixes = draw(_one_in(8))
        name = f"mixing: {draw(_of(MIXING))}" if mixes else draw(_of(TOKENWISE))
        found.append((name, draw(st.integers(0, 7))))
    return tuple(found)


@st.composite
def attentions(draw: st.DrawFn, strange: bool) -> Attention:
    """One that runs: what the parts demand of each other is seen to here."""
    groups = draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 1, 2, 3]))
    projections = draw(_of(PROJECTIONS))
    groups = heads if projections == "unbound" else groups
    cache = draw(_of(CACHES))
    prefix = 0 if cache in WITHOUT_PREFIX else draw(st.sampled_from([3, 1, 0, 7]))
    counted = cache in ("index_copy", "index_copy_", "index_put_", "heads behind", "scatter") and draw(st.booleans())
    form = draw(_of(STRANGE if strange else KNOWN))
    masks: list[str] = [*PLAIN] * 2 + [*MASKS]
    if prefix == 0 and not counted and cache not in WITH_SPARE_ROWS:
        masks += ["is_causal"] * 8
    if cache not in WITH_SPARE_ROWS:
        masks += ["none"] * 2
    mask = draw(st.sampled_from(masks))
    if mask in ("triangle", "upper triangle") and counted:
        mask = "k <= q"
    hidden = draw(st.sampled_from(["bool", "bool", *ADDED]))
    repeats = [*REPEATS, *(["enable_gqa"] if form == "sdpa" else [])]
    return Attention(
        heads, groups, draw(st.sampled_from([4, 8, 2])), projections, draw(st.booleans()), draw(_of(TURNS)),
        draw(_of(ANGLES)), cache, prefix, counted, mask, hidden, mask not in ("none", "is_causal") and draw(_one_in(8)),
        draw(st.sampled_from(repeats)), form, draw(_of(["after", "queries", "both", "divided", "einsum"])),
    )  # fmt: skip


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    feed_forward = draw(st.sampled_from(["", "", "gated", "gated", *FEED_FORWARD]))
    return Layer(draw(attentions(draw(_one_in(16)))), draw(steps(2)), draw(steps(2)), feed_forward)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    cp_size = draw(st.sampled_from([2, 2, 3, 3, 4, 5]))
    least = 2 * cp_size
    tokens = draw(st.one_of(st.sampled_from([least, least + 1, 13, 16, 17]), st.integers(least, 24)))
    if draw(_one_in(16)):
        tokens = draw(st.integers(1, least))  # decode, and prompts that are too short
    made = [draw(layers()) for _ in range(draw(st.sampled_from([1, 1, 2])))]
    tail = draw(st.lists(st.tuples(_of(TAIL), st.integers(0, 3), st.integers(0, 9)), max_size=3))
    returned = draw(st.lists(_of(["caches", "hidden", "last", "logits"]), max_size=2, unique=True))
    program = Program(
        cp_size, draw(st.sampled_from([1, 1, 2])), tokens, draw(st.sampled_from([8, 12, 16])),
        draw(_of(["rows", "ids"])), tuple(made), tuple(tail), tuple(returned),
        symbolic=draw(_one_in(24)), strict=draw(_one_in(40)),
    )  # fmt: skip
    dtype = draw(st.sampled_from(["float64", "float64", "float32", "bfloat16"]))
    jumps = _jumps(program)  # in float64, and not over equal tokens: rounding would decide between them
    return dataclasses.replace(program, **({"entry": "rows"} if jumps else {"dtype": dtype}))


def _jumps(program: Program) -> bool:
    """Whether rounding may decide a step of it."""
    names = {name for layer in program.layers for name, _ in (*layer.before, *layer.after)}
    forms = {layer.attention.form for layer in program.layers}
    experts = {layer.feed_forward for layer in program.layers}
    tail = {name for name, _, _ in program.tail} & (SHARP_TAIL.keys() | AMPLIFYING)
    return bool(names & SHARP or forms & SHARP_FORMS or experts & SHARP_EXPERTS.keys() or tail)


assert not KNOWN.keys() & STRANGE.keys() and set(FORMS) == {*KNOWN, *STRANGE}
