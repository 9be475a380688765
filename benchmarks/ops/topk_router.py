"""Softmax router with renormalised weights: T tokens, E experts, K a token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.ops._order import INPUT_SETS, ROW_DEFAULTS, slot_sets
from benchmarks.registry import Case, Cost, Op, Shape, Truth
from benchmarks.routing import check_top_k
from moe_kernels import reference


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    T, E, K = (shape[letter] for letter in "TEK")
    check_top_k(K, E)
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(INPUT_SETS):
        # distinct multiples of 1/64: exact in every dtype, so that no tie makes ids ambiguous
        rank = torch.rand(T, E, generator=generator).argsort(1)
        logits = ((rank - E // 2) / 64.0).to(device, dtype)
        grad = torch.randn(T, K, generator=generator).to(device)
        inputs.append({"logits": logits.requires_grad_(), "grad": grad})
    return Case(shape, dtype, device, inputs, differentiable=("logits",))


def _cost(case: Case) -> Mapping[str, Cost]:
    """Forward reads the logits, writes weights (fp32) and ids; backward re-reads all of it."""
    T, E, K = (case.shape[letter] for letter in "TEK")
    logits, chosen = float(T * E * case.dtype.itemsize), 4.0 * T * K
    return {
        "forward": Cost(0.0, logits + 2 * chosen),
        "backward": Cost(0.0, 2 * logits + 2 * chosen),
    }


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs = case.inputs[index]
    tokens = torch.arange(0, case.shape["T"], max(1, case.shape["T"] // 64), device=case.device)
    logits = inputs["logits"].detach()[tokens].double().requires_grad_()
    weights, ids, _, _ = reference.topk_router(logits, case.shape["K"], renormalize=True)
    found = {
        "topk_weights": Truth(tokens, weights.detach()),
        "topk_ids": Truth(tokens, ids.double()),
    }
    if gradients:
        (dlogits,) = torch.autograd.grad(weights, logits, inputs["grad"][tokens].double())
        found["logits"] = Truth(tokens, dlogits)
    return found


topk_router = Op(
    name="topk_router",
    outputs=("topk_weights", "topk_ids"),
    shape_sets=slot_sets(),
    defaults=ROW_DEFAULTS,
    routed=False,
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
