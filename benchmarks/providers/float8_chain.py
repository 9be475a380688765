"""float8 in plain PyTorch: the yardstick of accuracy, and PyTorch's own scaled product."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.registry import Case, Implementation, Inputs, Output, Provider, Unsupported

BLOCK, LARGEST, FLOAT8 = 128, 448.0, torch.float8_e4m3fn
ROWS = 4  # that cuBLAS scales by blocks at once


def _quantize(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x [..., M, N] in blocks of ``rows`` x 128: values, and scales [..., M / rows, N / 128]."""
    M, N = x.shape[-2:]
    padded = functional.pad(x.float(), (0, -N % BLOCK, 0, -M % rows))
    cells = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    scales = cells.abs().amax((-3, -1)) / LARGEST
    values = cells / scales[..., :, None, :, None].clamp_min(1e-30)
    return values.reshape(padded.shape)[..., :M, :N].to(FLOAT8), scales


def _dequantize(values: Tensor, scales: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    M, N = values.shape[-2:]
    each = scales.repeat_interleave(rows, -2)[..., :M, :].repeat_interleave(BLOCK, -1)[..., :N]
    return (values.float() * each).to(dtype)


def _round(x: Tensor, rows: int) -> Tensor:
    return _dequantize(*_quantize(x, rows), rows, x.dtype)


class _Product(torch.autograd.Function):
    """grouped_mm of rounded operands; gradients go straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        a, w = _round(a, 1), _round(w, BLOCK)
        ctx.save_for_backward(a, w, ends)
        return functional.grouped_mm(a, w.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, w, ends = ctx.saved_tensors
        da = functional.grouped_mm(_round(grads[0], 1), w, offs=ends)
        return da, functional.grouped_mm(grads[0].mT, a, offs=ends), None


def rounded_product(a: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """grouped_mm with w [E, N, D], of operands rounded to float8."""
    out: Tensor = _Product.apply(a, w, ends)
    return out


def _fp8_grouped_gemm(case: Case) -> Implementation:
    w = case.weights["w"]

    def run(inputs: Inputs) -> Output:
        return rounded_product(inputs["a"], w, inputs["offsets"][1:])

    return Implementation(run)


def _scaled_grouped_gemm(case: Case) -> Implementation:
    w, scales_w, dtype = case.weights["w"], case.weights["scales_w"], case.dtype

    def run(inputs: Inputs) -> Output:
        a = _dequantize(inputs["a"], inputs["scales_a"], 1, dtype)
        b = _dequantize(w, scales_w, BLOCK, dtype)
        return functional.grouped_mm(a, b.mT, offs=inputs["offsets"][1:])

    return Implementation(run)


def _quantize_weights(case: Case) -> Implementation:
    w = case.weights["w"]

    def run(inputs: Inputs) -> Output:
        values, scales = _quantize(w, BLOCK)
        return values.mT, scales.mT

    return Implementation(run)


def _permute_quantize(case: Case) -> Implementation:
    top_k = case.shape["K"]
    return Implementation(lambda i: _quantize(i["x"][i["row_to_slot"] // top_k], 1))


CHAIN = {
    "quantize_rows": lambda case: Implementation(lambda i: _quantize(i["x"], 1)),
    "permute_quantize": _permute_quantize,
    "quantize_weights": _quantize_weights,
    "scaled_grouped_gemm": _scaled_grouped_gemm,
    "fp8_grouped_gemm": _fp8_grouped_gemm,
}


def _multiply_scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor) -> None:
    try:
        torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out.dtype, out=out)
    except RuntimeError as error:
        if "CUBLAS_STATUS_NOT_SUPPORTED" in str(error):
            raise Unsupported("cuBLAS has no such product of these sizes") from error
        raise


def _scaled_mm(case: Case) -> Implementation:
    """A product for each expert; the host reads the offsets.

    PyTorch's grouped one, _scaled_grouped_mm, has scales of whole rows, not of blocks. cuBLAS takes
    rows by fours, so those of an expert are copied where there are others.
    """
    w = case.weights["w"].unbind(0)
    scales_w = case.weights["scales_w"].unbind(0)

    def run(inputs: Inputs) -> Output:
        ends = inputs["offsets"].tolist()
        out = torch.empty(ends[-1], case.shape["N"], dtype=case.dtype, device=case.device)
        for e, (start, end) in enumerate(pairwise(ends)):
            if end > start:
                rows = slice(start, end)
                a, scales, target = inputs["a"][rows], inputs["scales_a"][rows], out[rows]
                if missing := -len(a) % ROWS:
                    a = functional.pad(a.view(torch.uint8), (0, 0, 0, missing)).view(a.dtype)
                    scales = functional.pad(scales, (0, 0, 0, missing))
                    target = target.new_empty(len(a), target.shape[1])
                _multiply_scaled(a, w[e].T, scales.t().contiguous().t(), scales_w[e].T, target)
                if missing:
                    out[rows] = target[: end - start]
        return out

    return Implementation(run)


torch_scaled_mm = Provider(
    "torch_scaled_mm", {"scaled_grouped_gemm": _scaled_mm}, devices=("cuda",)
)
