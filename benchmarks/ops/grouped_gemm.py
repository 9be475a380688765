"""Products of row groups: R rows, E experts, D contracted size, N columns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from benchmarks.ops._shapes import ALL_LAYERS, CPU_TOKENS, TRAINING_TOKENS
from benchmarks.registry import Case, Cost, Op, Shape, Truth
from benchmarks.routing import make_topk_ids


def _shapes(name: str, tokens: tuple[int, ...]) -> list[Shape]:
    """Both products of a layer."""
    hidden, inner, experts, top_k = ALL_LAYERS[name]
    sizes = ((hidden, 2 * inner), (inner, hidden))
    return [Shape({"R": t * top_k, "D": d, "N": n, "E": experts}) for t in tokens for d, n in sizes]


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    R, D, N, E = (shape[letter] for letter in "RDNE")
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    w = torch.empty(E, N, D, dtype=dtype, device=device)
    w.normal_(std=D**-0.5, generator=on_device).requires_grad_()
    inputs = []
    for _ in range(4):
        ids = make_topk_ids(R, E, 1, routing, generator)
        counts = torch.bincount(ids.flatten(), minlength=E)
        offsets = torch.zeros(E + 1, dtype=torch.int32)
        offsets[1:] = counts.cumsum(0)
        a = torch.empty(R, D, dtype=dtype, device=device).normal_(generator=on_device)
        grad = torch.empty(R, N, dtype=dtype, device=device).normal_(generator=on_device)
        inputs.append({"a": a.requires_grad_(), "offsets": offsets.to(device), "grad": grad})
    return Case(shape, dtype, device, inputs, {"w": w}, ("a", "w"))


def _cost(case: Case) -> Mapping[str, Cost]:
    """Forward reads a and the hit experts, writes c; backward adds both gradients."""
    R, D, N, E = (case.shape[letter] for letter in "RDNE")
    size = case.dtype.itemsize
    hit = sum(float((i["offsets"].diff() > 0).sum()) for i in case.inputs) / len(case.inputs)
    forward = Cost(2.0 * R * D * N, (hit * D * N + R * (D + N)) * size)
    backward = Cost(4.0 * R * D * N, ((hit + E) * D * N + R * (2 * D + N)) * size)
    return {"forward": forward, "backward": backward}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs, w = case.inputs[index], case.weights["w"].detach()
    offsets = inputs["offsets"].tolist()
    sizes = [end - start for start, end in pairwise(offsets)]
    expert = max(range(len(sizes)), key=sizes.__getitem__)
    rows = torch.arange(offsets[expert], offsets[expert + 1], device=case.device)
    some = rows[:: max(1, len(rows) // 64)]
    w64 = w[expert].double()
    a = inputs["a"].detach()
    found = {"c": Truth(some, a[some].double() @ w64.T)}
    if gradients:
        grad = inputs["grad"]
        found["a"] = Truth(some, grad[some].double() @ w64)
        dw = grad[rows].double().T @ a[rows].double()
        found["w"] = Truth(torch.tensor([expert], device=case.device), dw[None])
    return found


grouped_gemm = Op(
    name="grouped_gemm",
    outputs=("c",),
    shape_sets={
        "cpu": _shapes("qwen3-30b-a3b", CPU_TOKENS),
        **{name: _shapes(name, TRAINING_TOKENS) for name in ALL_LAYERS},
    },
    defaults={"cpu": ("cpu",), "cuda": ("qwen3-30b-a3b", "mixtral-8x7b")},
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
