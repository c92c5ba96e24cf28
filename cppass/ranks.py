"""Which ranks share a sequence: from CPConfig.group to numbers, with errors that say what is wrong."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist

from cppass.config import NON_GROUP_MEMBER, CPConfig
from cppass.environment import launched_ranks
from cppass.errors import CPWarning, OptionError
from cppass.target import Ranks
from cppass.torch_private import resolve_group

NO_GROUP = "cppass_no_group"  # collectives of a graph that is not meant to run


def ranks_without_group(config: CPConfig) -> Ranks:
    """For run_pass and explain: cp_size and rank are given, the collectives' group may not exist."""
    if config.cp_size is None:
        if config.group is not None or (dist.is_available() and dist.is_initialized()):
            return ranks_of(config)
        raise OptionError(
            "CP004", "cp_size is not given and there is no process group", "pass cp_size, such as cp_size=2"
        )
    name = config.group if isinstance(config.group, str) else NO_GROUP
    return Ranks(config.rank or 0, config.cp_size, name)


def ranks_of(config: CPConfig) -> Ranks:
    """The ranks of the config's process group (default: the world).

    Raises:
        OptionError: no process group where one is needed (CP004), a group without this rank (CP005), a mesh that is
            not one-dimensional or a group of another size than cp_size (CP006).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return _alone(config)
    group = _resolve(config.group)
    try:
        rank = dist.get_rank(group)
    except ValueError as error:
        raise OptionError("CP005", f"the group {group!r} was destroyed", "compile with one that exists") from error
    if rank < 0:
        raise OptionError(
            "CP005",
            f"this process (global rank {dist.get_rank()}) is not in the group {config.group!r}",
            "compile with a group that holds this rank, or run the plain model on it",
        )
    size = dist.get_world_size(group)
    if config.cp_size not in (None, size):
        raise OptionError(
            "CP006",
            f"cp_size={config.cp_size}, but the group has {size} ranks",
            "leave cp_size out where there is a group",
        )
    if config.rank not in (None, rank):
        raise OptionError(
            "CP006",
            f"rank={config.rank}, but this is rank {rank} of the group",
            "leave rank out where there is a group",
        )
    return Ranks(rank, size, _name(group))


def _alone(config: CPConfig) -> Ranks:
    wanted = config.cp_size or launched_ranks()
    if config.group is not None or wanted > 1:
        raise OptionError(
            "CP004",
            f"there is no process group for {wanted if wanted > 1 else config.group!r} ranks",
            "call torch.distributed.init_process_group(...) before the compiled model, or try cppass.explain",
        )
    warnings.warn(
        "cppass: no process group, so there is one rank and nothing to share; the model runs unsharded",
        CPWarning,
        stacklevel=2,
    )
    return Ranks(0, 1, NO_GROUP)


def _resolve(group: Any) -> Any:
    if group is None:
        return dist.group.WORLD
    if isinstance(group, str):
        try:
            return resolve_group(group)
        except (RuntimeError, ValueError) as error:
            raise OptionError(
                "CP005", f"no process group is named {group!r}: {error}", "pass the group itself"
            ) from error
    if hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            names = group.mesh_dim_names
            raise OptionError(
                "CP006",
                f"group is a DeviceMesh of {group.ndim} dimensions {names or ''}; one is needed",
                f"pass one of its dimensions, such as mesh[{(names or ('cp',))[0]!r}]",
            )
        return group.get_group()
    if group == NON_GROUP_MEMBER:
        raise OptionError("CP005", "this process is not in the given group", "run the plain model on this rank")
    return group


def _name(group: Any) -> str:
    return str(group.group_name)
