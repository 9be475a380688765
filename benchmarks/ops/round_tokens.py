"""Token rounding to tiles of 128: T tokens, E experts, K a token and as many candidates."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.ops._order import INPUT_SETS, ROW_DEFAULTS, slot_sets, whole_truth
from benchmarks.registry import FORWARD_ONLY, Case, Cost, Op, Shape, Truth
from benchmarks.routing import make_topk_ids
from moe_kernels import RoundedTokens, reference

OUTPUTS = RoundedTokens._fields
TILE, MODE = 128, "nearest"


def _columns(shape: Shape) -> int:
    return min(2 * shape["K"], shape["E"])


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    T, E = shape["T"], shape["E"]
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(INPUT_SETS):
        ids = make_topk_ids(T, E, _columns(shape), routing, generator).int()
        weights = torch.rand(ids.shape, generator=generator)
        inputs.append({"topk_weights": weights.to(device), "topk_ids": ids.to(device)})
    return Case(shape, dtype, device, inputs)


def _cost(case: Case) -> Mapping[str, Cost]:
    """Reads weights (fp32) and ids (int32), writes both, and the load."""
    T, E, columns = case.shape["T"], case.shape["E"], _columns(case.shape)
    return {"forward": Cost(0.0, 16.0 * T * columns + 4.0 * E)}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    weights, ids = case.inputs[index]["topk_weights"], case.inputs[index]["topk_ids"]
    fields = reference.round_tokens(
        weights, ids, None, case.shape["E"], case.shape["K"], TILE, MODE
    )
    return whole_truth(OUTPUTS, fields, case.device)


round_tokens = Op(
    name="round_tokens",
    outputs=OUTPUTS,
    shape_sets=slot_sets(),
    defaults=ROW_DEFAULTS,
    # routing weights are float32 whatever the layer's dtype
    dtypes={"cpu": ("fp32",), "cuda": ("fp32",)},
    directions=FORWARD_ONLY,
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
)
