"""float8 values with a float32 scale for each block: of a row, or of a matrix.

T tokens, K experts a token, R rows, E experts, Kd contracted size, N columns; blocks of ``block``
along Kd and N.

The largest magnitude of a block is found among its bits, as integers: exact in any order, and an
infinity or a NaN is larger than all else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._fp8 import LARGEST, decode, encode, has_float8, raw
from moe_kernels.triton._launch import (
    ceil_div,
    next_power_of_2,
    on_device_of,
    refuse_float64,
)
from moe_kernels.triton._math import divide
from moe_kernels.triton._replay import launch
from moe_kernels.triton._wgrad import empty_like_weight
from moe_kernels.triton.permute import (
    UNROLLED,
    load_rows_of,
    rows_of_experts,
    tail_of,
    token_programs,
)
from moe_kernels.triton.unpermute import SPREAD

TILE = 4096  # elements a program quantises
WIDEST = 512  # columns of tokens that it writes to their rows
INFINITY = tl.constexpr(0x7F800000)
SMALLEST_SCALE = tl.constexpr(0x00800000)  # 2**-126
MAXIMUM = tl.constexpr(LARGEST)

Scaled = tuple[Tensor, Tensor]  # float8 values and their scales


@triton.jit
def magnitude(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def block_scales(largest, POWER_OF_TWO: tl.constexpr, EXACT: tl.constexpr = True):
    """The scales of blocks from the bits of their largest magnitudes, and the reciprocals.

    Without EXACT to within a few units in the last place, of quotients that take no call.
    """
    zero = (largest * 0).to(tl.float32)  # in largest's layout, where it has one
    limit = zero + MAXIMUM
    magnitudes = largest.to(tl.float32, bitcast=True)
    quotient = divide(magnitudes, limit) if EXACT else magnitudes / limit
    bits = quotient.to(tl.int32, bitcast=True)
    if POWER_OF_TWO:  # the next one up
        bits = (bits + 0x7FFFFF) & INFINITY
    bits = tl.maximum(bits, SMALLEST_SCALE)
    bits = tl.where(largest < INFINITY, bits, 0x7FC00000)
    scale = bits.to(tl.float32, bitcast=True)
    reciprocal = divide(zero + 1.0, scale) if EXACT else 1.0 / scale
    return tl.where(largest == 0, 0.0, scale), tl.where(largest == 0, 0.0, reciprocal)


@triton.jit(do_not_specialize=["rows"])
def _quantize_rows_kernel(
    x, values, scales, rows, Kd, stride_r, stride_k,
    POWER_OF_TWO: tl.constexpr, BYTES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(1)
    column = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < Kd)[None, :]
    tile = tl.load(
        x + row[:, None] * stride_r + column[None, :].to(tl.int64) * stride_k,
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    scale, reciprocal = block_scales(tl.max(magnitude(tile), 1), POWER_OF_TWO)
    cell = values + row[:, None] * Kd + column[None, :]
    tl.store(cell, encode(tile * reciprocal[:, None], BYTES), mask=inside)
    tl.store(scales + block.to(tl.int64) * rows + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["num_rows", "T", "E", "top_k"])
def _permute_quantize_kernel(
    x, slot_to_row, offsets, values, scales, num_rows, T, Kd, E, top_k, stride_t, stride_k,
    POWER_OF_TWO: tl.constexpr, BYTES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program reads its tokens once, rounds them once, and writes them to all their rows."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.program_id(1) * BLOCKS * BLOCK + tl.arange(0, BLOCKS * BLOCK)
    used = rows_of_experts(offsets, E, num_rows)
    inside, exists = (column < Kd)[None, :], (block * BLOCK < Kd)[None, :]
    tile = tl.load(
        x + token[:, None] * stride_t + column[None, :].to(tl.int64) * stride_k,
        mask=(token < T)[:, None] & inside,
        other=0.0,
    ).to(tl.float32)
    tile = tl.reshape(tile, (BLOCK_T, BLOCKS, BLOCK))
    scale, reciprocal = block_scales(tl.max(magnitude(tile), 2), POWER_OF_TWO)
    codes = encode(tile * reciprocal[:, :, None], BYTES)
    codes = tl.reshape(codes, (BLOCK_T, BLOCKS * BLOCK))
    of_block = scales + block.to(tl.int64)[None, :] * num_rows
    for k in range(0, top_k, UNROLLED):
        for i in tl.static_range(UNROLLED):
            row, valid = load_rows_of(slot_to_row, token, k + i, used, T, top_k)
            cell = values + row[:, None] * Kd + column[None, :]
            tl.store(cell, codes, mask=valid[:, None] & inside)
            tl.store(of_block + row[:, None], scale, mask=valid[:, None] & exists)
    # rows of no slot
    none = encode(tl.zeros((BLOCK_T, BLOCKS * BLOCK), tl.float32), BYTES)
    first, turns, step = tail_of(used, num_rows, BLOCK_T)
    for turn in range(turns):
        row = first + tl.cast(turn, tl.int64) * step + tl.arange(0, BLOCK_T)
        past = (row < num_rows)[:, None]
        tl.store(values + row[:, None] * Kd + column[None, :], none, mask=past & inside)
        zeros = tl.zeros((BLOCK_T, BLOCKS), tl.float32)
        tl.store(of_block + row[:, None], zeros, mask=past & exists)


@triton.jit
def _quantize_weights_kernel(
    w, values, scales, Kd, N, stride_e, stride_k, stride_n, stride_vk, stride_vn,
    POWER_OF_TWO: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks_k, blocks_n = tl.cdiv(Kd, BLOCK), tl.cdiv(N, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    expert = program // (blocks_k * blocks_n)
    row = program // blocks_n % blocks_k * BLOCK + tl.arange(0, BLOCK)
    column = program % blocks_n * BLOCK + tl.arange(0, BLOCK)
    inside = (row < Kd)[:, None] & (column < N)[None, :]
    tile = tl.load(
        w + expert * stride_e + row[:, None] * stride_k + column[None, :] * stride_n,
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    largest = tl.max(tl.max(magnitude(tile), 1), 0, keep_dims=True)
    scale, reciprocal = block_scales(largest, POWER_OF_TWO)
    cell = values + expert * Kd * N + row[:, None] * stride_vk + column[None, :] * stride_vn
    tl.store(cell, encode(tile * reciprocal[:, None], BYTES), mask=inside)
    tl.store(scales + program + tl.arange(0, 1), scale)


@triton.jit(do_not_specialize=["R", "stride_sk"])
def _dequantize_rows_kernel(
    values, scales, out, R, Kd, stride_r, stride_k, stride_sr, stride_sk,
    BYTES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(1).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < R)[:, None] & (column < Kd)[None, :]
    tile = tl.load(values + row[:, None] * stride_r + column[None, :] * stride_k, mask=inside)
    scale = tl.load(scales + row * stride_sr + block * stride_sk, mask=row < R, other=0.0)
    wide = decode(tile, BYTES) * scale[:, None]
    cell = out + row[:, None] * Kd + column[None, :]
    tl.store(cell, wide.to(out.dtype.element_ty), mask=inside)


def _empty_rows(x: Tensor, rows: int, dtype: torch.dtype, block: int) -> Scaled:
    Kd = x.shape[1]
    values = x.new_empty(rows, Kd, dtype=dtype)
    return values, x.new_empty(ceil_div(Kd, block), rows, dtype=torch.float32).t()


def quantize_rows(
    x: Tensor, dtype: torch.dtype, block: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    refuse_float64("quantize_rows", "x", x)
    (rows, Kd), block_r = x.shape, TILE // block
    values, scales = _empty_rows(x, rows, dtype, block)
    if values.numel():
        with on_device_of(x):
            launch(
                _quantize_rows_kernel, (ceil_div(rows, block_r), scales.shape[1]),
                x, raw(values), scales, rows, Kd, *x.stride(),
                POWER_OF_TWO=power_of_two, BYTES=not has_float8(x.device),
                BLOCK_R=block_r, BLOCK_K=block,
            )  # fmt: skip
    return values, scales


def permute_quantize(
    x: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    num_rows: int,
    dtype: torch.dtype,
    block: int,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    refuse_float64("permute_quantize", "x", x)
    values, scales = _empty_rows(x, num_rows, dtype, block)
    if values.numel() and row_to_slot.numel() == 0:
        return raw(values).zero_().view(dtype), scales.zero_()
    if values.numel():
        (T, K), Kd = slot_to_row.shape, x.shape[1]
        blocks = max(min(next_power_of_2(Kd), WIDEST) // block, 1)
        # a few tokens are rounded by as many programs as there can be
        block_t = min(TILE // (blocks * block), max(1, next_power_of_2(T) // SPREAD))
        with on_device_of(x):
            launch(
                _permute_quantize_kernel,
                (token_programs(T, block_t, num_rows), ceil_div(Kd, blocks * block)),
                x, slot_to_row, offsets, raw(values), scales, num_rows, T, Kd,
                offsets.numel() - 1, K, *x.stride(),
                POWER_OF_TWO=power_of_two, BYTES=not has_float8(x.device),
                BLOCK_T=block_t, BLOCKS=blocks, BLOCK=block,
            )  # fmt: skip
    return values, scales


def quantize_weights(
    w: Tensor, dtype: torch.dtype, block: int, power_of_two: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    refuse_float64("quantize_weights", "w", w)
    E, Kd, N = w.shape
    values = empty_like_weight(w, E, Kd, N, dtype, transposed=transposed)
    scales = w.new_empty(E, ceil_div(Kd, block), ceil_div(N, block), dtype=torch.float32)
    if values.numel():
        with on_device_of(w):
            launch(
                _quantize_weights_kernel, (scales.numel(),),
                w, raw(values), scales, Kd, N, *w.stride(), *values.stride()[1:],
                POWER_OF_TWO=power_of_two, BYTES=not has_float8(w.device), BLOCK=block,
                num_warps=8 if block == 128 else 4,
            )  # fmt: skip
    return values, scales


def dequantize_rows(values: Tensor, scales: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    out = values.new_empty(values.shape, dtype=dtype)
    R, Kd = values.shape
    if out.numel():
        with on_device_of(values):
            launch(
                _dequantize_rows_kernel, (ceil_div(R, TILE // block), ceil_div(Kd, block)),
                raw(values), scales, out, R, Kd, *values.stride(), *scales.stride(),
                BYTES=not has_float8(values.device), BLOCK=block, BLOCK_R=TILE // block,
            )  # fmt: skip
    return out
