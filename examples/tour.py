"""Context parallelism on one screen: an unmodified Qwen3 on two ranks, equal to one device.

    python examples/tour.py

Starts two ranks by itself. `rank` is the whole program; under torchrun it would begin with init_process_group("gloo").
"""

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # loopback (Linux)

import cppass  # isort: skip  (before torch: keeps `import torch` working where torch_npu is installed without CANN)
import datetime
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Qwen3Config, Qwen3ForCausalLM

RANKS, PROMPT = 2, 301
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 512}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def rank(number: int, store: str) -> None:
    """What each rank does: the same model and prompt everywhere, compiled with one line."""
    torch.set_num_threads(1)
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=number, world_size=RANKS, timeout=minute)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS)).eval()
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT))

    compiled = torch.compile(model, backend="npu_cp")  # the one line
    with torch.no_grad():
        expected = model(prompt).logits  # this rank alone, the whole prompt
        logits = compiled(prompt).logits  # its share of the prompt; the other ranks have the rest

    if number == 0:
        print(cppass.last_report())
        print(f"largest difference from one device: {(logits - expected).abs().max():.1e}")
        print("same tokens as one device:", torch.equal(logits.argmax(-1), expected.argmax(-1)))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (f"{folder}/store",), nprocs=RANKS)
