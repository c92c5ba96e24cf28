"""A graph-mode model runner with context parallelism: paged blocks, continuous batching, chunked prefill, prefix reuse.

    export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # without CANN: torchrun itself imports torch
    torchrun --nproc-per-node=2 examples/model_runner.py

Requests arrive over time. Every step mixes chunks of prompts with the decode rows of requests that are further along.
A step with a chunk of 2P tokens or more is sharded over the ranks, and one compiled graph (one bucket) serves all of
them; steps of decode rows alone call the plain model. Every rank runs the same scheduler, so nothing but the model's
own collectives travels. The tokens of every request are compared with greedy decoding on one device.
"""

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # loopback (Linux)

import cppass  # isort: skip  (before torch and torch_npu: lets both load without CANN)
import collections
import dataclasses
import random
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from cppass.demo.npu.dense import Qwen3
from cppass.demo.npu.forward_metadata import causal_mask, metadata_of
from cppass.demo.npu.forward_metadata import plan_step as plan_alone
from cppass.demo.presets import PRESETS
from cppass.runner import Bucket, plan_step

PAGE = 128  # tokens of a block
PADDING = 0  # the block that belongs to no request: padding rows are written there
PRESET = PRESETS["qwen3-tiny"]


@dataclasses.dataclass
class Request:
    """A prompt and what has become of it: `cached` of `tokens` are in the blocks."""

    name: str
    tokens: list[int]
    new: int
    arrival: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        self.room = -(-(self.prompt + self.new) // PAGE)

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.prompt + self.new


class Blocks:
    """Hands out blocks of the cache; full blocks of a living request serve others with the same beginning."""

    def __init__(self, count: int) -> None:
        self.free = [block for block in range(count) if block != PADDING]
        self.users: collections.Counter[int] = collections.Counter()
        self.filled: dict[tuple[int, ...], int] = {}  # all tokens up to the end of a block -> the block

    def admit(self, request: Request) -> bool:
        """Blocks for the whole request, shared ones first; False where there are too few."""
        shared: list[int] = []
        while (end := (len(shared) + 1) * PAGE) < request.prompt and tuple(request.tokens[:end]) in self.filled:
            shared.append(self.filled[tuple(request.tokens[:end])])
        if request.room - len(shared) > len(self.free):
            return False
        request.blocks = shared + [self.free.pop() for _ in range(request.room - len(shared))]
        request.cached = request.reused = len(shared) * PAGE
        self.users.update(request.blocks)
        return True

    def filled_by(self, request: Request) -> None:
        """Offer the blocks that a request has filled."""
        for number in range(request.cached // PAGE):
            self.filled.setdefault(tuple(request.tokens[: (number + 1) * PAGE]), request.blocks[number])

    def release(self, request: Request) -> None:
        self.users.subtract(request.blocks)
        gone = {block for block in request.blocks if not self.users[block]}
        self.filled = {tokens: block for tokens, block in self.filled.items() if block not in gone}
        self.free.extend(sorted(gone))


class Runner:
    """Schedules steps and runs them. One per rank; all do the same.

    Args:
        group: the ranks that share long steps; None runs every step on the plain model.
        rows: local rows of a sharded step. A step has at most cp_size * rows tokens.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, blocks: int = 40, rows: int = 64, sequences: int = 6
    ) -> None:
        self.rank, self.cp_size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self.model = new_model(blocks)
        self.sharded_model = self.model
        if group is not None:
            options = {"inner": "npugraph_ex", "group": group, "inputs": "sharded"}
            options["sharded_inputs"] = {"input_ids": 0, "position_ids": 0}
            self.sharded_model = torch.compile(self.model, backend="npu_cp", dynamic=True, options=options)
        self.bucket = Bucket(rows, sequences, blocks=8)
        self.blocks = Blocks(blocks)
        self.slots = blocks * PAGE
        self.mask = causal_mask()
        torch._dynamo.mark_static(self.mask)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.steps: collections.Counter[str] = collections.Counter()

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> list[Request]:
        """One forward; returns the requests that it completed."""
        while self.waiting and len(self.running) < self.bucket.sequences and self.blocks.admit(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
        batch = self._batch()
        if not batch:
            return []
        logits = self._forward(batch)
        for row, (request, count) in enumerate(batch):
            request.cached += count
            self.blocks.filled_by(request)
            if request.cached == len(request.tokens):
                request.tokens.append(int(logits[row].argmax()))
        done = [request for request, _ in batch if request.done]
        for request in done:
            self.running.remove(request)
            self.blocks.release(request)
        return done

    def _batch(self) -> list[tuple[Request, int]]:
        """Decode rows first, then chunks of prompts into what is left of the step."""
        left, batch = self.cp_size * self.bucket.rows, []
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.cached):
            count = min(len(request.tokens) - request.cached, left)
            left -= count
            if count:
                batch.append((request, count))
        return batch

    def _forward(self, batch: list[tuple[Request, int]]) -> Tensor:
        """Logits of the last row of each request in the batch."""
        counts, cached = [count for _, count in batch], [request.cached for request, _ in batch]
        ids = [t for r, count in batch for t in r.tokens[r.cached : r.cached + count]]
        positions = [p for r, count in batch for p in range(r.cached, r.cached + count)]
        slots = [r.blocks[p // PAGE] * PAGE + p % PAGE for r, count in batch for p in range(r.cached, r.cached + count)]
        width = max(len(r.blocks) for r, _ in batch)
        table = [r.blocks + [PADDING] * (width - len(r.blocks)) for r, _ in batch]
        plan = plan_step(
            counts,
            cached,
            slot_mapping=torch.tensor(slots, dtype=torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32),
            block_size=PAGE,
            cp_size=self.cp_size,
            rank=self.rank,
            bucket=self.bucket,
            pad_slot=PADDING * PAGE,
            slots=self.slots,
        )
        self.steps["sharded" if plan.sharded else "plain"] += 1
        forward = self.sharded_model if plan.sharded else self.model
        with torch.no_grad():
            logits: Tensor = forward(
                plan.shard(torch.tensor(ids)), plan.shard(torch.tensor(positions)), metadata_of(plan, self.mask)
            )
        return logits


def new_model(blocks: int) -> Qwen3:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return Qwen3(PRESET, blocks=blocks, block_size=PAGE).requires_grad_(False)


def one_device(model: Qwen3, tokens: list[int], new: int) -> list[int]:
    """Greedy decoding of one request, the whole sequence anew for every token."""
    for _ in range(new):
        model.clear_caches()
        plan = plan_alone([len(tokens)], block_size=PAGE)
        logits = model(torch.tensor(tokens), plan.position_ids, plan.metadata)
        tokens = [*tokens, int(logits[0].argmax())]
    return tokens


def trace(seed: int, count: int) -> list[Request]:
    """Requests in order of arrival: prompts of 1 to 300 tokens, some with a beginning in common."""
    rng = random.Random(seed)
    common = [rng.randrange(PRESET.vocab) for _ in range(150)]
    requests, arrival = [], 0
    for number in range(count):
        arrival += rng.randrange(3)
        own = [rng.randrange(PRESET.vocab) for _ in range(rng.choice((1, 7, 40, rng.randrange(1, 300))))]
        tokens = common + own[:150] if number % 3 == 0 else own
        requests.append(Request(f"request {number}", tokens, rng.randrange(1, 7), arrival))
    return requests


def serve(runner: Runner, requests: list[Request]) -> Iterator[Request]:
    """All requests to their end, each as soon as it is done; one is submitted at the step of its arrival."""
    coming, now, left = list(requests), 0, len(requests)
    while left:
        while coming and coming[0].arrival <= now:
            runner.submit(coming.pop(0))
        done = runner.step()
        yield from done
        left, now = left - len(done), now + 1


def main() -> None:
    dist.init_process_group("gloo")
    runner = Runner(dist.group.WORLD)
    finished = list(serve(runner, trace(seed=1, count=9)))
    reference = new_model(blocks=8)
    right = {r.name: one_device(reference, r.tokens[: r.prompt], r.new) == r.tokens for r in finished}
    if dist.get_rank() == 0:
        for request in finished:
            print(f"{request.name}: prompt {request.prompt} ({request.reused} reused), {request.new} new tokens, "
                  f"equal to one device: {right[request.name]}")  # fmt: skip
        graphs = sum(report.status == "rewritten" for report in cppass.reports())
        print(f"{runner.steps['sharded']} sharded steps on {graphs} graph, {runner.steps['plain']} plain ones")
    dist.destroy_process_group()
    if not all(right.values()):
        raise SystemExit(f"tokens differ from one device: {[name for name, equal in right.items() if not equal]}")


if __name__ == "__main__":
    main()
