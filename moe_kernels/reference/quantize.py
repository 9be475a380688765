"""float8 values with a float32 scale for each block: of a row, or of a matrix.

R rows, T tokens, E experts, Kd contracted size, N columns; blocks of ``block`` along Kd and N.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_kernels.reference._accumulate import accumulate_dtype
from moe_kernels.reference.permute import permute

SMALLEST_SCALE = 2.0**-126  # of the normal numbers, so that its reciprocal is one too


def block_scales(largest: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The scale of blocks from their largest magnitude: ``largest / 448`` for float8_e4m3fn.

    0 for a block of zeros; NaN for one that holds an infinity or a NaN, or passes float32.
    """
    scales = (largest / torch.finfo(dtype).max).to(torch.float32)
    finite = scales.isfinite()
    scales = scales.clamp_min(SMALLEST_SCALE)
    if power_of_two:  # the next one up
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        finite &= scales.isfinite()
    scales = torch.where(largest == 0, 0.0, scales)
    return torch.where(finite, scales, torch.nan)


def _reciprocal(scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = scales.to(dtype)
    return torch.where(wide == 0, 0.0, 1 / wide)


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = 128,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """``values [R, Kd]``, the nearest to ``x * (1 / scale)``, and ``scales [R, ceil(Kd / block)]``.

    The scales are stored by columns.
    """
    R, Kd = x.shape
    blocks = -(-Kd // block)
    wide = x.to(accumulate_dtype(x.dtype))
    cells = functional.pad(wide, (0, blocks * block - Kd)).view(R, blocks, block)
    found = block_scales(cells.abs().amax(2), dtype, power_of_two)
    cells = cells * _reciprocal(found, wide.dtype)[:, :, None]
    values = x.new_empty(R, Kd, dtype=dtype).copy_(cells.view(R, blocks * block)[:, :Kd])
    scales = x.new_empty(blocks, R, dtype=torch.float32).t().copy_(found)
    return values, scales


def dequantize_rows(
    values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, block: int = 128
) -> Tensor:
    """``[R, Kd]``: each value times the scale of its block."""
    wide = accumulate_dtype(dtype)
    each = scales.to(wide).repeat_interleave(block, 1)[:, : values.shape[1]]
    return (values.to(wide) * each).to(dtype)


def quantize_weights(
    w: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = 128,
    power_of_two: bool = False,
    transposed: bool = True,
) -> tuple[Tensor, Tensor]:
    """``values [E, Kd, N]`` and ``scales [E, ceil(Kd / block), ceil(N / block)]``.

    The values are stored as [E, N, Kd] if transposed, whatever w's strides.
    """
    E, Kd, N = w.shape
    rows, columns = -(-Kd // block), -(-N // block)
    wide = w.to(accumulate_dtype(w.dtype))
    padded = functional.pad(wide, (0, columns * block - N, 0, rows * block - Kd))
    cells = padded.reshape(E, rows, block, columns, block)
    found = block_scales(cells.abs().amax((2, 4)), dtype, power_of_two)
    scales = w.new_empty(E, rows, columns, dtype=torch.float32).copy_(found)
    cells = cells * _reciprocal(scales, wide.dtype)[:, :, None, :, None]
    values = w.new_empty((E, N, Kd) if transposed else (E, Kd, N), dtype=dtype)
    values = values.mT if transposed else values
    values.copy_(cells.view(E, rows * block, columns * block)[:, :Kd, :N])
    return values, scales


def dequantize_weights(
    values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, block: int = 128
) -> Tensor:
    """``[E, Kd, N]``: each value times the scale of its block."""
    wide = accumulate_dtype(dtype)
    each = scales.to(wide).repeat_interleave(block, 1).repeat_interleave(block, 2)
    return (values.to(wide) * each[:, : values.shape[1], : values.shape[2]]).to(dtype)


def permute_quantize(
    x: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    num_rows: int,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = 128,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(permute(x))``: zeros with scales of zero past ``offsets[E]``."""
    rows = permute(x, row_to_slot, slot_to_row, offsets, num_rows)
    return quantize_rows(rows, dtype, block, power_of_two)
