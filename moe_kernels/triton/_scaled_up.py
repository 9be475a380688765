"""The up-projection in float8 and its activation, which is rounded to float8 as well.

R rows, E experts, H hidden size, I intermediate size, W = 2 * I columns for gated activations, else
I. Rows are slots in the order of their experts.

A scale of the activation is that of 128 of its columns, so a tile that has them all rounds what it
has just summed: h is written for a backward alone, and read by no one before. Gate and up are two
products of 128 columns, one after the other: together their sums, and what tensor cores sum anew
every 128 of H, are more than the registers of a tile of 128 rows. The second finds its rows in L2.
Where warps have roles, a tile has both: ``_hopper_scaled_up.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._activation import Activation, activate, activate_gated
from moe_kernels.triton._configs import Config
from moe_kernels.triton._fp8 import encode
from moe_kernels.triton._launch import architecture, ceil_div, processors
from moe_kernels.triton._operands import (
    bias_operand,
    has_hopper_scaled,
    pipeline_stages,
    row_operand,
    weight_operand,
)
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, load_tile, tile_count, walk
from moe_kernels.triton.grouped_gemm import store_tile, zero_rows
from moe_kernels.triton.quantize import Scaled, block_scales, magnitude
from moe_kernels.triton.scaled_grouped_gemm import BLOCK, scaled_products


@triton.jit
def _block_of_h(
    x, w, scales_x, scales_w, bias, h, expert, first, row, valid, n, H, W,
    stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_sxm, stride_sxk,
    stride_swe, stride_swk, stride_swn, stride_bias_e, stride_bias_n,
    X_MODE: tl.constexpr, W_MODE: tl.constexpr, BIASED: tl.constexpr, SAVE_H: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """128 columns of h, rounded to its dtype, in float32; written as well with SAVE_H."""
    total = scaled_products(
        x, w, scales_x, scales_w, expert, first, row, valid, n, W, H,
        stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_sxm, stride_sxk,
        stride_swe, stride_swk, stride_swn,
        X_MODE, W_MODE, EVEN_K, False, BLOCK_M, BLOCK, BLOCK_K, STAGES,
    )  # fmt: skip
    rounded = store_tile(
        total, bias, h, expert, first, valid, n, W, stride_bias_e, stride_bias_n,
        BIASED, BLOCK_M, BLOCK, SAVE_H,
    )  # fmt: skip
    return rounded.to(tl.float32)


@triton.jit
def _store_values(
    value, reciprocal, values, first, valid, n, I,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = n + tl.arange(0, COLUMNS)
    tl.store(
        values + first.to(tl.int64) * I + (tl.arange(0, BLOCK_M)[:, None] * I + column[None, :]),
        encode(value * reciprocal[:, None], False),
        mask=valid[:, None] & (column < I)[None, :],
    )


@triton.jit(do_not_specialize=["bound", "rows", "h_rows", "E", "stride_sxk"])
def _scaled_up_kernel(
    x, w, scales_x, scales_w, bias, offsets, h, values, scales, tiles, bound, rows, h_rows,
    H, I, W, E, alpha, limit,
    stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_sxm, stride_sxk,
    stride_swe, stride_swk, stride_swn, stride_bias_e, stride_bias_n,
    X_MODE: tl.constexpr, W_MODE: tl.constexpr, BIASED: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    PRECISE: tl.constexpr, SAVE_H: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tile_count(tiles), tl.cdiv(I, BLOCK)
    for step in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        tile, block = walk(step, row_tiles, column_tiles, GROUP_M)
        expert, first, end = load_tile(tiles, bound, tile)
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        valid = row < end
        # the first columns of the products, of which the second may have none
        n, m = block * BLOCK, I + block * BLOCK
        if INTERLEAVED:
            n, m = 2 * block * BLOCK, (2 * block + 1) * BLOCK
        left = _block_of_h(
            x, w, scales_x, scales_w, bias, h, expert, first, row, valid, n, H, W,
            stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_sxm, stride_sxk,
            stride_swe, stride_swk, stride_swn, stride_bias_e, stride_bias_n,
            X_MODE, W_MODE, BIASED, SAVE_H, EVEN_K, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
        if GATED:
            right = _block_of_h(
                x, w, scales_x, scales_w, bias, h, expert, first, row, valid, m, H, W,
                stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_sxm, stride_sxk,
                stride_swe, stride_swk, stride_swn, stride_bias_e, stride_bias_n,
                X_MODE, W_MODE, BIASED, SAVE_H, EVEN_K, BLOCK_M, BLOCK_K, STAGES,
            )  # fmt: skip
        # rounded to h's dtype before it is to float8, as the activation alone would be
        n = block * BLOCK
        if INTERLEAVED:
            HALF: tl.constexpr = BLOCK // 2
            gate, up = tl.split(tl.reshape(left, (BLOCK_M, HALF, 2)))
            a = activate_gated(gate, up, alpha, limit, KIND, CLAMP, PRECISE)
            a = a.to(h.dtype.element_ty).to(tl.float32)
            gate, up = tl.split(tl.reshape(right, (BLOCK_M, HALF, 2)))
            b = activate_gated(gate, up, alpha, limit, KIND, CLAMP, PRECISE)
            b = b.to(h.dtype.element_ty).to(tl.float32)
            largest = tl.maximum(tl.max(magnitude(a), 1), tl.max(magnitude(b), 1))
            scale, reciprocal = block_scales(largest, False)
            _store_values(a, reciprocal, values, first, valid, n, I, BLOCK_M, HALF)
            _store_values(b, reciprocal, values, first, valid, n + HALF, I, BLOCK_M, HALF)
        else:
            if GATED:
                a = activate_gated(left, right, alpha, limit, KIND, CLAMP, PRECISE)
            else:
                a = activate(left, KIND, PRECISE)
            a = a.to(h.dtype.element_ty).to(tl.float32)
            scale, reciprocal = block_scales(tl.max(magnitude(a), 1), False)
            _store_values(a, reciprocal, values, first, valid, n, I, BLOCK_M, BLOCK)
        tl.store(scales + block.to(tl.int64) * rows + row, scale, mask=valid)
    if SAVE_H:
        zero_rows(h, offsets, h_rows, W, E, 0, W, 16, 256)


def activates_in_product(activation: Activation, h: Tensor, inner: int, cut: Config) -> bool:
    """Whether a tile has all that a scale of the activation needs, in two blocks of h.

    Activations of float32 take more registers than the sums leave, and where tensor cores add to
    registers alone, before sm_90 and from sm_120 on, the sums do.
    So do the addresses of columns that Triton does not know to be a multiple of 16, which are
    stored one at a time.
    """
    halves = activation.gated and not activation.interleaved
    whole = inner % (BLOCK.value if halves else 16) == 0
    fits = h.element_size() == 2 and 90 <= architecture(h.device) < 120
    return whole and fits and cut.block_n == BLOCK.value


def activates_in_roles(
    activation: Activation, x: Tensor, w: Tensor, h: Tensor, inner: int, cut: Config
) -> bool:
    """Whether ``_hopper_scaled_up.py`` is asked for, and computes this projection.

    Not with gelu, whose error function needs more registers than there are beside the sums.
    """
    if cut.warp_specialize != "gluon_activate" or not has_hopper_scaled(cut, w, x, h):
        return False
    halves = activation.gated and not activation.interleaved
    whole = inner > 0 and inner % (BLOCK.value if halves else 16) == 0
    blocks = 2 if activation.gated else 1  # of h, for one of the activation
    return whole and activation.kind != "gelu" and cut.block_n >= blocks * BLOCK.value


def project_up(
    x: Scaled,
    w: Scaled,
    bias: Tensor | None,
    offsets: Tensor,
    h: Tensor,
    a: Scaled,
    activation: Activation,
    tiles: TileMap,
    cut: Config,
) -> None:
    """``a`` of [R, I], and ``h [h_rows, W]`` unless it has no rows, for the rows of the map.

    Further rows of h are zero.
    """
    (E, H, W), (rows, inner) = w[0].shape, a[0].shape
    if inner == 0:
        return
    r = row_operand(x[0], None, cut.block_m, cut.block_k)
    b = weight_operand(w[0], cut.block_k, cut.block_n)
    steps = tiles.bound * ceil_div(inner, BLOCK.value)
    shift, strides = bias_operand(bias)
    launch(
        _scaled_up_kernel, (min(steps, processors(h.device) * cut.programs),),
        r.value, b.value, x[1], w[1], shift, offsets, h, a[0], a[1], tiles.tiles, tiles.bound,
        rows, h.shape[0], H, inner, W, E, activation.alpha, activation.limit,
        *r.strides, *b.strides, *x[1].stride(), *w[1].stride(), *strides,
        X_MODE=r.mode, W_MODE=b.mode, BIASED=bias is not None, **activation.constants(h),
        SAVE_H=h.shape[0] > 0, EVEN_K=H % cut.block_k == 0, BLOCK_M=cut.block_m,
        BLOCK_K=cut.block_k, GROUP_M=cut.group_m, STAGES=pipeline_stages(cut.stages, r, b),
        num_warps=cut.warps,
    )  # fmt: skip
