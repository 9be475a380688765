"""Products of float8 row groups with their expert's float8 matrix, both scaled by blocks.

R rows, E experts, Kd contracted size, N columns; blocks of 128 along Kd and N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kernels.ops._autocast import autocast
from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_flag,
    check_same,
    check_tensor,
    shape,
)
from moe_kernels.ops._library import (
    call_op,
    define,
    owed_gradients,
    refuse_backward,
    register_autograd,
    remember_inputs,
)
from moe_kernels.ops.grouped_gemm import check_operands
from moe_kernels.ops.quantize import FLOAT8_DTYPES, blocks_of, check_row_scales
from moe_kernels.reference.grouped_gemm import is_transposed
from moe_kernels.reference.scaled_grouped_gemm import (
    fp8_grouped_gemm as fp8_grouped_gemm_reference,
)
from moe_kernels.reference.scaled_grouped_gemm import (
    scaled_grouped_gemm as scaled_grouped_gemm_reference,
)

BLOCK = 128
FLOAT8 = torch.float8_e4m3fn


def _fake(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2], dtype=out_dtype)


def _fp8_fake(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    power_of_two: bool,
    save_float8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    R, Kd = a.shape
    return (
        a.new_empty(R, b.shape[2], dtype=out_dtype or a.dtype),
        a.new_empty(R, Kd, dtype=FLOAT8),
        a.new_empty(blocks_of(Kd, BLOCK), R, dtype=torch.float32).t(),
    )


_op = define(
    "scaled_grouped_gemm(Tensor a, Tensor b, Tensor scales_a, Tensor scales_b, Tensor offsets,"
    " Tensor? bias, ScalarType out_dtype) -> Tensor",
    reference=scaled_grouped_gemm_reference,
    fake=_fake,
)
_fp8_op = define(
    "fp8_grouped_gemm(Tensor a, Tensor b, Tensor offsets, Tensor? bias, ScalarType? out_dtype,"
    " bool power_of_two, bool save_float8) -> (Tensor, Tensor, Tensor)",
    reference=fp8_grouped_gemm_reference,
    fake=_fp8_fake,
)
refuse_backward(
    "float8 operands have no gradient, which double backward of fp8_grouped_gemm would need. Train "
    "with fp8_grouped_gemm, which takes them unquantised and passes their gradients straight "
    "through, by single backward; or call it under torch.no_grad().",
    "scaled_grouped_gemm",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, offsets, bias, _, ctx.power_of_two, save_float8 = inputs
    _, values, scales = output
    ctx.mark_non_differentiable(values, scales)
    ctx.set_materialize_grads(False)
    remember_inputs(ctx, inputs)
    ctx.dtype, ctx.bias_dtype = a.dtype, None if bias is None else bias.dtype
    rows: tuple[Tensor | None, ...] = (None, None, None)
    if ctx.needs_input_grad[1]:
        rows = (None, values, scales) if save_float8 else (a, None, None)
    ctx.save_for_backward(b, offsets, *rows)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    b, offsets, a, values, scales = ctx.saved_tensors
    owed = owed_gradients(ctx)
    grad = grad.to(ctx.dtype)
    ops = torch.ops.moe_kernels
    da = db = dbias = None
    if owed[0]:
        rows, row_scales = ops.quantize_rows(grad, FLOAT8, BLOCK, ctx.power_of_two)
        # contracted along N, in which order its values are stored; they are those of forward
        w, w_scales = ops.quantize_weights(b.mT, FLOAT8, BLOCK, ctx.power_of_two, True)
        da = ops.scaled_grouped_gemm(rows, w, row_scales, w_scales, offsets, None, ctx.dtype)
    if owed[1]:
        if a is None:
            a = ops.dequantize_rows(values, scales, ctx.dtype, BLOCK)
        db = ops.grouped_gemm_wgrad(a, grad, offsets, b.dtype, is_transposed(b))
    if owed[3]:
        dbias = ops.grouped_gemm_dbias(grad, offsets, ctx.bias_dtype)
    return da, db, None, dbias, None, None, None


register_autograd("fp8_grouped_gemm", _backward, _setup_context)


@register_flop_formula(
    [torch.ops.moe_kernels.scaled_grouped_gemm, torch.ops.moe_kernels.fp8_grouped_gemm]
)
def _flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """``2 * R * Kd * N``, whatever rows belong to no expert."""
    return int(2 * a[0] * a[1] * b[2])


def scaled_grouped_gemm(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply each group of float8 rows by its expert's float8 matrix.

    Products are summed over 128 of Kd, multiplied by the scales of both blocks and added in
    float32: tensor cores keep fewer bits of a float8 sum. Not differentiable: see
    :func:`fp8_grouped_gemm`.

    Args:
        a: [R, Kd] float8_e4m3fn, as of :func:`quantize_rows` or :func:`permute_quantize`.
        b: [E, Kd, N] float8_e4m3fn, as of :func:`quantize_weights`; any strides, best contiguous
            along Kd.
        scales_a: [R, ceil(Kd / 128)] float32, any strides, best contiguous along R.
        scales_b: [E, ceil(Kd / 128), ceil(N / 128)] float32, any strides.
        offsets: [E + 1] int32, non-decreasing from 0 to at most R.
        bias: [E, N], any float dtype.
        out_dtype: dtype of the result.

    Returns:
        [R, N]: the dequantised ``a[r] @ b[e] + bias[e]`` for rows ``offsets[e]:offsets[e + 1]``;
        rows from ``offsets[E]`` on are zero.

    Raises:
        ValueError: shapes or devices do not fit; on CPU also offsets that decrease or pass R (on
            CUDA with ``MOE_KERNELS_CHECK=1``).
        TypeError: dtypes are others.
        RuntimeError: in backward.
    """
    op = "scaled_grouped_gemm"
    check_operands(op, a, b, offsets, bias, out_dtype, FLOAT8_DTYPES)
    if bias is not None:
        check_dtype(op, "bias", bias, FLOAT_DTYPES)
    check_row_scales(op, "scales_a", scales_a, "a", a, BLOCK)
    expected = [b.shape[0], blocks_of(b.shape[1], BLOCK), blocks_of(b.shape[2], BLOCK)]
    layout = f"[E, ceil(Kd / 128), ceil(N / 128)] = {expected} for b {shape(b)}"
    check_tensor(op, "scales_b", scales_b, 3, layout)
    check_dtype(op, "scales_b", scales_b, (torch.float32,))
    check_device(op, "a", a, "scales_b", scales_b)
    if shape(scales_b) != expected:
        raise ValueError(f"{op}: scales_b must be {layout}; got {shape(scales_b)}")
    if out_dtype is None:
        raise TypeError(f"{op}: out_dtype must be a float dtype; got None")
    out: Tensor = call_op(_op, a, b, scales_a, scales_b, offsets, bias, out_dtype)
    return out


