"""Mixture of experts: CPU kernels of torch_npu's routing ops and grouped matmul.

Shape suffixes: T tokens, K experts per token, E experts, H hidden size, M = T * K expanded rows, N output columns.

Routing is a stable sort of the M (token, choice) pairs by expert. Two orders of the pairs are in use:

    column major, pair (t, j) is j * T + t:   npu_moe_init_routing, npu_moe_finalize_routing(drop_pad_mode=0)
    row major, pair (t, j) is t * K + j:      npu_moe_init_routing_v2, npu_moe_finalize_routing(drop_pad_mode=2)

Equal scores are ranked by expert number. What the documentation calls undefined comes out as NaN, -1 or zeros.
Sources: the op documentation inside torch_npu 2.13 (``torch_npu/_op_plugin_docs.py``); the MoE kernels of CANN's
ops-transformer for what that leaves open.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lowering.cann_host.kernels.library import kernel, reject
from lowering.cann_host.kernels.norms import quantise_rows

__all__: list[str] = []

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_DTYPE_NUMBERS = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}  # c10::ScalarType
_BIAS = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}


@kernel("npu_moe_gating_top_k_softmax")
def _gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(x) [..., E] in float32, then its K largest: (y [..., K] as x, expert int32, row j * T + t int32).

    Raises:
        RuntimeError: not 2 or 3 dims, a dtype or k that the documentation forbids.
        NotImplementedError: with ``finished``: what comes out for those rows is not documented.
    """
    op = "npu_moe_gating_top_k_softmax"
    _check_gating(op, x, k, finished)
    y, experts = _top(x.float().softmax(-1), k)
    tokens = x.numel() // x.shape[-1]
    rows = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().contiguous()
    return y.to(x.dtype), experts, rows.view(experts.shape)


