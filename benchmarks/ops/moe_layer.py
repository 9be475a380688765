"""Router and experts of one layer, N calls in a row: of few tokens, launches are what counts.

T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.ops._shapes import LAYERS, OAI, OAI_LAYERS, layer
from benchmarks.ops.fused_experts import fused_experts
from benchmarks.registry import FORWARD_ONLY, Case, Cost, Inputs, Op, Shape
from moe_kernels import reference

CALLS = {"cpu": 4, "cuda": 50}
TOKENS = {"cpu": (1, 16), "cuda": (1, 4, 16, 64)}


def _shapes(name: str, device: str = "cuda") -> list[Shape]:
    variant = OAI if name in OAI_LAYERS else ""
    shapes = [layer(t, *(LAYERS | OAI_LAYERS)[name], variant) for t in TOKENS[device]]
    return [Shape({**shape.sizes, "N": CALLS[device]}, variant) for shape in shapes]


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    experts = fused_experts.make_case(shape, dtype, device, routing, seed)
    generator = torch.Generator().manual_seed(seed)
    T, E, K = (shape[letter] for letter in "TEK")
    inputs: list[Inputs] = []
    for of in experts.inputs:
        # few bits, and no two alike, so that no tie makes the chosen ambiguous in any dtype
        logits = (torch.rand(T, E, generator=generator).argsort(1) - E // 2) / 128.0
        chosen = (4 + torch.arange(K) / 32).expand(T, K).to(device)
        logits = logits.to(device).scatter_(1, of["topk_ids"], chosen)
        weights, ids, _, _ = reference.topk_router(logits, K, renormalize=True)
        routed = {"topk_ids": ids.long(), "topk_weights": weights, "logits": logits.to(dtype)}
        inputs.append({**of, "x": of["x"].detach(), **routed})
    return Case(shape, dtype, device, inputs, experts.weights)


def _cost(case: Case) -> Mapping[str, Cost]:
    one, calls = fused_experts.cost(case)["forward"], case.shape["N"]
    logits = float(case.shape["T"] * case.shape["E"] * case.dtype.itemsize)
    return {"forward": Cost(calls * one.flops, calls * (one.bytes + logits))}


moe_layer = Op(
    name="moe_layer",
    outputs=("y",),
    shape_sets={
        "cpu": _shapes("qwen3-30b-a3b", "cpu"),
        **{name: _shapes(name) for name in LAYERS | OAI_LAYERS},
    },
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b",)},
    make_case=_make_case,
    cost=_cost,
    truth=fused_experts.truth,
    directions=FORWARD_ONLY,
    variants=fused_experts.variants,
)
