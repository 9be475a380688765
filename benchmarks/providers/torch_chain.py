"""Plain PyTorch in the measured dtype, one operator after the other: the yardstick of accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.providers.float8_chain import CHAIN
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


def _fused_experts(case: Case) -> Implementation:
    gate_up, down = case.weights["gate_up"], case.weights["down"]
    experts, top_k = case.shape["E"], case.shape["K"]

    def run(inputs: Inputs) -> Output:
        x, weights = inputs["x"], inputs["topk_weights"]
        slots, ends = _order(inputs["topk_ids"], experts)
        h = functional.grouped_mm(x[slots // top_k], gate_up.mT, offs=ends)
        out = functional.grouped_mm(_swiglu(h), down.mT, offs=ends)
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


torch_chain = Provider(
    "torch",
    {
        "fused_experts": _fused_experts,
        "grouped_gemm": _grouped_gemm,
        "expert_activation": lambda case: Implementation(lambda i: _swiglu(i["h"])),
        "permute": _permute,
        "unpermute": _unpermute,
        "sort_by_expert": _sort_by_expert,
        "topk_router": _topk_router,
        **CHAIN,
    },
)
