"""CPU kernels of expert routing and grouped matmul, against loops over tokens and experts."""

from __future__ import annotations

from typing import Any

import cppass  # noqa: F401  isort: skip  before torch_npu: it makes that importable
import pytest
import torch
import torch_npu  # noqa: F401  registers the ops
from npu.kernel_check import close, run

import lowering.cann_host.kernels  # noqa: F401  registers their CPU kernels

npu = torch.ops.npu
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
T, K, E, H, N = 11, 3, 6, 16, 8
M = T * K


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts_of(tokens: int = T, seed: int = 0) -> torch.Tensor:
    """[tokens, K] distinct experts per token."""
    return randn(tokens, E, seed=seed).argsort(-1)[:, :K].to(torch.int32)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- gating


@BOTH
@pytest.mark.parametrize("shape", [(T, E), (2, 5, E)])
def test_softmax_then_top_k(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype)
    y, experts, rows = run(npu.npu_moe_gating_top_k_softmax, x, None, K)
    scores = x.double().softmax(-1)
    close(y, scores.sort(-1, descending=True)[0][..., :K])
    close(y, scores.gather(-1, experts.long()))
    tokens = x.numel() // E
    flat = rows.view(tokens, K)
    assert all(flat[t, j] == j * tokens + t for t in range(tokens) for j in range(K))


def test_equal_scores_rank_by_expert() -> None:
    assert npu.npu_moe_gating_top_k_softmax(torch.zeros(2, E), None, K)[1].tolist() == [[0, 1, 2]] * 2


@BOTH
def test_softmax_v2(dtype: torch.dtype) -> None:
    x = randn(T, E, dtype=dtype)
    once = npu.npu_moe_gating_top_k_softmax(x, None, K)
    y, experts, scores = run(npu.npu_moe_gating_top_k_softmax_v2, x, k=K)
    assert torch.equal(y, once[0]) and torch.equal(experts, once[1]) and scores.shape == (0,)
    y, experts, _ = run(npu.npu_moe_gating_top_k_softmax_v2, x, k=K, renorm=1)
    close(y, x.double().gather(-1, experts.long()).softmax(-1))


@BOTH
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm_type", [0, 1])
def test_gating_top_k(norm_type: int, biased: bool, dtype: torch.dtype) -> None:
    x, bias = randn(T, E, dtype=dtype), randn(E, seed=1, dtype=dtype) if biased else None
    y, experts, scores = run(
        npu.npu_moe_gating_top_k, x, K, bias=bias, norm_type=norm_type, out_flag=True, routed_scaling_factor=2.5
    )
    wanted = x.double().sigmoid() if norm_type else x.double().softmax(-1)
    close(scores, wanted)
    ranked = scores if bias is None else scores + bias.float()
    assert torch.equal(experts.long(), ranked.argsort(dim=-1, descending=True, stable=True)[:, :K])
    chosen = wanted.gather(1, experts.long())
    close(y, 2.5 * (chosen / chosen.sum(-1, keepdim=True) if norm_type else chosen))


@pytest.mark.parametrize("mode", [0, 1])
def test_gating_by_groups(mode: int) -> None:
    x = randn(T, 12)
    _, experts, _ = run(npu.npu_moe_gating_top_k, x, 3, k_group=2, group_count=4, group_select_mode=mode)
    scores = x.softmax(-1)
    for t in range(T):
        value = [scores[t, 3 * g : 3 * g + 3].sort(descending=True)[0][: mode + 1].sum() for g in range(4)]
        best = sorted(range(4), key=lambda g: -value[g])[:2]
        allowed = [e for g in best for e in range(3 * g, 3 * g + 3)]
        assert experts[t].tolist() == sorted(allowed, key=lambda e: -scores[t, e])[:3]


# --- routing


@pytest.mark.parametrize("active", [0, 4, T, 99])
@BOTH
def test_init_routing(active: int, dtype: torch.dtype) -> None:
    x = randn(T, H, dtype=dtype)
    rows = torch.arange(M, dtype=torch.int32).view(K, T).t().contiguous()
    expert_idx = experts_of()
    expanded, places, experts = run(npu.npu_moe_init_routing, x, rows, expert_idx, active)
    assert torch.equal(experts, expert_idx.flatten().sort()[0])
    for t in range(T):
        for j in range(K):
            place = int(places[j * T + t])
            assert experts[place] == expert_idx[t, j]
            assert place >= expanded.shape[0] or torch.equal(expanded[place], x[t])


