"""Rows back to tokens, weighted: T tokens, H hidden, E experts, K a token, R = T * K rows."""

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
        rows = torch.empty(T * K, H, dtype=dtype, device=device).normal_(generator=generator)
        weights = torch.rand(T, K, device=device, generator=generator) + 0.1
        grad = torch.empty(T, H, dtype=dtype, device=device).normal_(generator=generator)
        inputs.append(
            {
                "rows": rows.requires_grad_(),
                "weights": weights.requires_grad_(),
                "grad": grad,
                **order,
            }
        )
    return Case(shape, dtype, device, inputs, differentiable=("rows", "weights"))


def _cost(case: Case) -> Mapping[str, Cost]:
    """Forward reads [R, H], writes [T, H]; backward reads both and writes [R, H]."""
    T, H, K = (case.shape[letter] for letter in "THK")
    copy = float(T * H * case.dtype.itemsize)
    return {"forward": Cost(0.0, copy * (K + 1)), "backward": Cost(0.0, copy * (2 * K + 1))}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    inputs = case.inputs[index]
    tokens = torch.arange(0, case.shape["T"], max(1, case.shape["T"] // 16), device=case.device)
    own_rows = inputs["slot_to_row"][tokens].long()
    rows = inputs["rows"].detach()[own_rows].double()
    weights = inputs["weights"].detach()[tokens].double()
    found = {"y": Truth(tokens, (rows * weights[..., None]).sum(1))}
    if gradients:
        grad = inputs["grad"][tokens].double()
        drows = (weights[..., None] * grad[:, None]).flatten(0, 1)
        found["rows"] = Truth(own_rows.flatten(), drows)
        found["weights"] = Truth(tokens, (rows * grad[:, None]).sum(-1))
    return found


unpermute = Op(
    name="unpermute",
    outputs=("y",),
    shape_sets=row_sets(),
    defaults=ROW_DEFAULTS,
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
