"""Products of row groups in float8: R rows, E experts, D contracted size, N columns."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.accuracy import FLOAT8_PRODUCT
from benchmarks.ops.grouped_gemm import grouped_gemm
from benchmarks.ops.quantize import blocks_of
from benchmarks.registry import FORWARD_ONLY, Case, Cost, Op, Shape, Truth
from moe_kernels import reference


def _make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int
) -> Case:
    """The operands of grouped_gemm, quantised; results in the dtype."""
    case = grouped_gemm.make_case(shape, dtype, device, routing, seed)
    inputs = []
    for each in case.inputs:
        a, scales_a = reference.quantize_rows(each["a"].detach())
        inputs.append({"a": a, "scales_a": scales_a, "offsets": each["offsets"]})
    w, scales_w = reference.quantize_weights(case.weights["w"].detach(), transposed=False)
    return Case(shape, dtype, device, inputs, {"w": w, "scales_w": scales_w})


def _cost(case: Case) -> Mapping[str, Cost]:
    """Reads a and the hit experts as float8 with their scales, writes c."""
    R, D, N = (case.shape[letter] for letter in "RDN")
    hit = sum(float((i["offsets"].diff() > 0).sum()) for i in case.inputs) / len(case.inputs)
    read = hit * (D * N + 4 * blocks_of(D) * blocks_of(N)) + R * (D + 4 * blocks_of(D))
    return {"forward": Cost(2.0 * R * D * N, read + R * N * case.dtype.itemsize)}


def _truth(case: Case, index: int, gradients: bool) -> Mapping[str, Truth]:
    """Of the operands as they are: the quantisation is no error here."""
    inputs = case.inputs[index]
    offsets = inputs["offsets"].tolist()
    expert = max(range(len(offsets) - 1), key=lambda e: offsets[e + 1] - offsets[e])
    rows = torch.arange(offsets[expert], offsets[expert + 1], device=case.device)
    some = rows[:: max(1, len(rows) // 64)]
    one = slice(expert, expert + 1)
    w = reference.dequantize_weights(
        case.weights["w"][one], case.weights["scales_w"][one], torch.float64
    )[0]
    a = reference.dequantize_rows(inputs["a"][some], inputs["scales_a"][some], torch.float64)
    return {"c": Truth(some, a @ w.T)}


scaled_grouped_gemm = Op(
    name="scaled_grouped_gemm",
    outputs=("c",),
    shape_sets=grouped_gemm.shape_sets,
    defaults=grouped_gemm.defaults,
    make_case=_make_case,
    cost=_cost,
    truth=_truth,
    dtypes={"cpu": ("bf16",), "cuda": ("bf16",)},
    directions=FORWARD_ONLY,
)
# of bfloat16 operands, which are quantised on the way: errors hold the quantisation's
fp8_grouped_gemm = Op(
    name="fp8_grouped_gemm",
    outputs=("c",),
    shape_sets=grouped_gemm.shape_sets,
    defaults=grouped_gemm.defaults,
    make_case=grouped_gemm.make_case,
    cost=grouped_gemm.cost,
    truth=grouped_gemm.truth,
    dtypes={"cpu": ("bf16",), "cuda": ("bf16",)},
    bound=FLOAT8_PRODUCT,
)
