"""Qwen3-235B-A22B on 16 devices: what prefill nodes with context parallelism and decode nodes hold and exchange.

    python examples/qwen3_235b.py

Closed forms alone: nothing is measured or run. bf16; sizes as Qwen/Qwen3-235B-A22B's config.json has them.
"""

import dataclasses

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 94, 4096, 64, 4, 128, 151_936
EXPERTS, EXPERT_WIDTH, BYTES = 128, 1536, 2
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Node:
    """Ranks of one instance: attention runs tp x cp x dp of them, experts are spread over all (ep).

    tp: heads are split; cp: rows of a sequence are; dp: sequences are.
    """

    name: str
    tp: int
    cp: int
    dp: int

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def weights(self) -> float:
        """Bytes of a rank: its experts, its heads, the embedding and the LM head split over tp."""
        experts = LAYERS * EXPERTS * 3 * HIDDEN * EXPERT_WIDTH / self.ranks
        heads = LAYERS * HIDDEN * HEAD_DIM * (2 * HEADS / self.tp + 2 * max(1, KV_HEADS / self.tp))
        return BYTES * (experts + heads + LAYERS * HIDDEN * EXPERTS + 2 * VOCAB * HIDDEN / self.tp)

    @property
    def kv_per_token(self) -> float:
        """Bytes of a rank's cache for one token: every context-parallel rank has the whole sequence."""
        return LAYERS * 2 * max(1, KV_HEADS / self.tp) * HEAD_DIM * BYTES

    def gathered(self, tokens: int) -> float:
        """Bytes a rank receives for K and V in a prefill: tokens * (Hk * D + Hv * D) * w * (P - 1) / P a layer."""
        return tokens * self.kv_per_token * (self.cp - 1) / self.cp

    def hidden_rows(self, tokens: int) -> float:
        """Bytes of one hidden-states tensor of a rank."""
        return tokens / self.cp * HIDDEN * BYTES


def main() -> None:
    prefill, decode = Node("prefill", tp=4, cp=4, dp=1), Node("decode", tp=4, cp=1, dp=4)
    for node in (prefill, decode):
        print(
            f"{node.name}: {node.ranks} ranks = attention TP {node.tp} x CP {node.cp} x DP {node.dp}, EP {node.ranks}"
        )
        print(f"  weights {node.weights / GB:.1f} GB a rank, cache {node.kv_per_token / 1e3:.1f} kB a token and rank")
    for tokens in (8_192, 32_768, 131_072):
        print(
            f"{tokens:>7} tokens: cache {tokens * prefill.kv_per_token / GB:5.2f} GB, received K/V "
            f"{prefill.gathered(tokens) / GB:5.2f} GB a prefill ({prefill.gathered(tokens) / LAYERS / 1e6:.1f} MB a "
            f"layer), hidden states {prefill.hidden_rows(tokens) / 1e6:6.1f} MB a rank (one device: "
            f"{tokens * HIDDEN * BYTES / 1e6:.1f} MB)"
        )


if __name__ == "__main__":
    main()
