"""Products of float8 row groups with their expert's float8 matrix, both scaled by blocks.

R rows, E experts, Kd contracted size, N columns; blocks of 128 along Kd and N.
"""

import torch
from torch import Tensor

from moe_kernels.reference._accumulate import accumulate_dtype
from moe_kernels.reference.grouped_gemm import grouped_gemm
from moe_kernels.reference.quantize import (
    dequantize_rows,
    dequantize_weights,
    quantize_rows,
    quantize_weights,
)


def scaled_grouped_gemm(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``[R, N]``: ``grouped_gemm`` of the dequantised operands, in float32 or float64."""
    wide = accumulate_dtype(out_dtype)
    rows = dequantize_rows(a, scales_a, wide)
    return grouped_gemm(rows, dequantize_weights(b, scales_b, wide), offsets, bias, out_dtype)


def fp8_grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    power_of_two: bool = False,
    save_float8: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``scaled_grouped_gemm`` of the quantised operands, and the quantised rows."""
    dtype = torch.float8_e4m3fn
    values, scales = quantize_rows(a, dtype, power_of_two=power_of_two)
    weights = quantize_weights(b, dtype, power_of_two=power_of_two)
    out = scaled_grouped_gemm(
        values, weights[0], scales, weights[1], offsets, bias, out_dtype or a.dtype
    )
    return out, values, scales
