"""float8 values with a float32 scale for each block: of a row, or of a matrix.

T tokens, K experts a token, R rows, E experts, Kd contracted size, N columns; blocks of ``block``
along Kd and N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_flag,
    check_num_rows,
    check_tensor,
    describe,
    shape,
)
from moe_kernels.ops._library import call_op, define, refuse_backward
from moe_kernels.ops.grouped_gemm import empty_like_weight
from moe_kernels.ops.permute import check_order
from moe_kernels.ops.sort_by_expert import ExpertOrder
from moe_kernels.reference.quantize import (
    dequantize_rows as dequantize_rows_reference,
)
from moe_kernels.reference.quantize import (
    permute_quantize as permute_quantize_reference,
)
from moe_kernels.reference.quantize import (
    quantize_rows as quantize_rows_reference,
)
from moe_kernels.reference.quantize import (
    quantize_weights as quantize_weights_reference,
)

FLOAT8_DTYPES = (torch.float8_e4m3fn,)
BLOCKS = (32, 64, 128)


def blocks_of(size: Any, block: int) -> Any:
    return (size + block - 1) // block


def _rows_fake(x: Tensor, rows: Any, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor]:
    scales = x.new_empty(blocks_of(x.shape[1], block), rows, dtype=torch.float32).t()
    return x.new_empty(rows, x.shape[1], dtype=dtype), scales


def _quantize_rows_fake(
    x: Tensor, dtype: torch.dtype, block: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    return _rows_fake(x, x.shape[0], dtype, block)


def _permute_quantize_fake(
    x: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    num_rows: int,
    dtype: torch.dtype,
    block: int,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    return _rows_fake(x, num_rows, dtype, block)


def _quantize_weights_fake(
    w: Tensor, dtype: torch.dtype, block: int, power_of_two: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    E, Kd, N = w.shape
    scales = w.new_empty(E, blocks_of(Kd, block), blocks_of(N, block), dtype=torch.float32)
    return empty_like_weight(w, w.shape, dtype, transposed), scales


_rows_op = define(
    "quantize_rows(Tensor x, ScalarType dtype, int block, bool power_of_two) -> (Tensor, Tensor)",
    reference=quantize_rows_reference,
    fake=_quantize_rows_fake,
)
_permute_op = define(
    "permute_quantize(Tensor x, Tensor row_to_slot, Tensor slot_to_row, Tensor offsets,"
    " SymInt num_rows, ScalarType dtype, int block, bool power_of_two) -> (Tensor, Tensor)",
    reference=permute_quantize_reference,
    fake=_permute_quantize_fake,
)
_weights_op = define(
    "quantize_weights(Tensor w, ScalarType dtype, int block, bool power_of_two, bool transposed)"
    " -> (Tensor, Tensor)",
    reference=quantize_weights_reference,
    fake=_quantize_weights_fake,
)
_dequantize_op = define(
    "dequantize_rows(Tensor values, Tensor scales, ScalarType dtype, int block) -> Tensor",
    reference=dequantize_rows_reference,
    fake=lambda values, scales, dtype, block: values.new_empty(values.shape, dtype=dtype),
)
refuse_backward(
    "rounding to float8 has no gradient. Train with fp8_grouped_gemm, which takes the operands "
    "unquantised and passes their gradients straight through; or quantise under torch.no_grad().",
    "quantize_rows",
    "permute_quantize",
    "quantize_weights",
    "dequantize_rows",
)


def _check_quantize(
    op: str, name: str, value: Tensor, dtype: Any, block: Any, power_of_two: Any
) -> None:
    check_dtype(op, name, value, FLOAT_DTYPES)
    if dtype not in FLOAT8_DTYPES:
        raise TypeError(f"{op}: dtype must be torch.float8_e4m3fn; got {dtype}")
    check_block(op, block)
    check_flag(op, "power_of_two", power_of_two)


def check_block(op: str, block: Any) -> None:
    if type(block) is not int or block not in BLOCKS:
        raise ValueError(
            f"{op}: block must be one of {', '.join(map(str, BLOCKS))} (scaled_grouped_gemm "
            f"takes 128); got {block!r}"
        )


def quantize_rows(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = 128,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Round rows to float8, each block of a row with a scale of its own.

    The scale of a block is its largest magnitude over 448, the largest of float8_e4m3fn, but at
    least 2**-126; a value is ``x * (1 / scale)`` in float32, rounded to nearest, ties to even. A
    block of zeros has a scale of 0. A block that holds an infinity or a NaN has a scale of NaN and
    values of NaN: no finite scale stands for it, and products with it become NaN.

    Args:
        x: [R, Kd], any float dtype, any strides.
        dtype: float8_e4m3fn.
        block: 32, 64 or 128 elements of a row.
        power_of_two: round scales up to a power of two: dequantising is then exact, and values
            use up to a bit less of their range.

    Returns:
        values [R, Kd] and scales [R, ceil(Kd / block)] float32; ``x ~ values * scales``, the last
        block being what is left of a row. Scales are stored by columns, [ceil(Kd / block), R], in
        which order products read them.

    Raises:
        TypeError: x is not floating point, or dtype is another.
        ValueError: x is not a matrix, or block is another.
        RuntimeError: in backward; see :func:`fp8_grouped_gemm`.
    """
    check_tensor("quantize_rows", "x", x, 2, "[R, Kd]")
    _check_quantize("quantize_rows", "x", x, dtype, block, power_of_two)
    out: tuple[Tensor, Tensor] = call_op(_rows_op, x, dtype, block, power_of_two)
    return out


