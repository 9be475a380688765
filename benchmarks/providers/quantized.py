"""Quantised experts: ours in each format, ours without, and the packed products of PyTorch on
CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.providers.moe_kernels import moe_kernels, quantized_experts
from benchmarks.registry import Case, Implementation, Inputs, Output, Provider, Unsupported
from moe_kernels import use_large_pages

_OP = "fused_experts_quantized"


class _Int8:
    """[N, K] in int8 with a scale for each row, as ``torch._weight_int8pack_mm`` takes it."""

    def __init__(self, weight: Tensor) -> None:
        scale = weight.float().abs().amax(1) / 127
        self.codes = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.scales = scale.to(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.codes, self.scales)


class _Int4:
    """[N, K] in int4 in groups of 32, as ``torch._weight_int4pack_mm_for_cpu`` takes it."""

    def __init__(self, weight: Tensor) -> None:
        grouped = weight.float().unflatten(1, (-1, 32))
        scales = grouped.abs().amax(2) / 7
        codes = (grouped / scales[:, :, None]).round().clamp(-8, 7) + 8
        self.codes = torch._convert_weight_to_int4pack_for_cpu(codes.int().flatten(1), 1)
        pairs = torch.stack([scales.mT, torch.zeros_like(scales.mT)], 2)
        self.scales_and_zeros = pairs.to(weight.dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, 32, self.scales_and_zeros)


def _packed(case: Case) -> Implementation:
    """One product for each needed expert, by the functions that quantising libraries call."""
    linear = _Int8 if case.shape["B"] == 8 else _Int4
    if linear is _Int4 and (case.shape["H"] % 32 or case.shape["I"] % 32):
        raise Unsupported("needs H and I to be multiples of 32")
    first, second = (
        [linear(weight) for weight in case.weights[name].detach()] for name in ("gate_up", "down")
    )

    for packed in (*first, *second) if case.large_pages else ():
        use_large_pages(packed.codes)

    def run(inputs: Inputs) -> Output:
        x, ids, weights = inputs["x"], inputs["topk_ids"], inputs["topk_weights"]
        y = torch.zeros(x.shape, dtype=torch.float32)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            gate, up = first[e](x[token]).chunk(2, dim=1)
            out = second[e](functional.silu(gate) * up)
            y.index_add_(0, token, out.float() * weights[token, slot, None].float())
        return y.to(x.dtype)

    return Implementation(run)


moe_kernels_unquantized = Provider(
    "moe_kernels_unquantized", {_OP: moe_kernels.builders["fused_experts"]}
)
moe_kernels_fp8 = Provider("moe_kernels_fp8", {_OP: quantized_experts({8: "fp8"})})
moe_kernels_mxfp4 = Provider("moe_kernels_mxfp4", {_OP: quantized_experts({4: "mxfp4"})})
torch_packed = Provider("torch_packed", {_OP: _packed}, devices=("cpu",))