@pytest.mark.parametrize(("start", "end"), [(0, E), (2, 5)])
@pytest.mark.parametrize("row_idx_type", [0, 1])
@pytest.mark.parametrize("num_type", [1, 2])
@BOTH
def test_init_routing_v2(start: int, end: int, row_idx_type: int, num_type: int, dtype: torch.dtype) -> None:
    x, expert_idx = randn(T, H, dtype=dtype), experts_of()
    expanded, places, counts, _ = run(
        npu.npu_moe_init_routing_v2, x, expert_idx, active_num=M, expert_num=E, expert_tokens_num_type=num_type,
        expert_tokens_num_flag=True, active_expert_range=[start, end], row_idx_type=row_idx_type,
    )  # fmt: skip
    order = sorted((int(e), pair) for pair, e in enumerate(expert_idx.flatten()) if start <= e < end)
    pairs = [pair for _, pair in order]
    assert torch.equal(expanded[: len(pairs)], x[[pair // K for pair in pairs]])
    if row_idx_type == 0:
        assert places.tolist() == [pairs.index(pair) if pair in pairs else -1 for pair in range(M)]
    else:
        assert places[: len(pairs)].tolist() == pairs
    rows = [sum(e == expert for e, _ in order) for expert in range(start, end)]
    if num_type == 1:
        assert counts.tolist() == rows
    else:
        listed = [[start + i, n] for i, n in enumerate(rows) if n]
        assert counts.tolist() == listed + [[0, 0]] * (E - len(listed))


def test_init_routing_v2_carries_scales_along(capfd: pytest.CaptureFixture[str]) -> None:
    x, scale = randn(T, H), torch.arange(float(T))
    options = {"expert_num": E, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    _, places, _, scales = run(npu.npu_moe_init_routing_v2, x, experts_of(), scale=scale, **options)
    assert torch.equal(scales[places.long()], scale.repeat_interleave(K))
    capfd.readouterr()  # the op's meta function prints


def test_init_routing_v2_quantises() -> None:
    x, smooth = randn(T, H), randn(E, H, seed=1).abs() + 0.5
    options = {"expert_num": E, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "quant_mode": 1}
    expert_idx = experts_of()
    expanded, places, _, scales = run(npu.npu_moe_init_routing_v2, x, expert_idx, scale=smooth, **options)
    wide = x.repeat_interleave(K, 0) * smooth[expert_idx.flatten().long()]
    q, scale = npu.npu_dynamic_quant(wide)
    assert torch.equal(expanded[places.long()], q)
    assert torch.equal(scales[places.long()], scale)


def test_compute_expert_tokens() -> None:
    assert run(npu.npu_moe_compute_expert_tokens, int32(0, 0, 0, 2, 2, 4), 6).tolist() == [3, 3, 5, 5, 6, 6]


@BOTH
@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("extras", [False, True])
def test_finalize_routing(mode: int, extras: bool, dtype: torch.dtype) -> None:
    rows, scales = randn(M, H, dtype=dtype), randn(T, K, seed=1, dtype=dtype)
    skip1, skip2, bias = (randn(n, H, seed=n, dtype=dtype) if extras else None for n in (T, T, E))
    places, expert_idx = randn(M, seed=2).argsort().to(torch.int32), experts_of()
    out = run(npu.npu_moe_finalize_routing, rows, skip1, skip2, bias, scales, places, expert_idx, mode)
    wanted = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for j in range(K):
            row = rows[places[j * T + t if mode == 0 else t * K + j]].double()
            wanted[t] += scales[t, j].double() * (row + (bias[expert_idx[t, j]].double() if bias is not None else 0))
    wanted += (skip1.double() + skip2.double()) if skip1 is not None and skip2 is not None else 0
    close(out, wanted)


def test_finalize_routing_without_scales_takes_k() -> None:
    rows, places = randn(M, H), torch.arange(M, dtype=torch.int32)
    close(
        run(npu.npu_moe_finalize_routing, rows, None, None, None, None, places, None, 2, K), rows.view(T, K, H).sum(1)
    )


@BOTH
@pytest.mark.parametrize("kept", [None, 0, 7, 99, -4])
def test_token_permute(kept: int | None, dtype: torch.dtype) -> None:
    x, expert_idx = randn(T, H, dtype=dtype), experts_of().long()
    permuted, places = run(npu.npu_moe_token_permute, x, expert_idx, kept)
    whole = x.repeat_interleave(K, 0)[expert_idx.flatten().argsort(stable=True)]
    assert torch.equal(permuted, whole[: kept or None])
    assert torch.equal(whole[places.long()], x.repeat_interleave(K, 0))


@BOTH
def test_token_unpermute(dtype: torch.dtype) -> None:
    x, probs = randn(T, H, dtype=dtype), randn(T, K, seed=1, dtype=dtype)
    permuted, places = npu.npu_moe_token_permute(x, experts_of())
    close(run(npu.npu_moe_token_unpermute, permuted, places, probs), x.double() * probs.double().sum(1, keepdim=True))
    assert torch.equal(run(npu.npu_moe_token_unpermute, permuted, places), x.repeat_interleave(K, 0))


# --- grouped matmul

COUNTS = [4, 0, 9, 1, 12, 7]
ENDS = [4, 4, 13, 14, 26, 33]


def by_group(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows.double() @ w.double() for rows, w in zip(x.split(COUNTS), weight, strict=True)])


@BOTH
@pytest.mark.parametrize("split_item", [2, 3])
@pytest.mark.parametrize("form", ["one weight", "many weights", "all many"])
@pytest.mark.parametrize("kind", [0, 1])
def test_grouped_matmul(kind: int, form: str, split_item: int, dtype: torch.dtype) -> None:
    x, weight = randn(M, H, dtype=dtype), randn(E, H, N, seed=1, dtype=dtype)
    group_list = torch.tensor(ENDS if kind == 0 else COUNTS)
    left = list(x.split(COUNTS)) if form == "all many" else [x]
    right = [weight] if form == "one weight" else list(weight.unbind())
    options: dict[str, Any] = {"group_list": group_list, "group_list_type": kind, "split_item": split_item}
    (y,) = run(npu.npu_grouped_matmul, left, right, **options, group_type=0, output_dtype=dtype)
    close(y, by_group(x, weight))


@BOTH
def test_grouped_matmul_of_transposed_weights(dtype: torch.dtype) -> None:
    x, weight = randn(M, H, dtype=dtype), randn(E, N, H, seed=1, dtype=dtype).transpose(1, 2)
    (y,) = run(npu.npu_grouped_matmul, [x], [weight], group_list=torch.tensor(ENDS), group_type=0, split_item=2)
    close(y, by_group(x, weight))


@BOTH
@pytest.mark.parametrize("split_item", [1, 2])
@pytest.mark.parametrize("given", ["list", "bias"])
def test_grouped_matmul_by_a_list(split_item: int, given: str, dtype: torch.dtype) -> None:
    x, weight = randn(M, H, dtype=dtype), randn(E, H, N, seed=1, dtype=dtype)
    bias = randn(E, N, seed=2, dtype=torch.float32) if given == "bias" else None
    y = run(
        npu.npu_grouped_matmul, [x], list(weight), bias=None if bias is None else list(bias), group_list=ENDS,
        split_item=split_item,
    )  # fmt: skip
    assert len(y) == (E if split_item == 1 else 1)
    wanted = by_group(x, weight)
    close(torch.cat(y), wanted if bias is None else wanted + bias.repeat_interleave(torch.tensor(COUNTS), 0).double())


@BOTH
def test_ungrouped_matmuls(dtype: torch.dtype) -> None:
    x, weight = (
        [randn(3, 4, dtype=dtype), randn(2, 5, H, dtype=dtype)],
        [randn(4, 2, dtype=dtype), randn(H, N, dtype=dtype)],
    )
    for y, a, b in zip(run(npu.npu_grouped_matmul, x, weight, group_type=-1), x, weight, strict=True):
        close(y, a.double() @ b.double())


# --- refusals

x, wide, w, e, ends = randn(T, H), randn(M, H), randn(E, H, N), experts_of(), torch.tensor(ENDS)
places, rows = torch.arange(M, dtype=torch.int32), torch.arange(M, dtype=torch.int32).view(T, K)
soft, soft_v2, gate = npu.npu_moe_gating_top_k_softmax, npu.npu_moe_gating_top_k_softmax_v2, npu.npu_moe_gating_top_k
route, route_v2, finalize = npu.npu_moe_init_routing, npu.npu_moe_init_routing_v2, npu.npu_moe_finalize_routing
gmm, permute, unpermute = npu.npu_grouped_matmul, npu.npu_moe_token_permute, npu.npu_moe_token_unpermute
V2 = {"expert_num": E, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
GMM = {"group_list": ends, "group_type": 0, "split_item": 2}
REFUSED: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "softmax of 1 dim": (soft, (x[0],), {}),
    "softmax of int32": (soft, (x.int(),), {}),
    "softmax of no expert": (soft, (x, None, 0), {}),
    "softmax of more than all": (soft, (x, None, H + 1), {}),
    "softmax v2 renorm 2": (soft_v2, (x,), {"renorm": 2}),
    "gating 3 dims": (gate, (x[None], 2), {}),
    "gating renorm": (gate, (x, 2), {"renorm": 1}),
    "gating norm_type": (gate, (x, 2), {"norm_type": 2}),
    "gating bias": (gate, (x, 2), {"bias": x[0, :4]}),
    "gating unequal groups": (gate, (x, 2), {"group_count": 3}),
    "gating groups of two": (gate, (x, 2), {"group_count": 8}),
    "gating too many groups chosen": (gate, (x, 2), {"group_count": 4, "k_group": 5}),
    "gating more than the groups hold": (gate, (x, 5), {"group_count": 4, "k_group": 1}),
    "gating too wide": (gate, (torch.ones(1, 4096), 2), {}),
    "gating padded groups too wide": (gate, (torch.ones(1, 1000), 2), {"group_count": 250}),
    "routing int64": (route, (x, rows, e.long(), T), {}),
    "routing rows": (route, (x, rows[:3], e, T), {}),
    "routing of other tokens": (route, (x[:3], rows, e, T), {}),
    "routing negative": (route, (x, rows, e, -1), {}),
    "v2 int64": (route_v2, (x, e.long()), V2),
    "v2 without counts": (route_v2, (x, e), {"expert_num": E}),
    "v2 cumulative": (route_v2, (x, e), {**V2, "expert_tokens_num_type": 0}),
    "v2 drop": (route_v2, (x, e), {**V2, "drop_pad_mode": 1}),
    "v2 static quant": (route_v2, (x, e), {**V2, "quant_mode": 0}),
    "v2 quant of int8": (route_v2, (x.to(torch.int8), e), {**V2, "quant_mode": 1}),
    "v2 offset": (route_v2, (x, e), {**V2, "offset": x[0]}),
    "v2 no expert_num": (route_v2, (x, e), {**V2, "expert_num": -1}),
    "v2 range": (route_v2, (x, e), {**V2, "active_expert_range": [0, E + 1]}),
    "v2 expert out of range": (route_v2, (x, e), {**V2, "expert_num": 3}),
    "v2 scale": (route_v2, (x, e), {**V2, "scale": x[:3, 0]}),
    "tokens int64": (npu.npu_moe_compute_expert_tokens, (torch.tensor([0, 1]), 2), {}),
    "tokens unsorted": (npu.npu_moe_compute_expert_tokens, (int32(1, 0), 2), {}),
    "tokens out of range": (npu.npu_moe_compute_expert_tokens, (int32(0, 2), 2), {}),
    "tokens of 2049": (npu.npu_moe_compute_expert_tokens, (int32(0, 2), 2049), {}),
    "finalize 3 dims": (finalize, (wide[None], None, None, None, None, places, None), {}),
    "finalize int64": (finalize, (wide, None, None, None, None, places.long(), None), {}),
    "finalize skip1 alone": (finalize, (wide, x, None, None, wide[:T, :K], places, None), {}),
    "finalize skip shape": (finalize, (wide, None, x[:3], None, wide[:T, :K], places, None), {}),
    "finalize scales dtype": (finalize, (wide, None, None, None, wide[:T, :K].half(), places, None), {}),
    "finalize scales rows": (finalize, (wide, None, None, None, wide[:5, :K], places, None), {}),
    "finalize k": (finalize, (wide, None, None, None, None, places, None, 0, 4), {}),
    "finalize places": (finalize, (wide, None, None, None, None, places + 1, None), {}),
    "finalize bias alone": (finalize, (wide, None, None, w[:, :, 0], wide[:T, :K], places, None), {}),
    "finalize bias width": (finalize, (wide, None, None, w[:, 0], wide[:T, :K], places, e), {}),
    "permute padded": (permute, (x, e, None, True), {}),
    "permute other tokens": (permute, (x[:3], e), {}),
    "permute float indices": (permute, (x, e.float()), {}),
    "unpermute int64": (unpermute, (wide, places.long()), {}),
    "unpermute probs": (unpermute, (wide, places, x[:3]), {}),
    "unpermute restore": (unpermute, (wide, places, None, False, [T, H]), {}),
    "matmul dtypes": (gmm, ([wide], [w.half()]), GMM),
    "matmul inner": (gmm, ([wide], [w[:, :4]]), GMM),
    "matmul 3-dim x": (gmm, ([wide[None]], [w]), GMM),
    "matmul without group_type": (gmm, ([wide], [w]), {"group_list": ends, "split_item": 2}),
    "matmul split_item": (gmm, ([wide], [w]), {**GMM, "split_item": 0}),
    "matmul without group_list": (gmm, ([wide], [w]), {"group_type": 0, "split_item": 2}),
    "matmul groups": (gmm, ([wide], [w]), {**GMM, "group_list": ends[1:]}),
    "matmul int32 groups": (gmm, ([wide], [w]), {**GMM, "group_list": ends.int()}),
    "matmul falling groups": (gmm, ([wide], [w]), {**GMM, "group_list": ends.flip(0)}),
    "matmul rows left over": (gmm, ([wide], [w]), {**GMM, "group_list": ends - 1}),
    "matmul one counted group": (gmm, ([wide], [w[:1]]), {**GMM, "group_list": ends[-1:], "group_list_type": 1}),
    "matmul activation": (gmm, ([wide], [w]), {**GMM, "act_type": 1}),
    "matmul output_dtype": (gmm, ([wide], [w]), {**GMM, "output_dtype": torch.float16}),
    "matmul ungrouped with groups": (gmm, ([wide], [w[0]]), {**GMM, "group_type": -1, "split_item": 0}),
    "matmul bias dtype": (gmm, ([wide], list(w)), {**GMM, "bias": list(w[:, 0].half())}),
    "list: falling": (gmm, ([wide], list(w)), {"group_list": ENDS[::-1], "split_item": 2}),
    "list: one": (gmm, ([wide], [w[0]]), {"group_list": [M], "split_item": 2}),
    "list: 3-dim weight": (gmm, ([wide], [w]), {"group_list": ENDS, "split_item": 2}),
    "list: group_type": (gmm, ([wide], list(w)), {"group_list": ENDS, "split_item": 2, "group_type": 0}),
    "list: rows left over": (gmm, ([wide], list(w)), {"group_list": [*ENDS[:-1], M - 1], "split_item": 2}),
}  # fmt: skip
MISSING: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "finished": (soft, (x, torch.zeros(T, dtype=torch.bool), 2), {}),
    "3-dim scores": (soft_v2, (x[None],), {"output_softmax": True}),
    "routing by token id": (gate, (x, K), {"input_ids": e[:, 0], "tid2eid": e}),
    "fewer active rows": (route_v2, (x, e), {**V2, "active_num": 4}),
    "padded experts": (finalize, (wide, None, None, None, None, places, None, 3), {}),
    "key-value groups": (gmm, ([wide], [w]), {**GMM, "group_list_type": 2}),
    "groups of columns": (gmm, ([wide], [w]), {**GMM, "group_type": 2}),
    "int8": (gmm, ([wide.to(torch.int8)], [w.to(torch.int8)]), GMM),
    "scaled": (gmm, ([wide], [w]), {**GMM, "scale": [w[:, 0]]}),
    "bias of all experts": (gmm, ([wide], [w]), {**GMM, "bias": [w[:, 0]]}),
    "list: outputs apart, split_item 0": (gmm, ([wide], list(w)), {"group_list": ENDS, "split_item": 0}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    op, args, options = REFUSED[case]
    with pytest.raises(RuntimeError, match="documentation of the NPU op"):
        op(*args, **options)


@pytest.mark.parametrize("case", MISSING)
def test_what_the_host_does_not_have(case: str) -> None:
    op, args, options = MISSING[case]
    with pytest.raises(NotImplementedError, match="npu_"):
        op(*args, **options)
