"""Figures of this host, measured in a few seconds: a rank is a process of one thread, as in `cppass run`.

    python -m cppass.cost.host FOLDER ROUNDS RANK      one of the two ranks of the link's measurement

Link and latency are those of gloo over loopback between two ranks. More ranks than cores share them; the figures do not
know that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cppass.cost.hardware import MICRO, Hardware
from cppass.errors import CPError

if TYPE_CHECKING:
    import torch

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 60.0
SMALL, LARGE = 1, 1 << 21
"""Elements (float32) of a rank in the all-gathers that are timed: 4 B shows the latency, 8 MB the bandwidth."""


def calibrate(seconds: float = 4.0, link: bool = True) -> Hardware:
    """Measure this host.

    Args:
        seconds: spent on measuring, about; starting two processes for the link takes a few more.
        link: False takes memory copy bandwidth for the link, and 50 us of latency.

    Raises:
        CPError: CP654, the two processes of the link did not finish.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    share = seconds / 5
    try:
        a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
        matmul = 2 * 512 * 1024 * 1024 / _median(lambda: a @ b, share)
        q = torch.randn(1, 4, 1024, 64)
        pairs = 1024 * 1025 / 2
        attention = 4 * 4 * 64 * pairs / _median(lambda: attend(q, q, q, is_causal=True), share)
        source, target = torch.randn(1 << 23), torch.empty(1 << 23)
        memory = 2 * source.nbytes / _median(lambda: target.copy_(source), share)
        one = torch.zeros(1)
        launch = _median(lambda: one + one, share / 4)
    finally:
        torch.set_num_threads(threads)
    bandwidth, latency = measure_link(share) if link else (memory / 2, 50 * MICRO)
    return Hardware(
        name="host",
        flops=matmul,
        matmul_efficiency=1.0,
        attention_efficiency=attention / matmul,
        memory_bandwidth=memory,
        memory=0.0,
        link_bandwidth=bandwidth,
        peer_bandwidth=bandwidth,
        latency=latency,
        launch=launch,
        fabric=os.cpu_count() or 1,
        network_bandwidth=bandwidth,
        source="measured on this host: one thread, float32, medians",
        assumed="" if link else "link: half of the memory copy bandwidth; latency 50 us",
    )


def measure_link(seconds: float = 1.0) -> tuple[float, float]:
    """(bytes/s that a rank receives, seconds of an empty all-gather) between two processes, gloo over loopback."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = max(5, int(20 * seconds))  # as loopback gives them, about
        command = [sys.executable, "-m", "cppass.cost.host", folder, str(rounds)]
        inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
        if sys.platform == "linux":
            inherited["GLOO_SOCKET_IFNAME"] = "lo"
        environment = {**inherited, "OMP_NUM_THREADS": "1"}
        ranks = [_started([*command, str(rank)], environment) for rank in range(2)]
        try:
            until = time.monotonic() + TIMEOUT
            answers = [rank.communicate(timeout=max(0.1, until - time.monotonic()))[0] for rank in ranks]
            small, large = (float(word) for word in answers[0].split())
        except (subprocess.TimeoutExpired, ValueError) as error:
            raise CPError(
                "CP654", f"two processes could not time an all-gather of gloo within {TIMEOUT:g} s", "see cppass doctor"
            ) from error
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return LARGE * 4 / max(large - small, 1e-9), small


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def _median(act: Callable[[], torch.Tensor], seconds: float) -> float:
    """Median seconds of a call, over about so many seconds and three calls at least."""
    act()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _link_rank(folder: Path, rounds: int, rank: int) -> None:
    """One of two ranks; rank 0 prints the median seconds of a small and of a large all-gather."""
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    found = []
    for size in (SMALL, LARGE):
        own, all_of_them = torch.zeros(size), torch.zeros(2 * size)
        times = []
        for _ in range(rounds + 2):
            start = time.perf_counter()
            dist.all_gather_into_tensor(all_of_them, own)
            times.append(time.perf_counter() - start)
        found.append(sorted(times[2:])[rounds // 2])
    if rank == 0:
        sys.stdout.write(" ".join(map(str, found)))
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _link_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
