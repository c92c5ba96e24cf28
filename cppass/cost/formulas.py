"""Closed forms of one rank's share of a prefill, in sympy: what `explain`ing a number means here.

    S new tokens (one sequence)    P ranks          F tokens of a prefix that is already cached
    L layers       d hidden        H query heads    K key/value heads    D head dim    V vocabulary
    M MLP width a token uses       N MLP width stored       E experts (0: dense)       T embeddings stored (tied: 1)
    w bytes of an activation       u bytes of a weight

A multiply-add is 2 FLOPs. Counted are matmuls and attention; norms, RoPE and activations are bytes of `traffic`.
Context parallelism is exact where 2P divides S, and equals counts of rewritten graphs
(tests/cost/test_graph_counts.py); elsewhere blocks differ by one row and padding adds at most one more.

Sources: the all-gather form is zigzag context parallelism as in Llama 3 (arXiv 2407.21783, section 3.3.2);
Ulysses arXiv 2309.14509; ring attention arXiv 2310.01889; tensor parallelism arXiv 1909.08053.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy

from cppass.cost.model import ModelShape

S, P, F = sympy.symbols("S P F", integer=True, nonnegative=True)
L, d, H, K, D, V, M, N, E, T, w, u = sympy.symbols("L d H K D V M N E T w u", integer=True, nonnegative=True)

PAIRS = S * F + S * (S + 1) / 2
"""(query, key) pairs of a causal mask, prefix included; zigzag ranks have PAIRS / P (Zigzag.attention_pairs)."""

OTHERS = (P - 1) / P
"""Share of a tensor that a rank does not hold and has to receive."""

_KV_HEADS = sympy.Max(1, K / P)  # of a rank that holds some of the heads: they are repeated where K < P


def _linear(rows: Any, heads: Any, kv_heads: Any, width: Any) -> Any:
    """FLOPs of the matmuls of a layer: Q and output, K and V, three of an MLP, the router."""
    return 2 * rows * d * (2 * heads * D + 2 * kv_heads * D + 3 * width + E)


def _weights(heads: Any, kv_heads: Any, width: Any) -> Any:
    """Elements of a layer: projections, MLP, router, two norms of d and two of D."""
    return 2 * d * D * (heads + kv_heads) + 3 * d * width + d * E + 2 * d + 2 * D


def _stored(layer: Any, share: Any) -> Any:
    """Bytes of all weights: layers, last norm, embedding and LM head."""
    return u * (L * layer + d + T * V * d * share)


def _traffic(rows: Any, heads: Any, kv_heads: Any, width: Any) -> Any:
    """Elements that ops between matmuls read and write: norms and residuals 9d, RoPE of Q and K, SiLU times up."""
    return rows * (9 * d + 2 * (heads + kv_heads) * D + 3 * width)


_KV_ROW = 2 * K * D  # elements of one token's K and V in a layer
_ROWS = S / P

ONE = {
    "linear": _linear(S, H, K, M),
    "attention": 4 * H * D * PAIRS,
    "head": 2 * d * V,
    "received": sympy.Integer(0),
    "collectives": sympy.Integer(0),
    "weights": _stored(_weights(H, K, N), 1),
    "read": u * _weights(H, K, sympy.Min(N, S * M)),
    "cache": w * L * (S + F) * _KV_ROW,
    "activations": w * S * (2 * d + sympy.Max((2 * H + 2 * K) * D, 3 * M)),
    "buffers": sympy.Integer(0),
    "traffic": w * (_traffic(S, H, K, M) + 2 * S * _KV_ROW),
    "kernels": sympy.Integer(14),
}
"""One device. Kernels of a layer: 7 matmuls (MoE: 4, a router, 2 grouped), an attention, 6 others."""

CP = {
    **ONE,
    "linear": _linear(_ROWS, H, K, M),
    "attention": 4 * H * D * PAIRS / P,
    "received": S * _KV_ROW * w * OTHERS,
    "collectives": sympy.Integer(1),
    "read": u * _weights(H, K, sympy.Min(N, _ROWS * M)),
    "activations": ONE["activations"].subs(S, _ROWS),
    "buffers": w * S * _KV_ROW,
    "traffic": w * (_traffic(_ROWS, H, K, M) + 4 * S * _KV_ROW),
    "kernels": sympy.Integer(16),
}
"""Zigzag, K and V of a layer in one all-gather; each rank caches the whole sequence and holds all weights.

Against one device: a second attention call, and the gathered rows are put into token order (read and written once).
"""

TP = {
    **ONE,
    "linear": _linear(S, H / P, _KV_HEADS, M / P),
    "attention": 4 * H * D * PAIRS / P,
    "head": 2 * d * V / P,
    "received": 2 * (2 * S * d * w * OTHERS),
    "collectives": sympy.Integer(2),
    "weights": _stored(_weights(H / P, _KV_HEADS, N / P), 1 / P),
    "read": u * _weights(H / P, _KV_HEADS, sympy.Min(N, S * M) / P),
    "cache": w * L * (S + F) * 2 * _KV_HEADS * D,
    "activations": w * S * (2 * d + sympy.Max((2 * H / P + 2 * _KV_HEADS) * D, 3 * M / P)),
    "traffic": w * (_traffic(S, H / P, _KV_HEADS, M / P) + 4 * S * _KV_HEADS * D),
}
"""Tensor parallelism: heads, MLP width (or experts) and vocabulary are split; two all-reduces of [S, d] a layer.