def fp8_grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    power_of_two: bool = False,
    save_float8: bool = True,
) -> Tensor:
    """:func:`grouped_gemm` with both operands rounded to float8 on the way.

    Forward is :func:`scaled_grouped_gemm` of ``quantize_rows(a)`` and ``quantize_weights(b)``.
    Gradients pass straight through the rounding of a and b. That of a is the product of the
    upstream gradient, its rows rounded to float8 as well, with the rounded b. That of b is a
    product in a's dtype, of the unrounded upstream gradient and the saved rows. The rounded b is
    not kept, but made again in backward: it is needed there in another order of storage.

    Args:
        a: [R, Kd], bf16, fp16, fp32 (fp64 on CPU).
        b: [E, Kd, N] of a's dtype, any strides.
        offsets: [E + 1] int32, non-decreasing from 0 to at most R.
        bias: [E, N] of a's dtype.
        out_dtype: dtype of the result, default a's.
        power_of_two: round scales up to a power of two.
        save_float8: keep the rounded a for the gradient of b, ``R * (Kd + 4 * ceil(Kd / 128))``
            bytes, which makes it that of the product as it was computed. False keeps a itself,
            twice that in bf16, and takes the rounding of a out of the gradient of b.

    Returns:
        [R, N]; rows from ``offsets[E]`` on are zero.

    Raises:
        ValueError: shapes or devices do not fit; on CPU also offsets that decrease or pass R (on
            CUDA with ``MOE_KERNELS_CHECK=1``).
        TypeError: dtypes differ.
    """
    op = "fp8_grouped_gemm"
    a, b, bias = autocast(a, b, bias)
    check_operands(op, a, b, offsets, bias, out_dtype)
    check_same(op, "a", a, "bias", bias)
    check_flag(op, "power_of_two", power_of_two)
    check_flag(op, "save_float8", save_float8)
    arguments = (a, b, offsets, bias, out_dtype, power_of_two, save_float8)
    out: Tensor = call_op(_fp8_op, *arguments)[0]
    return out
