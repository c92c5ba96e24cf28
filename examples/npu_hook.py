"""A backend of your own, with context parallelism as its first pass: cppass.npu_pass in torchair or npugraph_ex.

    export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # without CANN: torchrun itself imports torch
    torchrun --nproc-per-node=2 examples/npu_hook.py --compiler torchair        # or npugraph_ex

The backend stays yours: its settings, passes and caches. The hook rewrites each graph in place before all other passes.
Without an NPU both compilers run their passes and then execute the graph eagerly, on CPU kernels.
"""

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # loopback (Linux)

import cppass  # isort: skip  (before torch and torch_npu: lets both load without CANN)
import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.forward_metadata import plan_step
from cppass.demo.presets import PRESETS


def with_torchair(model: torch.nn.Module) -> Callable[..., Any]:
    """GE: the hook is a field of torchair's CompilerConfig."""
    import torch_npu  # noqa: F401  (makes torchair importable)
    import torchair

    config = torchair.CompilerConfig()
    config.debug.run_eagerly = not torch.npu.is_available()
    config.post_grad_custom_pre_pass = cppass.npu_pass()
    return torch.compile(model, backend=torchair.get_npu_backend(compiler_config=config), dynamic=False)


def with_npugraph_ex(model: torch.nn.Module) -> Callable[..., Any]:
    """ACL graph: the hook is an option. Lengths have to be known (dynamic=False): a hook cannot add graph inputs."""
    import torch_npu  # noqa: F401  (registers the backend)

    options = {"post_grad_custom_pre_pass": cppass.npu_pass(), "force_eager": not torch.npu.is_available()}
    return torch.compile(model, backend="npugraph_ex", dynamic=False, options=options)


COMPILERS = {"torchair": with_torchair, "npugraph_ex": with_npugraph_ex}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiler", choices=COMPILERS, default="torchair")
    compiler = parser.parse_args().compiler

    dist.init_process_group("gloo")  # before npu_pass(), which asks the group for its ranks
    torch.manual_seed(0)
    preset = PRESETS["qwen3-tiny"]
    model = Qwen3(preset, blocks=4).requires_grad_(False)
    lengths = [61, 40]
    ids = torch.randint(0, preset.vocab, (sum(lengths),))
    step = plan_step(lengths, block_size=128, blocks=4)

    expected = model(ids, step.position_ids, step.metadata)
    model.clear_caches()
    logits = COMPILERS[compiler](model)(ids, step.position_ids, step.metadata)

    report = cppass.last_report()
    if dist.get_rank() == 0:
        print(report)
        print(f"{compiler}: largest difference from one device: {(logits - expected).abs().max():.1e}")
    dist.destroy_process_group()
    if report is None:
        raise SystemExit("no graph was rewritten")


if __name__ == "__main__":
    main()
