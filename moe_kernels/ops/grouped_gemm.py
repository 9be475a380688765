"""Products of row groups with their expert's matrix, and the gradients of that product.

R rows, E experts, Kd contracted size, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kernels.ops._autocast import autocast
from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_accumulator,
    check_device,
    check_dtype,
    check_same,
    check_tensor,
    shape,
)
from moe_kernels.ops._library import (
    call_op,
    define,
    owed_gradients,
    refuse_double_backward,
    register_autograd,
    remember_inputs,
)
from moe_kernels.reference.grouped_gemm import (
    grouped_gemm as grouped_gemm_reference,
)
from moe_kernels.reference.grouped_gemm import (
    grouped_gemm_dbias as grouped_gemm_dbias_reference,
)
from moe_kernels.reference.grouped_gemm import (
    grouped_gemm_wgrad as grouped_gemm_wgrad_reference,
)
from moe_kernels.reference.grouped_gemm import (
    grouped_gemm_wgrad_ as grouped_gemm_wgrad_reference_,
)
from moe_kernels.reference.grouped_gemm import is_transposed


def empty_like_weight(
    like: Tensor, shape: Sequence[Any], dtype: torch.dtype, transposed: bool
) -> Tensor:
    """An empty [E, M, N] = ``shape``, stored with the last two swapped if ``transposed``."""
    if transposed:
        return like.new_empty((shape[0], shape[2], shape[1]), dtype=dtype).mT
    return like.new_empty(tuple(shape), dtype=dtype)


def _fake(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2], dtype=out_dtype or a.dtype)


def _wgrad_fake(
    a: Tensor, grad: Tensor, offsets: Tensor, out_dtype: torch.dtype, transposed: bool
) -> Tensor:
    shape = (offsets.shape[0] - 1, a.shape[1], grad.shape[1])
    return empty_like_weight(a, shape, out_dtype, transposed)


def _dbias_fake(grad: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1], dtype=out_dtype)


_op = define(
    "grouped_gemm(Tensor a, Tensor b, Tensor offsets, Tensor? bias, ScalarType? out_dtype)"
    " -> Tensor",
    reference=grouped_gemm_reference,
    fake=_fake,
)
_wgrad_op = define(
    "grouped_gemm_wgrad(Tensor a, Tensor grad, Tensor offsets, ScalarType out_dtype,"
    " bool transposed) -> Tensor",
    reference=grouped_gemm_wgrad_reference,
    fake=_wgrad_fake,
)
_wgrad_into_op = define(
    "grouped_gemm_wgrad_(Tensor(a!) out, Tensor a, Tensor grad, Tensor offsets) -> ()",
    reference=grouped_gemm_wgrad_reference_,
    fake=lambda out, a, grad, offsets: None,
)
_dbias_op = define(
    "grouped_gemm_dbias(Tensor grad, Tensor offsets, ScalarType out_dtype) -> Tensor",
    reference=grouped_gemm_dbias_reference,
    fake=_dbias_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offsets, bias, _ = inputs
    remember_inputs(ctx, inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(a, b, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets = ctx.saved_tensors
    owed = owed_gradients(ctx)
    grad = grad.to(a.dtype)
    # the dispatcher's ops rather than the overloads above, which autograd does not see
    ops = torch.ops.moe_kernels
    da = ops.grouped_gemm(grad, b.mT, offsets, None, None) if owed[0] else None
    db = ops.grouped_gemm_wgrad(a, grad, offsets, b.dtype, is_transposed(b)) if owed[1] else None
    dbias = ops.grouped_gemm_dbias(grad, offsets, ctx.bias_dtype) if owed[3] else None
    return da, db, None, dbias, None


register_autograd("grouped_gemm", _backward, _setup_context)
refuse_double_backward("grouped_gemm_wgrad", "grouped_gemm_dbias")


@register_flop_formula(torch.ops.moe_kernels.grouped_gemm)
def _flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """``2 * R * Kd * N``, whatever rows belong to no expert."""
    return int(2 * a[0] * a[1] * b[2])


@register_flop_formula(torch.ops.moe_kernels.grouped_gemm_wgrad)
def _wgrad_flops(a: Any, grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * grad[1])


@register_flop_formula(torch.ops.moe_kernels.grouped_gemm_wgrad_)
def _wgrad_into_flops(
    out: Any, a: Any, grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(2 * a[0] * a[1] * grad[1])


def check_offsets(op: str, offsets: Tensor, first_name: str, first: Tensor) -> None:
    check_tensor(op, "offsets", offsets, 1, "[E + 1]")
    check_dtype(op, "offsets", offsets, (torch.int32,))
    check_device(op, first_name, first, "offsets", offsets)
    if offsets.shape[0] == 0:
        raise ValueError(f"{op}: offsets must be [E + 1], at least one entry; got [0]")


def check_operands(
    op: str,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> None:
    """Raise unless these are a product's, a and b being of one of ``dtypes``; bias of any."""
    check_tensor(op, "a", a, 2, "[R, Kd]")
    check_dtype(op, "a", a, dtypes)
    check_offsets(op, offsets, "a", a)
    experts, inner = offsets.shape[0] - 1, a.shape[1]
    layout = f"[E, Kd, N] with E = {experts} (offsets), Kd = {inner} (a.shape[1])"
    check_tensor(op, "b", b, 3, layout)
    if b.shape[0] != experts or b.shape[1] != inner:
        raise ValueError(f"{op}: b must be {layout}; got {shape(b)}")
    check_dtype(op, "b", b, dtypes)
    check_same(op, "a", a, "b", b)
    if bias is not None:
        check_tensor(op, "bias", bias, 2, "[E, N]")
        check_device(op, "a", a, "bias", bias)
        if bias.shape[0] != experts or bias.shape[1] != b.shape[2]:
            raise ValueError(
                f"{op}: bias must be [E, N] = {[experts, b.shape[2]]}; got {shape(bias)}"
            )
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be a float dtype; got {out_dtype}")


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply each group of rows by its expert's matrix.

    Differentiable in a, b and bias. The gradient to b is stored as b is,
    [E, Kd, N] or [E, N, Kd].

    Args:
        a: [R, Kd], bf16, fp16, fp32 (fp64 on CPU).
        b: [E, Kd, N] of a's dtype, any strides: ``w.mT`` costs nothing.
        offsets: [E + 1] int32, non-decreasing from 0 to at most R.
        bias: [E, N] of a's dtype.
        out_dtype: dtype of the result, default a's. Products are summed in float32.

    Returns:
        [R, N]: ``a[r] @ b[e] + bias[e]`` for rows ``offsets[e]:offsets[e + 1]``; rows from
        ``offsets[E]`` on are zero.

    Raises:
        ValueError: shapes or devices do not fit; on CPU also offsets that decrease or pass R (on
            CUDA with ``MOE_KERNELS_CHECK=1``).
        TypeError: dtypes differ.
    """
    op = "grouped_gemm"
    a, b, bias = autocast(a, b, bias)
    check_operands(op, a, b, offsets, bias, out_dtype)
    check_same(op, "a", a, "bias", bias)
    out: Tensor = call_op(_op, a, b, offsets, bias, out_dtype)
    return out


def grouped_gemm_wgrad(
    a: Tensor,
    grad: Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Weight gradient of :func:`grouped_gemm`, or its accumulation into a main-grad buffer.

    Args:
        a: [R, Kd], the rows multiplied.
        grad: [R, N] of a's dtype, the gradient of the product.
        offsets: [E + 1] int32.
        out: [E, Kd, N] float32 (or float64), any strides: the products are added to it in place.
        out_dtype: dtype of a new result, default a's. Not together with ``out``.

    Returns:
        ``out``, or a new [E, Kd, N]: ``a[rows of e].T @ grad[rows of e]``, zero for empty experts.

    Raises:
        ValueError: shapes or devices do not fit, both out and out_dtype are given, or out is
            expanded or, where gradients are on, requires one.
        TypeError: dtypes differ, or out is not float32 or float64.
    """
    op = "grouped_gemm_wgrad"
    check_tensor(op, "a", a, 2, "[R, Kd]")
    check_dtype(op, "a", a, FLOAT_DTYPES)
    check_tensor(op, "grad", grad, 2, "[R, N]")
    check_same(op, "a", a, "grad", grad)
    check_offsets(op, offsets, "a", a)
    if grad.shape[0] != a.shape[0]:
        raise ValueError(
            f"{op}: grad must be [R, N] with R = {a.shape[0]} (a.shape[0]); got {shape(grad)}"
        )
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be a float dtype; got {out_dtype}")
    if out is None:
        result: Tensor = call_op(_wgrad_op, a, grad, offsets, out_dtype or a.dtype, False)
        return result
    if out_dtype is not None:
        raise ValueError(f"{op}: give out or out_dtype, not both; got {out_dtype}")
    expected = [offsets.shape[0] - 1, a.shape[1], grad.shape[1]]
    check_tensor(op, "out", out, 3, "[E, Kd, N]")
    check_dtype(op, "out", out, (torch.float32, torch.float64))
    check_device(op, "a", a, "out", out)
    if shape(out) != expected:
        raise ValueError(f"{op}: out must be [E, Kd, N] = {expected}; got {shape(out)}")
    check_accumulator(op, "out", out)
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: out must not require a gradient: adding to it has none")
    _wgrad_into_op(out, a, grad, offsets)
    return out
