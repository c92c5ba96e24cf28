"""Prefill and decode in processes of their own: prefill ranks share prompts, KV blocks are handed to a decode rank.

    export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # without CANN: torchrun itself imports torch
    torchrun --nproc-per-node=3 examples/prefill_decode.py

Ranks 0 and 1 prefill with context parallelism, so that each ends with the whole cache; rank 0 sends a finished prompt's
blocks to rank 2, which puts them into blocks of its own and decodes without context parallelism. This is the deployment
of SGLang PR #21685, with model_runner.py's runner on both sides.
"""

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # loopback (Linux)

import cppass  # isort: skip  # noqa: F401  (before torch and torch_npu: lets both load without CANN)
import torch
import torch.distributed as dist
from model_runner import Request, Runner, new_model, one_device, serve, trace
from torch import Tensor

SENDER, DECODER = 0, 2


def blocks_of(runner: Runner, request: Request) -> list[Tensor]:
    """Key and value blocks of a request, layer by layer: [blocks, PAGE, kv_heads, head_dim] each."""
    own = torch.tensor(request.blocks)
    return [cache[own] for layer in runner.model.caches() for cache in (layer.k, layer.v)]


def prefill(runner: Runner, requests: list[Request]) -> None:
    """Prompts to their first token; every block that holds one goes to the decode rank."""
    names = {request.name: i for i, request in enumerate(requests)}
    first_only = [Request(r.name, list(r.tokens), 1, r.arrival) for r in requests]
    for request in serve(runner, first_only):  # its blocks are free again, but not written before the next step
        if dist.get_rank() == SENDER:
            dist.send(torch.tensor([names[request.name], request.tokens[-1], len(request.blocks)]), DECODER)
            for blocks in blocks_of(runner, request):
                dist.send(blocks, DECODER)


def decode(runner: Runner, requests: list[Request]) -> list[Request]:
    """Adopt each request as it arrives, then decode all of them together."""
    finished: list[Request] = []
    for _ in requests:
        number, first, count = _received(torch.empty(3, dtype=torch.int64)).tolist()
        request = requests[number]
        if not runner.blocks.admit(request):
            raise RuntimeError(f"no blocks for {request.name}")
        request.cached = request.prompt
        own = torch.tensor(request.blocks[:count])
        for layer in runner.model.caches():
            for cache in (layer.k, layer.v):
                cache[own] = _received(torch.empty(count, *cache.shape[1:], dtype=cache.dtype))
        request.tokens.append(first)
        if request.done:
            runner.blocks.release(request)
            finished.append(request)
        else:
            runner.running.append(request)
    while runner.running:
        finished += runner.step()
    return finished


def _received(buffer: Tensor) -> Tensor:
    dist.recv(buffer, SENDER)
    return buffer


def main() -> None:
    dist.init_process_group("gloo")
    prefill_group = dist.new_group([0, 1])
    requests = trace(seed=2, count=6)
    wrong: list[str] = []
    if dist.get_rank() != DECODER:
        prefill(Runner(prefill_group), requests)
    else:
        runner = Runner(None, blocks=60)
        reference = new_model(blocks=8)
        for request in decode(runner, requests):
            equal = one_device(reference, request.tokens[: request.prompt], request.new) == request.tokens
            print(f"{request.name}: prompt {request.prompt}, {request.new} new tokens, equal to one device: {equal}")
            wrong += [] if equal else [request.name]
        print(f"decode: {dict(runner.steps)} steps")
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(f"tokens differ from one device: {wrong}")


if __name__ == "__main__":
    main()
