"""Attention in forms that models rarely have, behind a layer that is known: refused, or what one device computes.

The one thing that must not happen is that an op which mixes tokens passes as one that works row by row.

Shape suffixes: B batch, H heads, S tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad, scaled_dot_product_attention

import cppass
from cppass.capture import trace

B, H, S, D = 2, 2, 16, 4
F = H * D
Form = Callable[[Tensor, Tensor, Tensor], Tensor]
EQUAL, REFUSED, UNKNOWN, SHAPE, COUNTS = "equal", "CP201", "CP101", "CP103", "CP105"

TRIL = torch.ones(S, S).tril()
STEPS = torch.arange(S)
EXPECTED: dict[Form, str] = {}


def expected(outcome: str) -> Callable[[Form], Form]:
    def note(form: Form) -> Form:
        EXPECTED[form] = outcome
        return form

    return note


def hidden(scores: Tensor) -> Tensor:
    return scores.masked_fill(TRIL == 0, -torch.inf)


# -- scores that are not softmax(q @ k.T) ------------------------------------------------------------------------------


@expected(REFUSED)
def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) * torch.tril(0.9 ** (STEPS[:, None] - STEPS).float())) @ v


@expected(REFUSED)
def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (functional.elu(q) + 1) @ ((functional.elu(k) + 1).transpose(2, 3) @ v)


@expected(EQUAL)
def linear_attention_by_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhsd,bhse->bhsde", k, v).cumsum(2)
    return torch.einsum("bhsd,bhsde->bhse", q, state) / S


@expected(REFUSED)
def a_state_token_by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, D), []
    for t in range(S):
        state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


@expected(REFUSED)
def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.sigmoid(q @ k.transpose(2, 3)) * TRIL) @ v


@expected(REFUSED)
def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.transpose(2, 3)) * TRIL
    return (weights / weights.sum(-1, keepdim=True)) @ v


@expected(REFUSED)
def softmax_by_its_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(q @ k.transpose(2, 3)).log_softmax(-1).exp() @ v


@expected(REFUSED)
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3)).softmax(-2) @ v


@expected(REFUSED)
def keys_times_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (k @ q.transpose(2, 3)).masked_fill(TRIL.t() == 0, -torch.inf)
    return scores.softmax(-2).transpose(2, 3) @ v


@expected(UNKNOWN)
def values_times_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = hidden(q @ k.transpose(2, 3)).softmax(-1)
    return (v.transpose(2, 3) @ weights.transpose(2, 3)).transpose(2, 3)


@expected(UNKNOWN)
def softmax_of_a_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden((q @ k.transpose(2, 3)).softmax(-1) * 4).softmax(-1) @ v


@expected(UNKNOWN)
def a_difference_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (hidden(q[..., i::2] @ k[..., i::2].transpose(2, 3)).softmax(-1) for i in range(2))
    return (first - 0.3 * second) @ v


@expected(REFUSED)
def a_sum_of_two_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q[..., i::2] @ k[..., i::2].transpose(2, 3) for i in range(2))
    return hidden(first + second).softmax(-1) @ v


@expected(REFUSED)
def heads_that_talk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(2, 3), torch.eye(H) + 0.1)
    return hidden(scores).softmax(-1) @ v


@expected(REFUSED)
def scores_by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(-torch.cdist(q, k)).softmax(-1) @ v


@expected(REFUSED)
def scores_by_addition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(torch.tanh(q[:, :, :, None] + k[:, :, None]).sum(-1)).softmax(-1) @ v


@expected(EQUAL)
def products_by_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = hidden((q[:, :, :, None] * k[:, :, None]).sum(-1)).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(3)


# -- softmax(q @ k.T) in other shapes ----------------------------------------------------------------------------------


@expected(EQUAL)
def einsum_of_tokens_before_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = hidden(torch.einsum("bqhd,bkhd->bhqk", q, k)).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


@expected(REFUSED)
def einsum_of_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->khbq", q, k).masked_fill((TRIL.t() == 0)[:, None, None], -torch.inf)
    return torch.einsum("khbq,bhkd->bhqd", scores.softmax(0), v)


@expected(SHAPE)
def a_matrix_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = [(b, h) for b in range(B) for h in range(H)]
    return torch.stack([hidden(q[i] @ k[i].t()).softmax(-1) @ v[i] for i in pairs]).view(B, H, S, D)


@expected(EQUAL)
def a_product_with_its_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    mask = torch.where(TRIL == 0, -1e9, 0.0).expand(B * H, S, S)
    return torch.bmm(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=0.5).softmax(-1), v).view(B, H, S, D)


@expected(EQUAL)
def the_best_scores_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = hidden(q @ k.transpose(2, 3))
    return scores.masked_fill(scores < scores.topk(4, -1)[0][..., -1:], -torch.inf).softmax(-1) @ v


@expected(EQUAL)
def queries_as_keys_and_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(q @ q.transpose(2, 3)).softmax(-1) @ q


# -- scaled_dot_product_attention over other tokens --------------------------------------------------------------------


@expected(EQUAL)
def no_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


@expected(EQUAL)
def every_second_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])


@expected(EQUAL)
def keys_in_reverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k.flip(2), v[:, :, STEPS.flip(0)])


@expected(EQUAL)
def the_future_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=TRIL.t().bool())


@expected(EQUAL)
def a_bias_of_each_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = -(STEPS[:, None] - STEPS).abs() * torch.tensor([0.1, 0.4])[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=(bias + torch.where(TRIL == 0, -torch.inf, 0.0))[None])


@expected(COUNTS)
def blocks_of_their_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B, H, S // 4, 4, D) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).reshape(B, H, S, D)


@expected(COUNTS)
def through_a_few_latents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    latents = scaled_dot_product_attention(torch.ones(B, H, 5, D), k, v)
    return scaled_dot_product_attention(q, latents, latents)


# -- tokens mixed without attention ------------------------------------------------------------------------------------


@expected(EQUAL)
def a_convolution(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = pad(v.transpose(2, 3).reshape(B, F, S), (3, 0))
    return functional.conv1d(rows, torch.full((F, 1, 4), 0.25), groups=F).view(B, H, D, S).transpose(2, 3)


@expected(EQUAL)
def a_fourier_transform(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.fft.fft(v, dim=2).real


@expected(EQUAL)
def the_token_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.roll(v, 1, 2) + pad(k, (0, 0, 1, 0))[:, :, :-1]


@expected(EQUAL)
def a_recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D), []
    for t in range(S):
        state = torch.tanh(state * 0.5 + k[:, :, t])
        out.append(state)
    return torch.stack(out, 2)


@expected(EQUAL)
def sorted_and_summed_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.sort(2)[0] + torch.zeros(B, H, S, D).index_add(2, STEPS // 2, k) + q.cummax(2)[0] + q.mean(2, keepdim=True)


@expected(EQUAL)
def a_mix_of_fixed_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return TRIL / S @ v


# -- the test ----------------------------------------------------------------------------------------------------------


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUTS = (rand(B, S, F, seed=0), *(rand(F, 3 * F, seed=i) / 3 for i in (1, 2)))


def heads(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (x @ weight).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(B, S, F)


def outcome(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> str:
    """ "equal" to one device on both of two ranks, or the code of the refusal."""
    gm = trace(run, inputs)
    try:
        ranks = cppass.simulate(gm, inputs, 2)
    except cppass.RefusedError as error:
        return error.code if error.hint else "no way out"
    for seen, _ in ranks:
        torch.testing.assert_close(seen, run(*inputs), rtol=1e-5, atol=1e-5)
    return EQUAL


@pytest.mark.parametrize("form", EXPECTED, ids=lambda form: form.__name__.replace("_", " "))
def test_behind_a_known_layer(form: Form) -> None:
    def run(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x = x + merged(scaled_dot_product_attention(*heads(x, first), is_causal=True))
        return x + merged(form(*heads(x, second)))

    assert outcome(run, INPUTS) == EXPECTED[form]


@pytest.mark.parametrize("form", [f for f, outcome in EXPECTED.items() if outcome != EQUAL], ids=lambda f: f.__name__)
def test_alone(form: Form) -> None:
    """Without a layer that is known there may be nothing to share; then the graph is left as it is."""
    assert outcome(form, tuple(rand(B, H, S, D, seed=i) for i in range(3))) in (EQUAL, UNKNOWN, SHAPE, COUNTS)
