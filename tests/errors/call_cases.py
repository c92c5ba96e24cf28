"""Ways to compile and call a model, and groups of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from errors.rank_case import Case, case, on
from errors.tiny_model import Tiny, caches, token_ids

# -- how it is compiled and called -------------------------------------------------------------------------------------


@case
def a_mode_of_torch_compile() -> Case:
    return Case(Tiny(), on(token_ids(1, 16)), compile={"mode": "max-autotune"})


@case
def a_whole_graph() -> Case:
    return Case(Tiny(), on(token_ids(1, 16)), compile={"fullgraph": True})


@case
def dynamic_sizes() -> Case:
    return Case(Tiny(), on(token_ids(2, 13)), compile={"dynamic": True})


@case
def inference_mode() -> Case:
    def call(model: Callable[..., Any]) -> Any:
        with torch.inference_mode():
            return model(token_ids(1, 16)).clone()

    return Case(Tiny(), call)


@case
def inputs_made_in_inference_mode() -> Case:
    def call(model: Callable[..., Any]) -> Any:
        with torch.inference_mode():
            own = caches(1, 16)
            return model(token_ids(1, 16), cache=own).clone(), [x.clone() for x in own]

    return Case(Tiny(), call)


@case
def autocast() -> Case:
    def call(model: Callable[..., Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(token_ids(1, 16))

    return Case(Tiny(), call, tolerance=5e-2)


@case
def suppressed_errors() -> Case:
    def call(model: Callable[..., Any]) -> Any:
        with torch._dynamo.config.patch(suppress_errors=True):
            return model(token_ids(1, 16))

    return Case(Tiny(), call)


# -- groups ------------------------------------------------------------------------------------------------------------


def compiled_with(**options: Any) -> Case:
    return Case(Tiny(), on(token_ids(1, 16)), options)


@case
def a_group_that_was_destroyed() -> Case:
    group = dist.new_group([0, 1])
    dist.destroy_process_group(group)
    return compiled_with(group=group)


@case
def the_name_of_a_group_that_was_destroyed() -> Case:
    group = dist.new_group([0, 1])
    name = group.group_name
    dist.destroy_process_group(group)
    return compiled_with(group=name)


@case
def a_group_of_no_such_name() -> Case:
    return compiled_with(group="nobody")


@case
def a_mesh_of_two_dimensions() -> Case:
    return compiled_with(group=dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp")))


@case
def a_size_that_the_group_does_not_have() -> Case:
    return compiled_with(cp_size=4)


@case
def a_rank_that_is_not_this_one() -> Case:
    return compiled_with(rank=1 - dist.get_rank())


@case
def other_token_ids_on_each_rank() -> Case:
    return Case(Tiny(), lambda model: model(token_ids(1, 16, seed=dist.get_rank())), {"check_inputs": True})
