"""A rule for an op of one's own, from outside cppass: the op then runs on each rank's rows instead of on gathered ones.

    python examples/custom_rule.py

Two ranks in this process (cppass.simulate), before and after the rule is registered; results equal one device both
times. docs/extending.md explains rules, and site forms for attention.
"""

import cppass  # isort: skip  (before torch: lets torch_npu load without CANN)
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppass.extend import row_wise

RANKS, HEADS, WIDTH = 2, 4, 32


@torch.library.custom_op("mylib::gated_mlp", mutates_args=())
def gated_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [B, S, H], up [H, 2F], down [F, H] -> [B, S, H]: stands for a fused kernel."""
    gate, value = (x @ up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * value) @ down


@gated_mlp.register_fake
def _(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


def model(x: Tensor, qkv: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A decoder layer; the last row."""
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (x @ qkv).chunk(3, -1))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + out.transpose(1, 2).flatten(2)
    return (x + gated_mlp(x, up, down))[:, -1]


def show(title: str, inputs: tuple[Tensor, ...]) -> bool:
    """Run on all ranks, print what travelled, and say whether every rank has the rows of one device."""
    expected = model(*inputs)
    results = [outputs for outputs, _ in cppass.simulate(model, inputs, RANKS)]
    report = cppass.explain(model, *inputs, cp_size=RANKS)
    error = max(float((seen - expected).abs().max()) for seen in results)
    print(f"{title}: {report.collectives} collectives, {report.received_bytes} bytes received per rank")
    for note in report.notes:
        print(f"  {note}")
    print(f"  equal to one device: {error < 1e-5} (largest difference {error:.1g})")
    return error < 1e-5


def main() -> None:
    torch.manual_seed(0)
    inputs = (
        torch.randn(1, 64, WIDTH),
        torch.randn(WIDTH, 3 * WIDTH) / WIDTH**0.5,
        torch.randn(WIDTH, 4 * WIDTH) / WIDTH**0.5,
        torch.randn(2 * WIDTH, WIDTH) / WIDTH**0.5,
    )
    equal = show("without a rule", inputs)
    cppass.rule("mylib::gated_mlp", row_wise("x"))
    print(cppass.check_rule("mylib::gated_mlp", (torch.randn(8, 64, WIDTH), *inputs[2:])))
    equal &= show("with a rule", inputs)
    if not equal:
        raise SystemExit("results differ from one device")


if __name__ == "__main__":
    main()