@kernel("npu_moe_gating_top_k_softmax_v2")
def _gating_top_k_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm 0: softmax, then top k; renorm 1: top k, then softmax of those. The third output is softmax(x) or empty.

    Raises:
        RuntimeError: as ``npu_moe_gating_top_k_softmax``; renorm other than 0 and 1.
        NotImplementedError: with ``finished``; output_softmax of 3 dims, whose shape the meta function gets wrong.
    """
    op = "npu_moe_gating_top_k_softmax_v2"
    _check_gating(op, x, k, finished)
    if renorm not in (None, 0, 1):
        reject(op, f"saw renorm {renorm}; supported are 0 and 1")
    if renorm == 1:
        y, experts = _top(x.float(), k)
        return y.softmax(-1).to(x.dtype), experts, torch.empty(0)
    scores = x.float().softmax(-1)
    y, experts = _top(scores, k)
    if not output_softmax:
        return y.to(x.dtype), experts, torch.empty(0)
    if x.dim() == 3:
        raise NotImplementedError(f"{op}: output_softmax of a 3-dim x; the op's own meta function drops a dim")
    return y.to(x.dtype), experts, scores


@kernel("npu_moe_gating_top_k")
def _gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores by softmax (norm_type 0) or sigmoid (1); the best groups, then the K best experts within them.

    ``bias`` takes part in the choice alone. y [T, K] is the score times ``routed_scaling_factor``; sigmoid scores are
    divided by their sum + eps first, softmax scores are not. Outputs: (y as x, expert int32, scores [T, E] float32:
    NaN unless ``out_flag``).

    Raises:
        RuntimeError: inputs that the documentation forbids, renorm other than 0 among them.
        NotImplementedError: experts by token id (``input_ids``, ``tid2eid``).
    """
    op = "npu_moe_gating_top_k"
    if input_ids is not None or tid2eid is not None:
        raise NotImplementedError(f"{op}: the host kernel has no routing by token id (input_ids, tid2eid)")
    if x.dim() != 2 or x.dtype not in _FLOATS or x.shape[1] > 2048:
        reject(op, f"saw x {x.dtype} {tuple(x.shape)}; it must be [T, E <= 2048] of float16, bfloat16 or float32")
    experts = x.shape[1]
    if bias is not None and (tuple(bias.shape) != (experts,) or bias.dtype != x.dtype):
        reject(op, f"saw bias {bias.dtype} {tuple(bias.shape)}; it must be {x.dtype} [{experts}]")
    if renorm != 0 or norm_type not in (0, 1) or group_select_mode not in (0, 1):
        reject(
            op,
            f"saw renorm {renorm}, norm_type {norm_type}, group_select_mode {group_select_mode}; "
            "supported are 0; 0 and 1; 0 and 1",
        )
    if group_count < 1 or experts % group_count or experts // group_count <= 2:
        reject(op, f"saw group_count {group_count} for {experts} experts; groups must be equal and larger than 2")
    size = experts // group_count
    if -(-size // 32) * 32 * group_count > 2048:
        reject(op, f"saw {group_count} groups of {size}; sizes rounded up to 32 must sum to 2048 at most")
    if not 1 <= k_group <= group_count or not 1 <= k <= k_group * size:
        reject(op, f"saw k {k}, k_group {k_group}; needed 1 <= k_group <= {group_count}, 1 <= k <= k_group * {size}")
    scores = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    ranked = scores if bias is None else scores + bias.float()
    if k_group < group_count:
        ranked = _of_best_groups(ranked, k_group, group_count, group_select_mode)
    chosen = _top(ranked, k)[1]
    y = scores.gather(1, chosen.long())
    if norm_type == 1:
        y = y / (y.sum(-1, keepdim=True) + eps)
    return (
        (y * routed_scaling_factor).to(x.dtype),
        chosen,
        scores if out_flag else torch.full_like(scores, torch.nan),
    )


@kernel("npu_moe_init_routing")
def _init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert: (x[row % T] of the first min(T, active_num) * K, row -> place int32 [M], sorted experts).

    Column major: ``row_idx`` [T, K] is that of ``npu_moe_gating_top_k_softmax``.

    Raises:
        RuntimeError: shapes or dtypes that the documentation forbids.
    """
    op = "npu_moe_init_routing"
    _check_routed(op, x, expert_idx, _FLOATS)
    if row_idx.shape != expert_idx.shape or row_idx.dtype != torch.int32:
        reject(op, f"saw row_idx {row_idx.dtype} {tuple(row_idx.shape)}; it must be int32 {tuple(expert_idx.shape)}")
    if active_num < 0:
        reject(op, f"saw active_num {active_num}; it must not be negative")
    tokens, k = expert_idx.shape
    experts, order = expert_idx.reshape(-1).sort(stable=True)
    rows = row_idx.reshape(-1)[order]
    return x[rows[: min(tokens, active_num) * k].long() % tokens], _inverse(rows), experts


@kernel("npu_moe_init_routing_v2")
def _init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert, row major: (rows [M, H], pair <-> place int32 [M], rows per expert int64, scale [M]).

    Only pairs whose expert is in ``active_expert_range`` = [start, end) get a place. ``row_idx_type`` 0 gives the place
    of each pair (-1 without one), 1 the pair of each place. ``expert_tokens_num_type`` 1 counts rows per active expert
    [end - start]; 2 lists (expert, rows) of those with rows, in a zeroed [expert_num, 2].

    Args:
        scale: float32; [T] is carried along with the rows, or, with ``quant_mode`` 1, [end - start or 1, H] multiplies
            the rows before they are quantised.

    Raises:
        RuntimeError: inputs that the documentation forbids; it allows ``drop_pad_mode`` 0, ``expert_tokens_num_flag``
            True, ``expert_tokens_num_type`` 1 and 2, ``quant_mode`` -1 and 1.
        NotImplementedError: 0 < active_num < M: where the left-out rows go is not documented; x_dtype.
    """
    op = "npu_moe_init_routing_v2"
    _check_routed(op, x, expert_idx, (*_FLOATS, torch.int8))
    if drop_pad_mode != 0 or not expert_tokens_num_flag or expert_tokens_num_type not in (1, 2):
        reject(
            op,
            f"saw drop_pad_mode {drop_pad_mode}, expert_tokens_num_flag {expert_tokens_num_flag}, "
            f"expert_tokens_num_type {expert_tokens_num_type}; supported are 0; True; 1 and 2",
        )
    if quant_mode not in (-1, 1) or (quant_mode == 1 and x.dtype is torch.int8) or offset is not None:
        reject(op, f"saw quant_mode {quant_mode} of {x.dtype}; supported are -1, and 1 of a float, without an offset")
    if row_idx_type not in (0, 1) or active_num < -1 or expert_num < 1:
        reject(
            op,
            f"saw row_idx_type {row_idx_type}, active_num {active_num}, expert_num {expert_num}; "
            "supported are 0 and 1; -1 and above; 1 and above",
        )
    tokens, k = expert_idx.shape
    if 0 < active_num < tokens * k or x_dtype is not None:
        raise NotImplementedError(
            f"{op}: the host kernel places every row; saw active_num {active_num} of {tokens * k}"
        )
    start, end = active_expert_range or (0, expert_num)
    if not 0 <= start < end <= expert_num:
        reject(op, f"saw active_expert_range [{start}, {end}); it must lie within the {expert_num} experts")
    flat = expert_idx.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < expert_num:
        reject(op, f"saw experts {int(flat.min())} to {int(flat.max())} of {expert_num}")

    active = (flat >= start) & (flat < end)
    experts, order = torch.where(active, flat, expert_num).sort(stable=True)
    order = order[: int(active.sum())]
    rows = x[order // k]
    _check_scale(op, scale, tokens, x.shape[1], end - start, quant_mode)
    scales = torch.full((tokens * k,), torch.nan)
    if quant_mode == 1:
        wide = rows.float()
        if scale is not None:
            wide = wide * scale.expand(end - start, -1)[experts[: order.numel()] - start]
        rows, scales[: order.numel()] = quantise_rows(wide)
    elif scale is not None:
        scales[: order.numel()] = scale[order // k]
    expanded = rows.new_zeros(tokens * k, x.shape[1])
    expanded[: order.numel()] = rows
    places = torch.full_like(flat, -1)
    if row_idx_type == 0:
        places[order] = torch.arange(order.numel(), dtype=torch.int32)
    else:
        places[: order.numel()] = order.to(torch.int32)
    counts = torch.bincount(flat[active].long(), minlength=expert_num)[start:end]
    return expanded, places, counts if expert_tokens_num_type == 1 else _pairs(counts, start, expert_num), scales


@kernel("npu_moe_compute_expert_tokens")
def _compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """int32 [num_expert]: rows of the sorted [M] whose expert is at most i.

    Raises:
        RuntimeError: not int32 of one dim, not sorted, experts out of range, num_expert out of (0, 2048].
    """
    op, experts = "npu_moe_compute_expert_tokens", sorted_expert_for_source_row
    if experts.dtype != torch.int32 or experts.dim() != 1 or experts.numel() >= 2**24:
        reject(op, f"saw {experts.dtype} {tuple(experts.shape)}; the experts must be int32 [M < 2^24]")
    if not 0 < num_expert <= 2048:
        reject(op, f"saw num_expert {num_expert}; it must be in (0, 2048]")
    if experts.numel() and (
        bool((experts.diff() < 0).any()) or not 0 <= int(experts[0]) <= int(experts[-1]) < num_expert
    ):
        reject(op, f"the experts must be sorted and within 0 and {num_expert - 1}")
    return torch.searchsorted(experts, torch.arange(num_expert, dtype=torch.int32), right=True).to(torch.int32)


@kernel("npu_moe_finalize_routing")
def _finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """[T, H]: ``skip1 + skip2 + sum_j scales[t, j] * (rows[place(t, j)] + bias[expert(t, j)])``, float32, j rising.

    before:  place(t, j) = expanded_src_to_dst_row[j * T + t]     # drop_pad_mode 0: of npu_moe_init_routing
    after:   place(t, j) = expanded_src_to_dst_row[t * K + j]     # drop_pad_mode 2: of npu_moe_init_routing_v2

    The wheel documents mode 0; 2 is what Ascend's own models pass with ``npu_moe_init_routing_v2``.

    Raises:
        RuntimeError: inputs that the documentation forbids; skip1 without skip2 among them, in mode 0.
        NotImplementedError: drop_pad_mode other than 0 and 2.
    """
    op, rows, places = "npu_moe_finalize_routing", expanded_permuted_rows, expanded_src_to_dst_row
    if drop_pad_mode not in (None, 0, 2):
        raise NotImplementedError(f"{op}: drop_pad_mode {drop_pad_mode}; the host kernel has 0 and 2, both dropless")
    if rows.dim() != 2 or rows.dtype not in _FLOATS:
        reject(op, f"saw rows {rows.dtype} {tuple(rows.shape)}; they must be [M, H] of float16, bfloat16 or float32")
    if places.dtype != torch.int32 or tuple(places.shape) != (rows.shape[0],):
        reject(
            op, f"saw expanded_src_to_dst_row {places.dtype} {tuple(places.shape)}; it must be int32 [{rows.shape[0]}]"
        )
    choices = scales.shape[-1] if scales is not None else (k or 1)
    if choices < 1 or rows.shape[0] % choices:
        reject(op, f"saw {rows.shape[0]} rows and {choices} experts per token")
    tokens = rows.shape[0] // choices
    for name, part, shape in (
        ("skip1", skip1, (tokens, rows.shape[1])),
        ("skip2", skip2, (tokens, rows.shape[1])),
        ("scales", scales, (tokens, choices)),
    ):
        if part is not None and (tuple(part.shape) != shape or part.dtype != rows.dtype):
            reject(op, f"saw {name} {part.dtype} {tuple(part.shape)}; it must be {rows.dtype} {shape}")
    if not drop_pad_mode and skip1 is not None and skip2 is None:
        reject(op, "saw skip1 without skip2")
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < rows.shape[0]:
        reject(op, f"saw places {int(places.min())} to {int(places.max())} of {rows.shape[0]} rows")
    biases = None if bias is None else _row_biases(op, bias, export_for_source_row, rows, (tokens, choices))

    places_TK = places.view(tokens, choices) if drop_pad_mode == 2 else places.view(choices, tokens).t()
    out = torch.zeros(tokens, rows.shape[1])
    for skip in (skip1, skip2):
        out = out if skip is None else out + skip.float()
    for j in range(choices):
        row = rows[places_TK[:, j].long()].float()
        row = row if biases is None else row + biases[:, j]
        out = out + (row if scales is None else row * scales[:, j, None].float())
    return out.to(rows.dtype)


@kernel("npu_moe_token_permute")
def _token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert [M, H], cut like ``[:num_out_tokens]``, and the place int32 [M] of each row-major pair.

    Raises:
        RuntimeError: inputs that the documentation forbids.
    """
    op = "npu_moe_token_permute"
    if tokens.dim() != 2 or tokens.dtype not in _FLOATS or padded_mode:
        reject(
            op,
            f"saw tokens {tokens.dtype} {tuple(tokens.shape)}, padded_mode {padded_mode}; needed float [T, H], False",
        )
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() not in (1, 2):
        reject(op, f"saw indices {indices.dtype} {tuple(indices.shape)}; they must be int32 or int64, [T] or [T, K]")
    if indices.shape[0] != tokens.shape[0] or (indices.dim() == 2 and indices.shape[1] > 512):
        reject(op, f"saw indices {tuple(indices.shape)} for {tokens.shape[0]} tokens; K is at most 512")
    order = indices.reshape(-1).sort(stable=True)[1]
    kept = order[: num_out_tokens or None]
    return tokens[kept // (indices.numel() // max(1, tokens.shape[0]))], _inverse(order)


@kernel("npu_moe_token_unpermute")
def _token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """[T, H]: ``sum_j probs[t, j] * permuted[sorted_indices[t * K + j]]`` in float32; without probs K is 1.

    Raises:
        RuntimeError: inputs that the documentation forbids.
    """
    op, rows = "npu_moe_token_unpermute", permuted_tokens
    if rows.dim() != 2 or rows.dtype not in _FLOATS or padded_mode or restore_shape is not None:
        reject(
            op, f"saw tokens {rows.dtype} {tuple(rows.shape)}, padded_mode {padded_mode}; needed float [M, H], False"
        )
    if sorted_indices.dtype != torch.int32 or tuple(sorted_indices.shape) != (rows.shape[0],):
        reject(op, f"saw sorted_indices {sorted_indices.dtype} {tuple(sorted_indices.shape)}; needed int32 [M]")
    if probs is not None and (probs.dim() != 2 or probs.numel() != rows.shape[0] or probs.dtype not in _FLOATS):
        reject(op, f"saw probs {probs.dtype} {tuple(probs.shape)} for {rows.shape[0]} rows; needed float [T, K]")
    k = 1 if probs is None else probs.shape[1]
    places = sorted_indices.long().view(-1, k)
    out = torch.zeros(places.shape[0], rows.shape[1])
    for j in range(k):
        row = rows[places[:, j]].float()
        out = out + (row if probs is None else row * probs[:, j, None].float())
    return out.to(rows.dtype)


@kernel("npu_grouped_matmul")
def _grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """One matmul per group of rows: ``y[rows of g] = x[rows of g] @ weight[g] + bias[g]``, in float32, rounded once.

    before:  y_MN = npu_grouped_matmul([x_MH], [weight_EHN], group_list=counts_E, group_list_type=1,
                                       group_type=0, split_item=3)[0]
    after:   y_MN = cat([x @ w for x, w in zip(x_MH.split(counts_E), weight_EHN)])

    Args:
        x: one [M, H], or one tensor per group.
        weight: one [E, H, N], or one [H, N] per group.
        group_list: int64 [E], the end row of each group (``group_list_type`` 0) or its rows (1).
        group_type: 0 groups rows, with ``split_item`` 2 or 3: one output. -1: a matmul per pair, ``split_item`` 0 or 1.

    Raises:
        RuntimeError: inputs that the documentation forbids.
        NotImplementedError: quantised inputs and weights, group_list_type 2, group_type 1 and 2.
    """
    op = "npu_grouped_matmul"
    _refuse_quantised(op, x, weight, scale, offset, antiquant_scale, antiquant_offset, per_token_scale)
    if any(part is not None for part in (x_dtype, weight_dtype, scale_dtype, per_token_scale_dtype)):
        raise NotImplementedError(f"{op}: the host kernel has no reinterpreted dtypes")
    if activation_input or activation_quant_scale or activation_quant_offset or act_type:
        reject(op, "an activation is for per-token quantised inputs alone")
    if output_dtype is not None and _DTYPE_NUMBERS.get(output_dtype) != x[0].dtype:
        reject(op, f"saw output_dtype {output_dtype}; without quantisation it is that of x, {x[0].dtype}")
    if group_type not in (0, -1) or group_list_type not in (0, 1, None):
        if group_type in (1, 2) or group_list_type == 2:
            raise NotImplementedError(f"{op}: group_type {group_type}, group_list_type {group_list_type}")
        reject(op, f"saw group_type {group_type}, group_list_type {group_list_type}; group_type must be given")
    _check_matrices(op, x, weight, bias, x_dims=6 if group_type == -1 else 2)
    if group_type == -1:
        if group_list is not None or split_item not in (0, 1) or len(x) != len(weight) or weight[0].dim() != 2:
            reject(op, "group_type -1 takes as many x as 2-dim weights, no group_list, split_item 0 or 1")
        return _products(x, weight, bias)
    if split_item not in (2, 3):
        reject(op, f"saw split_item {split_item}; group_type 0 takes 2 or 3")
    sizes = None if group_list is None else _group_sizes(op, group_list, group_list_type or 0)
    return [torch.cat(_products(_grouped_rows(op, x, weight, sizes), _matrices(weight), bias))]


@kernel("npu_grouped_matmul.List")
def _grouped_matmul_list(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Sequence[int] | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """As above with the end rows in a list of ints; one [H, N] weight per group.

    Raises:
        RuntimeError: inputs that the documentation forbids.
        NotImplementedError: quantised; one x into several outputs with split_item 0, several x with split_item 1: the
            op's own meta functions describe another number of outputs.
    """
    op = "npu_grouped_matmul"
    _refuse_quantised(op, x, weight, scale, offset, antiquant_scale, antiquant_offset, per_token_scale)
    if group_type is not None or group_list_type or act_type:
        reject(op, "with a list of ints, group_type, group_list_type and act_type must be left out")
    if activation_input or activation_quant_scale or activation_quant_offset:
        reject(op, "activation inputs must be None")
    if output_dtype not in (None, x[0].dtype):
        reject(op, f"saw output_dtype {output_dtype}; without quantisation it is that of x, {x[0].dtype}")
    apart = len(x) == len(weight) and not group_list and split_item in (0, 1)
    _check_matrices(op, x, weight, bias, x_dims=6 if apart else 2)
    if any(w.dim() != 2 for w in weight):
        reject(op, "with a list of ints every weight must have 2 dims")
    if split_item not in (0, 1, 2, 3):
        reject(op, f"saw split_item {split_item}; supported are 0 to 3")
    ends = list(group_list or ())
    if len(ends) == 1 or ends != sorted(ends) or (ends and ends[0] < 0):
        reject(op, f"saw group_list {ends}; it must increase, and not have one element")
    if split_item in (0, 1) and split_item != (1 if len(x) == 1 and len(weight) > 1 else 0):
        raise NotImplementedError(f"{op}: split_item {split_item} for {len(x)} x and {len(weight)} weights")
    sizes = [end - first for first, end in itertools.pairwise([0, *ends])] if ends else None
    outputs = _products(x if apart else _grouped_rows(op, x, weight, sizes), weight, bias)
    return outputs if split_item in (0, 1) else [torch.cat(outputs)]


def _matrices(weight: Sequence[Tensor]) -> Sequence[Tensor]:
    return weight[0].unbind(0) if weight[0].dim() == 3 else weight


def _products(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor] | None) -> list[Tensor]:
    products = []
    for group, (rows, matrix) in enumerate(zip(x, weight, strict=True)):
        product = rows.float() @ matrix.float()
        products.append((product if bias is None else product + bias[group].float()).to(rows.dtype))
    return products


def _grouped_rows(op: str, x: Sequence[Tensor], weight: Sequence[Tensor], sizes: list[int] | None) -> Sequence[Tensor]:
    """The rows of each group: x itself, or the one x split."""
    groups = len(_matrices(weight))
    if sizes is not None and len(sizes) != groups:
        reject(op, f"saw {len(sizes)} groups in group_list and {groups} weights")
    if len(x) > 1:
        if len(x) != groups or weight[0].dim() == 3 or (sizes or [p.shape[0] for p in x]) != [p.shape[0] for p in x]:
            reject(
                op, f"several x need one 2-dim weight each and a group_list of their rows, {[p.shape[0] for p in x]}"
            )
        return x
    if sizes is None or sum(sizes) != x[0].shape[0]:
        reject(op, f"saw group sizes {sizes}; they must be given and sum to the {x[0].shape[0]} rows of x")
    return x[0].split_with_sizes(sizes)


def _group_sizes(op: str, group_list: Tensor, kind: int) -> list[int]:
    if group_list.dtype != torch.int64 or group_list.dim() != 1 or group_list.shape[0] > 1024:
        reject(op, f"saw group_list {group_list.dtype} {tuple(group_list.shape)}; it must be int64 [groups <= 1024]")
    given: list[int] = group_list.tolist()
    sizes = given if kind == 1 else [end - first for first, end in itertools.pairwise([0, *given])]
    if any(size < 0 for size in sizes) or (kind == 1 and len(sizes) == 1):
        reject(op, f"saw group_list {given} of type {kind}; 0: it must not fall, 1: no negative, more than one element")
    return sizes


def _refuse_quantised(op: str, x: Sequence[Tensor], weight: Sequence[Tensor], *parts: Sequence[Tensor] | None) -> None:
    dtypes = {t.dtype for t in (*x, *weight)}
    if any(parts) or torch.int8 in dtypes or torch.int32 in dtypes:
        raise NotImplementedError(f"{op}: the host kernel has no quantised matmul")


def _check_matrices(
    op: str, x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor] | None, x_dims: int
) -> None:
    if not x or not weight or max(len(x), len(weight)) > 128:
        reject(op, f"saw {len(x)} x and {len(weight)} weights; supported are 1 to 128")
    dtype = x[0].dtype
    if dtype not in _FLOATS or any(t.dtype != dtype for t in (*x, *weight)):
        reject(
            op, f"saw dtypes {sorted({str(t.dtype) for t in (*x, *weight)})}; x and weight must have one float dtype"
        )
    if any(not 2 <= t.dim() <= x_dims for t in x):
        reject(op, f"saw x of {[t.dim() for t in x]} dims; supported are 2 to {x_dims}")
    if any(w.dim() != 2 for w in weight) and (len(weight) > 1 or weight[0].dim() != 3):
        reject(op, f"saw weights of {[w.dim() for w in weight]} dims; they must be one of 3 dims, or all of 2")
    inner = [w.shape[-2] for w in weight]
    if any(t.shape[-1] != inner[min(i, len(inner) - 1)] for i, t in enumerate(x)) or (
        len(x) == 1 and len(set(inner)) > 1
    ):
        reject(op, f"saw inner sizes {[t.shape[-1] for t in x]} of x, {inner} of the weights")
    if any(t.shape[-1] >= 65536 for t in (*x, *weight)):
        reject(op, "the last dims must be smaller than 65536")
    if bias is None:
        return
    if weight[0].dim() == 3:
        raise NotImplementedError(f"{op}: bias of a 3-dim weight; documented is one 1-dim bias per 2-dim weight")
    fits = [b.dtype == _BIAS[dtype] and b.shape == w.shape[1:] for b, w in zip(bias, weight, strict=False)]
    if len(bias) != len(weight) or not all(fits):
        reject(op, f"needed one bias of {_BIAS[dtype]} [N] per weight")


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last dim, falling, and their int32 numbers; equal ones in rising order of number."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), order[..., :k].to(torch.int32)


def _of_best_groups(ranked_TE: Tensor, k_group: int, group_count: int, mode: int) -> Tensor:
    """-inf outside of the best groups, by their best (mode 0) or the sum of their two best scores (1)."""
    grouped = ranked_TE.view(ranked_TE.shape[0], group_count, -1)
    best = grouped.amax(-1) if mode == 0 else grouped.topk(2, -1)[0].sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _top(best, k_group)[1].long(), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).view_as(ranked_TE)


def _inverse(order: Tensor) -> Tensor:
    """int32 [M]: where each element of a permutation stands in it."""
    places = torch.empty(order.shape, dtype=torch.int32)
    places[order.long()] = torch.arange(order.numel(), dtype=torch.int32)
    return places


def _pairs(counts: Tensor, start: int, expert_num: int) -> Tensor:
    pairs = counts.new_zeros(expert_num, 2)
    used = counts.nonzero().flatten()
    pairs[: used.numel(), 0], pairs[: used.numel(), 1] = used + start, counts[used]
    return pairs


def _row_biases(op: str, bias: Tensor, experts: Tensor | None, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """The bias of each (token, choice) [T, K, H], float32."""
    if experts is None or experts.dtype != torch.int32 or tuple(experts.shape) != shape:
        reject(op, f"a bias needs export_for_source_row, int32 {shape}")
    if bias.dim() != 2 or bias.shape[1] != rows.shape[1] or bias.dtype != rows.dtype:
        reject(op, f"saw bias {bias.dtype} {tuple(bias.shape)}; it must be {rows.dtype} [E, {rows.shape[1]}]")
    return bias[experts.long()].float()


def _check_gating(op: str, x: Tensor, k: int, finished: Tensor | None) -> None:
    if x.dim() not in (2, 3) or x.dtype not in _FLOATS:
        reject(op, f"saw x {x.dtype} {tuple(x.shape)}; it must have 2 or 3 dims of float16, bfloat16 or float32")
    if not 0 < k <= min(x.shape[-1], 1024):
        reject(op, f"saw k {k}; it must be in [1, {min(x.shape[-1], 1024)}]")
    if finished is not None:
        raise NotImplementedError(f"{op}: with finished; what comes out for those rows is not documented")


def _check_routed(op: str, x: Tensor, expert_idx: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dim() != 2 or x.dtype not in dtypes:
        reject(op, f"saw x {x.dtype} {tuple(x.shape)}; it must be [T, H] of {', '.join(map(str, dtypes))}")
    if expert_idx.dtype != torch.int32 or expert_idx.dim() != 2 or expert_idx.shape[0] != x.shape[0]:
        reject(op, f"saw expert_idx {expert_idx.dtype} {tuple(expert_idx.shape)}; it must be int32 [{x.shape[0]}, K]")


def _check_scale(op: str, scale: Tensor | None, tokens: int, width: int, experts: int, quant_mode: int) -> None:
    if scale is None:
        return
    wanted = [(tokens,)] if quant_mode == -1 else [(experts, width), (1, width)]
    if scale.dtype != torch.float32 or tuple(scale.shape) not in wanted:
        reject(op, f"saw scale {scale.dtype} {tuple(scale.shape)}; it must be float32 {wanted[0]}")