An all-reduce is a reduce-scatter and an all-gather: each rank receives the tensor twice, but for its own share.
"""

ULYSSES = {
    **CP,
    "received": S * OTHERS * D * w * (2 * H / P + 2 * _KV_HEADS),
    "collectives": sympy.Integer(2),
    "cache": TP["cache"],
    "buffers": w * S * D * (2 * H / P + 2 * _KV_HEADS),
    "traffic": w * (_traffic(_ROWS, H, K, M) + 2 * S * D * (2 * H / P + 2 * _KV_HEADS)),
    "kernels": sympy.Integer(18),
}
"""Rows to heads and back: one all-to-all of Q, K and V, one of the output; caches are split by heads.

Up to P = K, bytes are (2H + 2K) D w S/P (P-1)/P: less than CP's from P = (H + K) / K on.
"""

RING = {
    **CP,
    "collectives": P - 1,
    "cache": w * L * (S + F) * _KV_ROW / P,
    "buffers": 2 * w * _ROWS * _KV_ROW,
    "traffic": w * (_traffic(_ROWS, H, K, M) + 2 * _ROWS * _KV_ROW + 3 * S * H * D),
    "kernels": 14 + 3 * P,
}
"""Ring attention over zigzag rows: the bytes of an all-gather in P - 1 steps, each beside the attention of a block.

Every step's partial output [S/P, H D] is merged by log-sum-exp (two read, one written, P times).
Caches are split by rows.
"""

FORMS: dict[str, dict[str, Any]] = {"one": ONE, "cp": CP, "tp": TP, "ulysses": ULYSSES, "ring": RING}
UNITS = {
    "linear": "FLOPs of matmuls, a layer",
    "attention": "FLOPs of attention, a layer",
    "head": "FLOPs of the LM head, last row",
    "received": "bytes received, a layer",
    "collectives": "collectives, a layer",
    "weights": "bytes of weights",
    "read": "bytes of weights read, a layer",
    "cache": "bytes of K/V cache",
    "activations": "bytes of live activations, an estimate",
    "buffers": "bytes of K and V of one layer that others own",
    "traffic": "bytes read and written between matmuls, a layer",
    "kernels": "kernels, a layer",
}

Q_PROJECTION = 2 * _ROWS * d * H * D
"""FLOPs of a layer that can run while K and V travel under context parallelism."""

LAST_ROW = d * w * (P - 1)
"""Bytes received for the last row of the hidden states, which every rank's LM head reads; once a forward."""


def total_flops(scheme: str) -> Any:
    """FLOPs of one rank in a whole forward."""
    form = FORMS[scheme]
    return L * (form["linear"] + form["attention"]) + form["head"]


def total_received(scheme: str) -> Any:
    """Bytes one rank receives in a whole forward."""
    return L * FORMS[scheme]["received"] + (0 if scheme in ("one", "tp") else LAST_ROW)


def exact(form: Any, shape: ModelShape, tokens: int, ranks: int = 1, prefix: int = 0) -> Any:
    """The value of a closed form: an int, or a sympy Rational where 2P does not divide the tokens."""
    numbers = dict(zip(_SYMBOLS, _numbers(shape), strict=True))
    value = sympy.sympify(form).subs({**numbers, S: tokens, P: ranks, F: prefix})
    return int(value) if value.is_integer else value


def value(scheme: str, name: str, shape: ModelShape, tokens: int, ranks: int, prefix: int) -> float:
    """The same as a float, fast; `name` is a key of UNITS."""
    return float(_compiled(scheme, name)(tokens, ranks, prefix, *_numbers(shape)))


def q_projection(shape: ModelShape, tokens: int, ranks: int) -> float:
    """FLOPs of the Q projection of one rank's rows."""
    return 2 * tokens / ranks * shape.hidden * shape.heads * shape.head_dim


_SYMBOLS = (L, d, H, K, D, V, M, N, E, T, w, u)


@functools.cache
def _numbers(shape: ModelShape) -> tuple[int, ...]:
    s = shape
    sizes = (s.layers, s.hidden, s.heads, s.kv_heads, s.head_dim, s.vocab, s.active_width, s.stored_width, s.experts)
    return (*sizes, 1 if s.tied else 2, s.activation_bytes, s.weight_bytes)


@functools.cache
def _compiled(scheme: str, name: str) -> Callable[..., float]:
    return sympy.lambdify((S, P, F, *_SYMBOLS), FORMS[scheme][name], modules="math")  # type: ignore[no-any-return]
