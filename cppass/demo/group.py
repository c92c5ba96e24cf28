"""The process group of the ranks: gloo, over loopback only."""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING

from cppass.errors import OptionError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def bind_loopback(environment: MutableMapping[str, str]) -> None:
    """Make gloo listen on the loopback interface; gloo's own variable, named after Linux's interface."""
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextlib.contextmanager
def joined(store: Store, rank: int, ranks: int, timeout: float) -> Iterator[Callable[[], None]]:
    """Be a rank of the default process group; gives the group's barrier. Every wait in it ends after `timeout` seconds.

    A failure leaves the group standing: tearing it down could wait for ranks that are gone.
    """
    import torch.distributed as dist

    check_gloo()
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=timeout)
    )
    yield lambda: dist.barrier()
    dist.barrier()
    dist.destroy_process_group()


def check_gloo() -> None:
    """Raises OptionError (CP053) where this torch cannot form a group of CPU ranks."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise OptionError(
            "CP053", "this torch was built without gloo", "install a torch built with distributed support"
        )
