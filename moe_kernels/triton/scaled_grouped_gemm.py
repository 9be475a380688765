"""Products of float8 row groups with their expert's float8 matrix, both scaled by blocks.

R rows, E experts, Kd contracted size, N columns; blocks of 128 along Kd and N.

Every 128 of Kd, tensor cores sum anew: they keep fewer bits than float32, and scales change there.
Each of these sums is multiplied by its scales and added in float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._config_tables import SCALED
from moe_kernels.triton._configs import Config, config
from moe_kernels.triton._fp8 import has_float8, multipliable, raw
from moe_kernels.triton._launch import (
    ceil_div,
    checks_values,
    on_device_of,
    processors,
    refuse_float64,
)
from moe_kernels.triton._operands import (
    bias_operand,
    has_hopper_scaled,
    is_aligned,
    load_rows,
    load_weight,
    pipeline_stages,
    row_operand,
    weight_is_aligned,
    weight_operand,
)
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, build_tile_map, load_tile, tile_count, walk
from moe_kernels.triton.grouped_gemm import check_offsets, store_tile, zero_tail
from moe_kernels.triton.quantize import Scaled, quantize_rows, quantize_weights

BLOCK = tl.constexpr(SCALED)
DEEPEST = 5  # stages of tiles of 128 rows and columns that fit beside what a result goes through


@triton.jit
def scaled_products(
    a, b, scales_a, scales_b, expert, first, row, valid, n, N, Kd,
    stride_am, stride_ak, stride_be, stride_bk, stride_bn, stride_sam, stride_sak,
    stride_sbe, stride_sbk, stride_sbn,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, EVEN_K: tl.constexpr, BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of rows of an expert times the columns from ``n`` on, which share a scale."""
    # what is multiplied at once has one scale a row, and one for all columns
    tl.static_assert(BLOCK % BLOCK_N == 0)
    tl.static_assert(BLOCK % BLOCK_K == 0)
    row_scale = scales_a + row * stride_sam
    # past the last column, the last scale: a mask for it would cost a register in the loop
    scaled = tl.minimum(n, N - 1) // BLOCK
    column_scale = scales_b + expert.to(tl.int64) * stride_sbe + scaled * stride_sbn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # scales are loaded a block ahead, while the tensor cores are busy
    next_row_scale = tl.load(row_scale, mask=valid & (Kd > 0), other=0.0)
    next_column_scale = tl.load(column_scale, mask=Kd > 0, other=0.0)
    for k in tl.range(0, Kd, BLOCK_K, num_stages=STAGES):
        scale = next_row_scale * next_column_scale
        block, more = tl.cast((k + BLOCK_K) // BLOCK, tl.int64), k + BLOCK_K < Kd
        next_row_scale = tl.load(row_scale + block * stride_sak, mask=valid & more, other=0.0)
        next_column_scale = tl.load(column_scale + block * stride_sbk, mask=more, other=0.0)
        x = load_rows(a, first, row, valid, k, Kd, stride_am, stride_ak, A_MODE, EVEN_K, BLOCK_K)
        w = load_weight(
            b, expert, k, n, Kd, N, stride_be, stride_bk, stride_bn,
            B_MODE, False, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        total += tl.dot(multipliable(x, BYTES), multipliable(w, BYTES)) * scale[:, None]
    return total


# scales of rows are stored by columns, which are as far apart as there are rows
@triton.jit(do_not_specialize=["bound", "stride_sak"])
def _scaled_grouped_gemm_kernel(
    a, b, scales_a, scales_b, bias, out, tiles, bound, N, Kd,
    stride_am, stride_ak, stride_be, stride_bk, stride_bn, stride_sam, stride_sak,
    stride_sbe, stride_sbk, stride_sbn, stride_bias_e, stride_bias_n,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, BIASED: tl.constexpr, EVEN_K: tl.constexpr,
    BYTES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tile_count(tiles), tl.cdiv(N, BLOCK_N)
    for step in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, column_tile = walk(step, row_tiles, column_tiles, GROUP_M)
        expert, first, end = load_tile(tiles, bound, tile)
        n = column_tile * BLOCK_N
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        valid = row < end
        total = scaled_products(
            a, b, scales_a, scales_b, expert, first, row, valid, n, N, Kd,
            stride_am, stride_ak, stride_be, stride_bk, stride_bn, stride_sam, stride_sak,
            stride_sbe, stride_sbk, stride_sbn,
            A_MODE, B_MODE, EVEN_K, BYTES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        store_tile(
            total, bias, out, expert, first, valid, n, N, stride_bias_e, stride_bias_n,
            BIASED, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def scaled_config(b: Tensor, rows: int, *, aligned: bool) -> Config:
    """The configuration for products of ``rows`` rows, if they and the results are aligned."""
    aligned, inner = aligned and weight_is_aligned(b), min(b.shape[1:])
    return config("scaled_grouped_gemm", b, rows, b.shape[0], aligned=aligned, inner=inner)


def without_roles(cut: Config) -> Config:
    """The tile of kernels whose warps are all alike: no more columns than share a scale."""
    if cut.warp_specialize == "no":
        return cut
    stages = min(cut.stages, DEEPEST)
    return replace(cut, block_n=BLOCK.value, stages=stages, warp_specialize="no")


def multiply_scaled_rows(
    a: Scaled, b: Scaled, bias: Tensor | None, out: Tensor, tiles: TileMap, cut: Config
) -> None:
    """Write ``out[r] = a[r] @ b[e] + bias[e]``, contiguous, for the rows of the map."""
    (rows, scales_a), (weights, scales_b) = a, b
    if has_hopper_scaled(cut, weights, rows, out):
        from moe_kernels.triton import _hopper_scaled  # not every Triton has Gluon

        _hopper_scaled.multiply_scaled_rows(a, b, bias, out, tiles, cut)
        return
    cut, (Kd, N) = without_roles(cut), weights.shape[1:]
    x = row_operand(raw(rows), None, cut.block_m, cut.block_k)
    w = weight_operand(raw(weights), cut.block_k, cut.block_n)
    steps = tiles.bound * ceil_div(N, cut.block_n)
    shift, strides = bias_operand(bias)
    launch(
        _scaled_grouped_gemm_kernel, (min(steps, processors(rows.device) * cut.programs),),
        x.value, w.value, scales_a, scales_b, shift, out, tiles.tiles, tiles.bound, N, Kd,
        *x.strides, *w.strides, *scales_a.stride(), *scales_b.stride(), *strides,
        A_MODE=x.mode, B_MODE=w.mode, BIASED=bias is not None, EVEN_K=Kd % cut.block_k == 0,
        BYTES=not has_float8(rows.device), BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
        BLOCK_K=cut.block_k, GROUP_M=cut.group_m, STAGES=pipeline_stages(cut.stages, x, w),
        num_warps=cut.warps,
    )  # fmt: skip


def scaled_grouped_gemm(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if out_dtype == torch.float64:
        raise TypeError(
            "scaled_grouped_gemm: out_dtype must be bfloat16, float16 or float32 on CUDA; got "
            "float64. Convert the result, or set MOE_KERNELS_BACKEND=reference."
        )
    R, (E, _, N) = a.shape[0], b.shape
    if checks_values():
        check_offsets(offsets, R)
    offsets = offsets.contiguous()
    out = a.new_empty(R, N, dtype=out_dtype)
    if out.numel() == 0:
        return out
    if E == 0:
        return out.zero_()
    cut = scaled_config(b, R, aligned=is_aligned(a, out))
    with on_device_of(a):
        tiles = build_tile_map(offsets, R, cut.block_m)
        multiply_scaled_rows((a, scales_a), (b, scales_b), bias, out, tiles, cut)
        zero_tail(out, offsets)
    return out


def fp8_grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    power_of_two: bool,
    save_float8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_float64("fp8_grouped_gemm", "a", a)
    dtype = torch.float8_e4m3fn
    values, scales = quantize_rows(a, dtype, BLOCK.value, power_of_two)
    w, w_scales = quantize_weights(b, dtype, BLOCK.value, power_of_two, True)
    out = scaled_grouped_gemm(values, w, scales, w_scales, offsets, bias, out_dtype or a.dtype)
    return out, values, scales
