"""The order of slots by expert: T tokens, E experts, K a token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.ops._order import INPUT_SETS, ROW_DEFAULTS, slot_sets, whole_truth
from benchmarks.registry import FORWARD_ONLY, Case, Cost, Op, Shape, Truth
from benchmarks.routing import make_topk_ids
from moe_kernels import ExpertOrder, reference

OUTPUTS = ExpertOrder._fields


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    T, E, K = (shape[letter] for letter in "TEK")
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        {"topk_ids": make_topk_ids(T, E, K, routing, generator).to(device)}
        for _ in range(INPUT_SETS)
    ]
    return Case(shape, dtype, device, inputs)


def _cost(case: Case) -> Mapping[str, Cost]:
    """Reads the ids (int64), writes two orders and the offsets (int32)."""
    T, E, K = (case.shape[letter] for letter in "TEK")
    return {"forward": Cost(0.0, 8.0 * T * K + 8.0 * T * K + 4.0 * (E + 1))}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    fields = reference.sort_by_expert(case.inputs[index]["topk_ids"], case.shape["E"])
    return whole_truth(OUTPUTS, fields, case.device)


sort_by_expert = Op(
    name="sort_by_expert",
    outputs=OUTPUTS,
    shape_sets=slot_sets(),
    defaults=ROW_DEFAULTS,
    # it moves no floats: one dtype stands for all
    dtypes={"cpu": ("fp32",), "cuda": ("fp32",)},
    directions=FORWARD_ONLY,
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
