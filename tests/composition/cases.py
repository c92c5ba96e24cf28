"""Every case of this directory, gathered so that four processes are started once. Keys: (topic, name)."""

from __future__ import annotations

from composition.parallel_models import Cut
from composition.parallel_ranks import Batch, Case

EVEN: Batch = ([40, 24], None)  # 2P = 4 divides the lengths
UNEVEN: Batch = ([13, 50, 1], None)
CHUNK: Batch = ([40, 24], [40, 24])  # goes on where EVEN ends

CP_EP = (("cp", "ep"),)
SGLANG = (("attn_cp", "attn_tp"), ("moe_dp", "moe_tp"))
"""TP 4, ATTN_CP 2, MOE_DP 2: test_sglang_layout.py says which rank holds what."""

DENSE = Cut("tp", "tp")
VOCAB = Cut("tp", "tp", vocab=True)
EXPERTS = Cut("", "ep", "own experts")

CASES: dict[tuple[str, str], Case] = {
    ("cp x tp", "replicated"): Case(DENSE, (UNEVEN,), inner="npugraph_ex"),
    ("cp x tp", "replicated, dynamic"): Case(VOCAB, (EVEN, CHUNK), (("tp", "cp"),), dynamic=True),
    ("cp x tp", "replicated, in place"): Case(Cut("tp", "tp", sums="in place"), (EVEN,)),
    ("cp x tp", "sharded"): Case(DENSE, (EVEN, CHUNK), inputs="sharded", dynamic=True),
    ("cp x ep", "replicated"): Case(EXPERTS, (UNEVEN,), CP_EP),
    ("cp x ep", "sharded"): Case(EXPERTS, (UNEVEN,), CP_EP, inputs="sharded"),
    ("exchange", "over ep"): Case(Cut("", "ep", "exchange"), (UNEVEN,), CP_EP),
    ("exchange", "over cp"): Case(Cut("", "cp", "exchange"), (UNEVEN,), CP_EP),
    ("exchange", "sharded"): Case(Cut("", "ep", "exchange"), (EVEN,), CP_EP, inputs="sharded", refused=True),
    ("sglang", "replicated"): Case(Cut("attn_tp", "moe_tp", "width"), (UNEVEN,), SGLANG, "attn_cp"),
    ("sglang", "sharded"): Case(
        Cut("attn_tp", "moe_tp", "own experts", vocab=True), (EVEN,), SGLANG, "attn_cp", inputs="sharded"
    ),
    ("sequence parallel", "replicated"): Case(Cut("tp", "tp", sums="scattered"), (EVEN,)),
    ("sequence parallel", "sharded"): Case(Cut("tp", "tp", sums="scattered"), (EVEN,), inputs="sharded", refused=True),
    ("wrong", "the tp group"): Case(DENSE, (EVEN,), group="tp", refused=True),
    ("wrong", "another size"): Case(DENSE, (EVEN,), cp_size=4, refused=True),
    ("wrong", "the world"): Case(DENSE, (EVEN,), group="", refused=True),
    ("wrong", "a twin of the tp group"): Case(DENSE, (EVEN,), group="twin of tp", refused=True),
    ("wrong", "not summed"): Case(Cut("tp", "tp", sums="not at all"), (EVEN,)),
}


def names_of(topic: str) -> list[str]:
    return [name for of, name in CASES if of == topic]
