"""Figures of devices: published peaks, what share of them is assumed to be reached, and where they come from.

None of these devices was measured by this project; `cppass.cost.host` measures the host.
"""

from __future__ import annotations

import dataclasses

TERA, GIGA, GIB, MICRO = 1e12, 1e9, 2**30, 1e-6


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its links.

    Attributes:
        name: what --hardware takes.
        flops: peak FLOP/s of matmuls in the model's dtype, dense.
        matmul_efficiency, attention_efficiency: share of the peak that large matmuls and causal attention reach.
        memory_bandwidth: bytes/s that ops between matmuls reach (peak times efficiency).
        memory: bytes of a device; 0 where unknown.
        link_bandwidth: bytes/s a rank receives from all others together, one way, achieved.
        peer_bandwidth: bytes/s from one other rank; less than the link in a full mesh, where links are not shared.
        latency: seconds of a collective that moves nothing.
        launch: seconds of a kernel that computes nothing.
        fabric: ranks joined by the link; a network joins more.
        network_bandwidth: bytes/s of a rank over the network; 0 where there is none.
        source: of the peaks.
        assumed: which of these numbers were not published.
    """

    name: str
    flops: float
    matmul_efficiency: float
    attention_efficiency: float
    memory_bandwidth: float
    memory: float
    link_bandwidth: float
    peer_bandwidth: float
    latency: float
    launch: float
    fabric: int
    network_bandwidth: float
    source: str
    assumed: str = ""

    @property
    def matmul_rate(self) -> float:
        """FLOP/s of matmuls."""
        return self.flops * self.matmul_efficiency

    @property
    def attention_rate(self) -> float:
        """FLOP/s of attention, counted over the (query, key) pairs that a causal mask leaves."""
        return self.flops * self.attention_efficiency

    def gather_rate(self, ranks: int) -> float:
        """Bytes/s a rank receives in an all-gather or all-reduce of so many ranks.

        A mesh uses the links to the other ranks. Over several fabrics, rings enter and leave each by all of its ranks'
        network cards.
        """
        rate = min(self.link_bandwidth, max(1, ranks - 1) * self.peer_bandwidth)
        return rate if ranks <= self.fabric else min(self.link_bandwidth, self.fabric * self.network_bandwidth)

    def exchange_rate(self, ranks: int) -> float:
        """The same of an all-to-all: what comes from other fabrics comes through a rank's own network card."""
        if ranks <= self.fabric:
            return self.gather_rate(ranks)
        return min(self.link_bandwidth, self.network_bandwidth * (ranks - 1) / (ranks - self.fabric))

    def neighbour_rate(self, ranks: int) -> float:
        """The same of one step of a ring, which waits for its slowest pair."""
        pair = min(self.link_bandwidth, self.peer_bandwidth)
        return pair if ranks <= self.fabric else min(pair, self.network_bandwidth)


_MSMODELING = (
    "Ascend/msmodeling, tensor_cast/device.py (Huawei's own performance model): peak, HBM 1.6 TiB/s, efficiencies "
    "0.7 matmul, 0.6 memory, 0.7 links; 5 us a matmul, 2 us another op, 10 us a collective"
)
_GPU = "matmul efficiency 0.7, memory 0.8, links 0.8, latency, launch"

HARDWARE: dict[str, Hardware] = {
    h.name: h
    for h in (
        Hardware(
            name="ascend-910b",
            flops=353.9 * TERA,
            matmul_efficiency=0.7,
            attention_efficiency=0.5,
            memory_bandwidth=0.6 * 1.6 * 2**40,
            memory=64 * GIB,
            link_bandwidth=0.7 * 196 * GIGA,
            peer_bandwidth=0.7 * 28 * GIGA,
            latency=10.5 * MICRO,
            launch=4 * MICRO,
            fabric=8,
            network_bandwidth=0.7 * 25 * GIGA,
            source="Atlas 800 A2 376T, bf16 (fp16: 376 TFLOP/s), 8-way full mesh of 7 x 28 GB/s one way; "
            f"{_MSMODELING}",
            assumed="attention efficiency",
        ),
        Hardware(
            name="ascend-a3",
            flops=353.9 * TERA,
            matmul_efficiency=0.7,
            attention_efficiency=0.5,
            memory_bandwidth=0.6 * 1.6 * 2**40,
            memory=64 * GIB,
            link_bandwidth=0.7 * 196 * GIGA,
            peer_bandwidth=0.7 * 196 * GIGA,
            latency=10.5 * MICRO,
            launch=4 * MICRO,
            fabric=768,
            network_bandwidth=0.0,
            source=f"Atlas 800 A3 752T, one of its two dies (a rank is a die), switched 196 GB/s a die; {_MSMODELING}",
            assumed="attention efficiency",
        ),
        Hardware(
            name="h100-sxm",
            flops=989.4 * TERA,
            matmul_efficiency=0.7,
            attention_efficiency=0.6,
            memory_bandwidth=0.8 * 3.35 * TERA,
            memory=80 * GIGA,
            link_bandwidth=0.8 * 450 * GIGA,
            peer_bandwidth=0.8 * 450 * GIGA,
            latency=15 * MICRO,
            launch=2 * MICRO,
            fabric=8,
            network_bandwidth=0.8 * 50 * GIGA,
            source="NVIDIA as reported by glennklockwood.com/garden/processors/h100: 989.4 TFLOP/s bf16 dense, 3.35 "
            "TB/s, NVLink 900 GB/s both ways; DGX H100: 400 Gb/s InfiniBand a GPU; "
            "FlashAttention-3 (arXiv 2407.08608) reaches up to 75 %",
            assumed=f"{_GPU}, attention efficiency",
        ),
        Hardware(
            name="a100-sxm",
            flops=312 * TERA,
            matmul_efficiency=0.7,
            attention_efficiency=0.6,
            memory_bandwidth=0.8 * 2.039 * TERA,
            memory=80 * GIGA,
            link_bandwidth=0.8 * 300 * GIGA,
            peer_bandwidth=0.8 * 300 * GIGA,
            latency=15 * MICRO,
            launch=2 * MICRO,
            fabric=8,
            network_bandwidth=0.8 * 25 * GIGA,
            source="NVIDIA as reported by glennklockwood.com/garden/processors/A100 (80GB): 312 TFLOP/s bf16 dense, "
            "2039 GB/s, NVLink 600 GB/s both ways; DGX A100: 200 Gb/s InfiniBand a GPU; "
            "FlashAttention-2 (arXiv 2307.08691) reaches up to 73 %",
            assumed=f"{_GPU}, attention efficiency",
        ),
        Hardware(
            name="host-core",
            flops=90 * GIGA,
            matmul_efficiency=1.0,
            attention_efficiency=0.6,
            memory_bandwidth=10 * GIGA,
            memory=0.0,
            link_bandwidth=0.7 * GIGA,
            peer_bandwidth=0.7 * GIGA,
            latency=500 * MICRO,
            launch=2 * MICRO,
            fabric=64,
            network_bandwidth=0.0,
            source="round figures of one x86 core in float32 and of gloo over loopback; `cppass cost --hardware host` "
            "measures yours",
            assumed="all of them",
        ),
    )
}
