"""Qwen3 written with torch_npu's ops, with context parallelism; without an NPU the ops run on CPU kernels.

    export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # without CANN: torchrun itself imports torch
    torchrun --nproc-per-node=2 examples/npu_dialect.py

Two prompts are packed into one prefill (TND); every rank ends with all logits and the whole paged cache.
"""

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # loopback (Linux)

import cppass  # isort: skip  (before torch and torch_npu: lets both load without CANN)
import torch
import torch.distributed as dist

from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.forward_metadata import plan_step
from cppass.demo.presets import PRESETS


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    preset = PRESETS["qwen3-tiny"]
    model = Qwen3(preset, blocks=4).requires_grad_(False)
    lengths = [61, 40]
    ids = torch.randint(0, preset.vocab, (sum(lengths),))
    step = plan_step(lengths, block_size=128, blocks=4)

    expected = model(ids, step.position_ids, step.metadata)
    model.clear_caches()
    compiled = torch.compile(model, backend="npu_cp", options={"inner": "npugraph_ex"})
    logits = compiled(ids, step.position_ids, step.metadata)

    if dist.get_rank() == 0:
        print(cppass.last_report())
        print(f"largest difference from one device: {(logits - expected).abs().max():.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
