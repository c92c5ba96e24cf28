"""An unmodified Hugging Face Qwen3 with context parallelism: prefill and generate on every rank.

    torchrun --nproc-per-node=2 examples/hugging_face.py

Every rank is handed the same prompt, computes its share of the prefill and gets the whole result.
"""

import cppass  # isort: skip  (before torch: keeps `import torch` working where torch_npu is installed without CANN)
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=1024,
    )
    model = Qwen3ForCausalLM(config).eval()
    prompt = torch.randint(0, config.vocab_size, (1, 501))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    expected = model.generate(prompt, **settings)
    model.compile(backend="npu_cp", dynamic=True)  # compiles forward in place, so generate() uses it
    tokens = model.generate(prompt, **settings)

    if dist.get_rank() == 0:
        print(cppass.last_report())
        print("tokens equal one device:", torch.equal(tokens, expected))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
