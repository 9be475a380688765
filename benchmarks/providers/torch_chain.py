"""Plain PyTorch in the measured dtype, one operator after the other: the yardstick of accuracy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.ops.fused_experts import is_oai, matrices
from benchmarks.ops.round_tokens import TILE
from benchmarks.providers.float8_chain import CHAIN, rounded_product
from benchmarks.registry import Case, Implementation, Inputs, Output, Provider


def _order(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Slots sorted by expert, and the end of each expert's rows as grouped_mm wants it."""
    flat = topk_ids.flatten()
    counts = torch.zeros(experts, dtype=flat.dtype, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts.cumsum(0).int()


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _swigluoai(h: Tensor) -> Tensor:
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def _fused_experts(case: Case, *, float8: bool = False) -> Implementation:
    experts, top_k = case.shape["E"], case.shape["K"]
    activation = _swigluoai if is_oai(case) else _swiglu

    def product(rows: Tensor, matrix: Tensor, bias: str, ids: Tensor, ends: Tensor) -> Tensor:
        if float8:
            out = rounded_product(rows, matrix.mT, ends)
        else:
            out = functional.grouped_mm(rows, matrix, offs=ends)
        if bias in case.weights:  # in float32, or its gradient would be summed in the dtype
            out = (out.float() + case.weights[bias].float()[ids]).to(out.dtype)
        return out

    def run(inputs: Inputs) -> Output:
        x, weights = inputs["x"], inputs["topk_weights"]
        gate_up, down = matrices(case)
        slots, ends = _order(inputs["topk_ids"], experts)
        ids = inputs["topk_ids"].flatten()[slots]
        h = product(x[slots // top_k], gate_up, "gate_up_bias", ids, ends)
        out = product(activation(h), down, "down_bias", ids, ends)
        weighted = out.float() * weights.flatten()[slots, None].float()
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return y.index_add(0, slots // top_k, weighted).to(x.dtype)

    return Implementation(run)


def _grouped_gemm(case: Case) -> Implementation:
    w = case.weights["w"]
    return Implementation(lambda i: functional.grouped_mm(i["a"], w.mT, offs=i["offsets"][1:]))


def _permute(case: Case) -> Implementation:
    top_k = case.shape["K"]
    return Implementation(lambda i: i["x"][i["row_to_slot"] // top_k])


def _unpermute(case: Case) -> Implementation:
    def run(inputs: Inputs) -> Output:
        rows = inputs["rows"][inputs["slot_to_row"]]
        return (rows.float() * inputs["weights"][..., None]).sum(1).to(rows.dtype)

    return Implementation(run)


def _chunk_permute(case: Case) -> Implementation:
    count = case.shape["R"]

    def run(inputs: Inputs) -> Output:
        sizes, order = inputs["sizes"], inputs["order"]
        moved = sizes[order]
        shift = (sizes.cumsum(0) - sizes)[order] - (moved.cumsum(0) - moved)
        rows = torch.arange(count, device=sizes.device)
        return inputs["rows"][rows + shift.repeat_interleave(moved, output_size=count)]

    return Implementation(run)


def _sort_by_expert(case: Case) -> Implementation:
    experts = case.shape["E"]

    def run(inputs: Inputs) -> Output:
        ids = inputs["topk_ids"]
        row_to_slot, ends = _order(ids, experts)
        slot_to_row = torch.empty_like(row_to_slot)
        slot_to_row[row_to_slot] = torch.arange(ids.numel(), device=ids.device)
        offsets = functional.pad(ends, (1, 0))
        return row_to_slot.int(), slot_to_row.int().view(ids.shape), offsets

    return Implementation(run)


def _topk_router(case: Case) -> Implementation:
    top_k = case.shape["K"]

    def run(inputs: Inputs) -> Output:
        scores = inputs["logits"].softmax(-1, dtype=torch.float32)
        weights, ids = scores.topk(top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    return Implementation(run)


def _moe_layer(case: Case) -> Implementation:
    route, experts = _topk_router(case).run, _fused_experts(case).run

    def run(inputs: Inputs) -> Output:
        for _ in range(case.shape["N"]):
            weights, ids = route(inputs)
            y = experts({**inputs, "topk_ids": ids, "topk_weights": weights})
        return y

    return Implementation(run)


def _round_tokens(case: Case) -> Implementation:
    """To the nearest multiple: two stable sorts, by weight and then by expert and kind."""
    experts, top_k = case.shape["E"], case.shape["K"]

    def run(inputs: Inputs) -> Output:
        ids, weights = inputs["topk_ids"], inputs["topk_weights"]
        candidate = torch.arange(ids.shape[1], device=ids.device) >= top_k
        kind = (2 * ids.long() + candidate).flatten()
        order = weights.flatten().argsort(descending=True, stable=True)
        order = order[kind[order].argsort(stable=True)]
        counts = torch.zeros(2 * experts, dtype=torch.int64, device=ids.device)
        counts = counts.scatter_add_(0, kind, torch.ones_like(kind)).view(experts, 2)
        chosen, available = counts.unbind(1)
        rest = chosen % TILE
        missing = (TILE - rest) % TILE
        grows = (2 * rest >= TILE) & (missing <= available)
        load = torch.where(grows, chosen + missing, chosen - rest)
        total = counts.sum(1)
        expert = kind[order] // 2
        rank = torch.arange(len(order), device=ids.device) - (total.cumsum(0) - total)[expert]
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = rank < load[expert]
        kept = kept.view(ids.shape)
        return torch.where(kept, weights, 0), torch.where(kept, ids, -1), load.int()

    return Implementation(run)


torch_chain = Provider(
    "torch",
    {
        "fused_experts": _fused_experts,
        "fused_experts_fp8": partial(_fused_experts, float8=True),
        "grouped_gemm": _grouped_gemm,
        "expert_activation": lambda case: Implementation(lambda i: _swiglu(i["h"])),
        "permute": _permute,
        "unpermute": _unpermute,
        "chunk_permute": _chunk_permute,
        "sort_by_expert": _sort_by_expert,
        "topk_router": _topk_router,
        "moe_layer": _moe_layer,
        "round_tokens": _round_tokens,
        **CHAIN,
    },
)
