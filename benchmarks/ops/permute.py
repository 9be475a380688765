"""Tokens to rows grouped by expert: T tokens, H hidden, E experts, K a token, R = T * K rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.ops._order import ROW_DEFAULTS, make_orders, row_sets
from benchmarks.registry import Case, Cost, Op, Shape, Truth


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    T, H, K = (shape[letter] for letter in "THK")
    generator = torch.Generator(device).manual_seed(seed)
    inputs = []
    for order in make_orders(shape, device, routing, seed):
        x = torch.empty(T, H, dtype=dtype, device=device).normal_(generator=generator)
        grad = torch.empty(T * K, H, dtype=dtype, device=device).normal_(generator=generator)
        inputs.append({"x": x.requires_grad_(), "grad": grad, **order})
    return Case(shape, dtype, device, inputs, differentiable=("x",))


def _cost(case: Case) -> Mapping[str, Cost]:
    """Each way [T, H] on one side and [R, H] on the other."""
    moved = case.shape["T"] * (1.0 + case.shape["K"]) * case.shape["H"] * case.dtype.itemsize
    return {"forward": Cost(0.0, moved), "backward": Cost(0.0, moved)}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs, top_k = case.inputs[index], case.shape["K"]
    rows = torch.arange(0, case.shape["T"] * top_k, max(1, case.shape["T"]), device=case.device)
    tokens = inputs["row_to_slot"][rows].long() // top_k
    found = {"rows": Truth(rows, inputs["x"].detach()[tokens].double())}
    if gradients:
        own_rows = inputs["slot_to_row"][tokens].long()
        found["x"] = Truth(tokens, inputs["grad"][own_rows].double().sum(1))
    return found


permute = Op(
    name="permute",
    outputs=("rows",),
    shape_sets=row_sets(),
    defaults=ROW_DEFAULTS,
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
