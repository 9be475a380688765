"""Swiglu: R rows of 2I columns to I."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.registry import Case, Cost, Op, Shape, Truth
from moe_kernels import reference


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    R, I = shape["R"], shape["I"]  # noqa: E741
    on_device = torch.Generator(device).manual_seed(seed)
    inputs = []
    for _ in range(4):
        h = torch.empty(R, 2 * I, dtype=dtype, device=device).normal_(generator=on_device)
        grad = torch.empty(R, I, dtype=dtype, device=device).normal_(generator=on_device)
        inputs.append({"h": h.requires_grad_(), "grad": grad})
    return Case(shape, dtype, device, inputs, differentiable=("h",))


def _cost(case: Case) -> Mapping[str, Cost]:
    """Forward reads 2I and writes I a row; backward reads 3I and writes 2I."""
    column = float(case.shape["R"] * case.shape["I"] * case.dtype.itemsize)
    return {"forward": Cost(0.0, 3 * column), "backward": Cost(0.0, 5 * column)}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs = case.inputs[index]
    some = torch.arange(0, case.shape["R"], max(1, case.shape["R"] // 64), device=case.device)
    h = inputs["h"].detach()[some].double().requires_grad_()
    a = reference.expert_activation(h, "swiglu", None, False, 1.0, float("inf"))
    found = {"a": Truth(some, a.detach())}
    if gradients:
        (dh,) = torch.autograd.grad(a, h, inputs["grad"][some].double())
        found["h"] = Truth(some, dh)
    return found


expert_activation = Op(
    name="expert_activation",
    outputs=("a",),
    shape_sets={
        "cpu": [Shape({"R": rows, "I": 768}) for rows in (128, 1024, 8192)],
        "cuda": [
            Shape({"R": rows, "I": inner}) for rows in (32768, 262144) for inner in (768, 2048)
        ],
    },
    defaults={"cpu": ("cpu",), "cuda": ("cuda",)},
    routed=False,
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