def permute_quantize(
    x: Tensor,
    order: ExpertOrder,
    *,
    num_rows: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = 128,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(permute(x, order))`` in one pass, bit for bit.

    Args:
        x: [T, H], any float dtype, any strides.
        order: from :func:`sort_by_expert`.
        num_rows: as of :func:`permute`.
        dtype, block, power_of_two: as of :func:`quantize_rows`.

    Returns:
        values [num_rows, H] and scales [num_rows, ceil(H / block)], of rows grouped by expert;
        both zero for rows of dropped slots, at the tail.

    Raises:
        as :func:`permute` and :func:`quantize_rows`.
    """
    op = "permute_quantize"
    check_tensor(op, "x", x, 2, "[T, H]")
    _check_quantize(op, "x", x, dtype, block, power_of_two)
    check_order(op, order, x)
    check_device(op, "x", x, "order", order.row_to_slot)
    rows = order.row_to_slot.shape[0] if num_rows is None else num_rows
    check_num_rows(op, rows)
    out: tuple[Tensor, Tensor] = call_op(_permute_op, x, *order, rows, dtype, block, power_of_two)
    return out


def quantize_weights(
    w: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = 128,
    power_of_two: bool = False,
    transposed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Round matrices to float8, each block of ``block`` x ``block`` with a scale of its own.

    Values and scales are as of :func:`quantize_rows`. Those of ``w.mT`` are the same, transposed.

    Args:
        w: [E, Kd, N], any float dtype, any strides.
        dtype: float8_e4m3fn.
        block: 32, 64 or 128 rows and columns.
        power_of_two: round scales up to a power of two.
        transposed: store the values as [E, N, Kd], contiguous along Kd: Hopper's tensor cores
            contract float8 in that order alone, others cost a detour. Else as [E, Kd, N].

    Returns:
        values [E, Kd, N] and scales [E, ceil(Kd / block), ceil(N / block)] float32.

    Raises:
        as :func:`quantize_rows`.
    """
    check_tensor("quantize_weights", "w", w, 3, "[E, Kd, N]")
    _check_quantize("quantize_weights", "w", w, dtype, block, power_of_two)
    check_flag("quantize_weights", "transposed", transposed)
    out: tuple[Tensor, Tensor] = call_op(_weights_op, w, dtype, block, power_of_two, transposed)
    return out


def check_row_scales(
    op: str, name: str, scales: Tensor, of: str, values: Tensor, block: int
) -> None:
    """Raise unless ``scales`` are those of the rows of ``values [R, Kd]``."""
    expected = [values.shape[0], blocks_of(values.shape[1], block)]
    layout = f"[R, ceil(Kd / {block})] = {expected} for {of} {shape(values)}"
    check_tensor(op, name, scales, 2, layout)
    check_dtype(op, name, scales, (torch.float32,))
    check_device(op, of, values, name, scales)
    if shape(scales) != expected:
        raise ValueError(f"{op}: {name} must be {layout}; got {shape(scales)}")


def check_weight_scales(op: str, scales: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Raise unless ``scales`` are those of the float8 matrices ``gate_up`` and ``down``."""
    if not isinstance(scales, tuple | list) or len(scales) != 2:
        raise TypeError(
            f"{op}: weight_scales must be a pair, for gate_up and down; got {describe(scales)}"
        )
    for name, weight, its in (("gate_up", gate_up, scales[0]), ("down", down, scales[1])):
        check_dtype(op, f"{name}, with weight_scales,", weight, FLOAT8_DTYPES)
        check_device(op, "x", x, name, weight)
        if weight.requires_grad:
            raise ValueError(
                f"{op}: {name}, with weight_scales, has no gradient; detach it, or train with "
                "weights that are not quantised"
            )
        expected = [weight.shape[0], *(blocks_of(size, 128) for size in weight.shape[1:])]
        part = f"weight_scales: that of {name}"
        check_tensor(op, part, its, 3, f"{expected}")
        check_dtype(op, part, its, (torch.float32,))
        check_device(op, "x", x, part, its)
        if shape(its) != expected:
            raise ValueError(
                f"{op}: {part} must be {expected} for {name} {shape(weight)}; got {shape(its)}"
            )
        if its.requires_grad:
            raise ValueError(f"{op}: {part} must not require a gradient; it has none")


def dequantize_rows(
    values: Tensor,
    scales: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    block: int = 128,
) -> Tensor:
    """The rows that :func:`quantize_rows` stands for.

    Args:
        values: [R, Kd] float8_e4m3fn, any strides.
        scales: [R, ceil(Kd / block)] float32, any strides.
        dtype: of the result, any float dtype.
        block: elements of a row with one scale.

    Returns:
        [R, Kd]: values times scales in float32, rounded once.

    Raises:
        TypeError: dtypes are others.
        ValueError: shapes or devices do not fit.
    """
    op = "dequantize_rows"
    check_tensor(op, "values", values, 2, "[R, Kd]")
    check_dtype(op, "values", values, FLOAT8_DTYPES)
    check_block(op, block)
    check_row_scales(op, "scales", scales, "values", values, block)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype must be a float dtype; got {dtype}")
    out: Tensor = call_op(_dequantize_op, values, scales, dtype, block)
    return out
