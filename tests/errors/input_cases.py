"""Inputs that a compiled model may be handed: sizes, token ids, masks and positions, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from errors.rank_case import Case, case, on
from errors.tiny_model import HIDDEN, Tiny, caches, token_ids, visible

# -- sizes -------------------------------------------------------------------------------------------------------------


@case
def no_tokens() -> Case:
    return Case(Tiny(), on(token_ids(1, 0)))


@case
def no_sequences() -> Case:
    return Case(Tiny(), on(token_ids(0, 16)))


@case
def one_token() -> Case:
    return Case(Tiny(), on(token_ids(1, 1)))


@case
def one_token_fewer_than_two_a_rank() -> Case:
    return Case(Tiny(), on(token_ids(1, 3)))


@case
def a_prime_number_of_tokens() -> Case:
    return Case(Tiny(), on(token_ids(2, 13)))


@case
def odd_head_size() -> Case:
    return Case(Tiny(heads=3, head_dim=7), on(token_ids(2, 13)))


@case
def heads_that_groups_do_not_divide() -> Case:
    return Case(Tiny(heads=5, groups=2), on(token_ids(1, 13)))


# -- token ids ---------------------------------------------------------------------------------------------------------


@case
def ids_of_one_dimension() -> Case:
    return Case(Tiny(), on(token_ids(1, 16)[0]))


@case
def ids_that_are_floats() -> Case:
    return Case(Tiny(), on(token_ids(1, 16).float()))


@case
def ids_that_are_a_list() -> Case:
    return Case(Tiny(), on(token_ids(1, 16).tolist()))


@case
def ids_that_are_not_contiguous() -> Case:
    return Case(Tiny(), lambda model: model(token_ids(16, 3).t()))


@case
def ids_beyond_the_vocabulary() -> Case:
    return Case(Tiny(), on(token_ids(1, 16) + 1000))


@case
def ids_without_memory() -> Case:
    return Case(Tiny(), on(token_ids(1, 16).to("meta")))


@case
def a_model_without_memory() -> Case:
    return Case(Tiny().to("meta"), on(token_ids(1, 16).to("meta")))


@case
def embeddings_that_are_not_contiguous() -> Case:
    rows = torch.randn(HIDDEN, 16, 2, generator=torch.Generator().manual_seed(0))
    return Case(Tiny().hidden_states, lambda model: model(rows.permute(2, 1, 0)))


@case
def embeddings_that_need_gradients() -> Case:
    rows = torch.randn(1, 16, HIDDEN, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return Case(Tiny().hidden_states, lambda model: model(rows))


@case
def embeddings_of_two_widths() -> Case:
    return Case(Tiny().hidden_states, on(torch.ones(1, 16, HIDDEN + 1)))


# -- masks and positions -----------------------------------------------------------------------------------------------


@case
def no_mask_at_all() -> Case:
    return Case(Tiny(causal=False), on(token_ids(2, 16)))


@case
def a_sliding_window() -> Case:
    return Case(Tiny(), on(token_ids(2, 16), mask=visible(16) & ~visible(16).roll(-5, 1).tril(-5)))


@case
def packed_sequences() -> Case:
    sequence = torch.tensor([0] * 5 + [1] * 4 + [2] * 7)
    return Case(Tiny(), on(token_ids(1, 16), mask=visible(16) & (sequence[:, None] == sequence)))


@case
def left_padding() -> Case:
    real = torch.arange(16)[None] >= torch.tensor([[0], [6]])
    return Case(Tiny(), on(token_ids(2, 16), mask=(visible(16) & real[:, None])[:, None]))


@case
def a_mask_of_numbers() -> Case:
    return Case(
        Tiny(), on(token_ids(2, 16), mask=torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3)))
    )


@case
def a_mask_that_hides_everything_from_a_row() -> Case:
    return Case(Tiny(), on(token_ids(1, 16), mask=visible(16) & (torch.arange(16) != 7)[:, None]))


@case
def a_mask_of_other_sizes() -> Case:
    return Case(Tiny(), on(token_ids(1, 16), mask=visible(15)))


@case
def positions_that_start_late() -> Case:
    return Case(Tiny(), on(token_ids(1, 16), positions=torch.arange(5, 21)))


# -- caches ------------------------------------------------------------------------------------------------------------


@case
def a_cache_that_fits() -> Case:
    return Case(Tiny(), on(token_ids(1, 13), cache=caches(1, 16)))


@case
def a_cache_too_short_for_the_prompt() -> Case:
    return Case(Tiny(), on(token_ids(1, 16), cache=caches(1, 12)))


@case
def a_prompt_past_the_end_of_the_cache() -> Case:
    return Case(Tiny(), on(token_ids(1, 16), cache=caches(1, 20), first=torch.tensor(8)))


@case
def a_cache_of_another_dtype() -> Case:
    return Case(Tiny(), on(token_ids(1, 16), cache=[x.double() for x in caches(1, 16)]))


@case
def a_cache_of_another_batch() -> Case:
    return Case(Tiny(), on(token_ids(1, 16), cache=caches(2, 16)))


@case
def a_cache_that_is_not_contiguous() -> Case:
    return Case(
        Tiny(),
        lambda model: (
            model(
                token_ids(1, 16), cache=(own := [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches(1, 20)])
            ),
            own,
        ),
    )


@case
def one_cache_for_keys_and_values() -> Case:
    def call(model: Callable[..., Any]) -> Any:
        both = caches(1, 20)[0]
        return model(token_ids(1, 16), cache=[both, both]), both

    return Case(Tiny(), call)


@case
def caches_that_are_views_of_one_tensor() -> Case:
    def call(model: Callable[..., Any]) -> Any:
        whole = torch.stack(caches(1, 20))
        return model(token_ids(1, 16), cache=[whole[0], whole[1]]), whole

    return Case(Tiny(), call)


@case
def a_cache_used_again_without_a_reset() -> Case:
    def call(model: Callable[..., Any]) -> Any:
        own = caches(1, 20)
        first = model(token_ids(1, 16), cache=own)
        return first, model(token_ids(1, 12, seed=5), cache=own), own

    return Case(Tiny(), call)
