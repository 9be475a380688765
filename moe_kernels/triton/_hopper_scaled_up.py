"""The up-projection in float8 and its activation where warps have roles, for sm_90, in Gluon.

R rows, E experts, H contracted size, I columns of the activation, W = 2 * I of the product, or I;
blocks of 128 along H, I and W share a scale.

The product is that of ``_hopper_scaled.py``, of tiles of 128 rows: a group's half of one has the
sums of two blocks of h. If gate and up are halves of the columns these are a block of each, which
come as two copies; else they are neighbours. Either way a scale of the activation is of them alone,
so it is rounded to float8 where it was summed, and h is written for a backward alone. Without a
gate each block of h is one of the activation.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon

from moe_kernels.triton._activation import Activation, activate, activate_gated
from moe_kernels.triton._config_tables import SCALED, Config
from moe_kernels.triton._fp8 import encode
from moe_kernels.triton._hopper_gemm import (
    GROUPS,
    LOADING,
    MULTIPLYING,
    _load,
    _make_barriers,
    _tile_of,
    describe,
    describe_weight,
)
from moe_kernels.triton._hopper_scaled import _add_bias, _scales_of, _sum_tile
from moe_kernels.triton._launch import ceil_div, processors
from moe_kernels.triton._operands import bias_operand
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, tile_count, walk
from moe_kernels.triton.quantize import Scaled, block_scales, magnitude


@gluon.jit
def _store_columns(tile, out, row, end, column, N, LAYOUT: gl.constexpr, COLUMNS: gl.constexpr):
    """Columns of a group's rows, of which N columns are."""
    # of nothing that is the same for all tiles, which would take registers from the next one's sums
    j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    cell = out + (row.to(gl.int64) * N)[:, None] + j[None, :]
    gl.store(cell, tile, mask=(row < end)[:, None] & (j < N)[None, :])


@gluon.jit
def _rounded(
    total, bias, h, expert, row, end, n, W, stride_e, stride_n,
    BIASED: gl.constexpr, SAVE_H: gl.constexpr, LAYOUT: gl.constexpr, BLOCK: gl.constexpr,
    K: gl.constexpr,
):  # fmt: skip
    """A block of h, rounded to its dtype, in the layout in which it is stored, with SAVE_H.

    The way there is through memory. What follows needs the registers of sums that are not rounded.
    """
    if BIASED:
        total = _add_bias(total, bias, expert, n, W, stride_e, stride_n, BLOCK, K)
    total = gl.convert_layout(total.to(h.dtype.element_ty), LAYOUT)
    if SAVE_H:
        _store_columns(total, h, row, end, n, W, LAYOUT, BLOCK)
    return total


@gluon.jit
def _activated(
    gate, up, alpha, limit, KIND: gl.constexpr, GATED: gl.constexpr, CLAMP: gl.constexpr
):
    """Rounded to the dtype of ``gate``, as it alone would be, before it is to float8."""
    if GATED:
        value = activate_gated(
            gate.to(gl.float32), up.to(gl.float32), alpha, limit, KIND, CLAMP, False
        )
    else:
        value = activate(gate.to(gl.float32), KIND, False)
    return value.to(gate.dtype)


@gluon.jit
def _store_scales(scale, scales, row, end, block, I, stride, BLOCK: gl.constexpr):
    """Of a block, if there is such a block."""
    to = scales + gl.cast(block, gl.int64) * stride + row
    gl.store(to, scale, mask=(row < end) & (block * BLOCK < I))


@gluon.jit
def _project(
    scaled, bias, results, alpha, limit, stride_bias_e, stride_bias_n, problem, ring,
    GROUP: gl.constexpr, BIASED: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr, SAVE_H: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr, K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group: half of each tile."""
    h, values, scales, stride_scales = results
    tiles, bound, N, H = problem
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    W = N * 2 if HALVES else N
    I = N // 2 if GATED and not HALVES else N
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    ROW: gl.constexpr = GROUP * ROWS  # of a tile, the first
    # a thread's elements lie side by side, 16 bytes of float8; or 8 of the results of pairs
    STORED: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    PAIRED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(N, BLOCK_N)
    start, step = gl.program_id(0), 0
    coming = _tile_of(tiles, bound, start, row_tiles, column_tiles, GROUP_M)
    for number in range(start, row_tiles * column_tiles, gl.num_programs(0)):
        _, column_tile = walk(number, row_tiles, column_tiles, GROUP_M)
        expert, first, end = coming
        # the first columns of the two blocks of h
        n = column_tile * BLOCK_N
        m = n + (N if HALVES else BLOCK)
        by_scales = _scales_of(scaled, expert, first, end, n, m, W, ROW, ROWS, BLOCK, K)
        left, right, step = _sum_tile(
            ring, step, by_scales, H, end - first, GROUP, ROWS, PARTS, BLOCK, K, STAGES
        )
        # not before the sums, beside which there are no registers for it
        after = number + gl.num_programs(0)
        coming = _tile_of(tiles, bound, after, row_tiles, column_tiles, GROUP_M)
        row = first + ROW + gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
        left = _rounded(
            left, bias, h, expert, row, end, n, W, stride_bias_e, stride_bias_n, BIASED, SAVE_H,
            STORED, BLOCK, K,
        )  # fmt: skip
        if PARTS == 2:
            right = _rounded(
                right, bias, h, expert, row, end, m, W, stride_bias_e, stride_bias_n, BIASED,
                SAVE_H, STORED, BLOCK, K,
            )  # fmt: skip
        if GATED and INTERLEAVED:
            HALF: gl.constexpr = BLOCK // 2
            gate, up = gl.split(left.reshape([ROWS, HALF, 2]))
            a = _activated(gate, up, alpha, limit, KIND, True, CLAMP)
            gate, up = gl.split(right.reshape([ROWS, HALF, 2]))
            b = _activated(gate, up, alpha, limit, KIND, True, CLAMP)
            a = gl.convert_layout(a, PAIRED, assert_trivial=True)
            b = gl.convert_layout(b, PAIRED, assert_trivial=True)
            largest = gl.maximum(gl.max(magnitude(a), 1), gl.max(magnitude(b), 1))
            scale, reciprocal = block_scales(largest, False, False)
            row = first + ROW + gl.arange(0, ROWS, gl.SliceLayout(1, PAIRED))
            a = encode(a.to(gl.float32) * reciprocal[:, None], False)
            _store_columns(a, values, row, end, column_tile * BLOCK, I, PAIRED, HALF)
            b = encode(b.to(gl.float32) * reciprocal[:, None], False)
            _store_columns(b, values, row, end, column_tile * BLOCK + HALF, I, PAIRED, HALF)
            _store_scales(scale, scales, row, end, column_tile, I, stride_scales, BLOCK)
        else:
            for part in gl.static_range(1 if GATED else PARTS):
                block = column_tile * (1 if GATED else PARTS) + part
                h_part = left if part == 0 else right
                a = _activated(h_part, right, alpha, limit, KIND, GATED, CLAMP)
                scale, reciprocal = block_scales(gl.max(magnitude(a), 1), False, False)
                a = encode(a.to(gl.float32) * reciprocal[:, None], False)
                _store_columns(a, values, row, end, block * BLOCK, I, STORED, BLOCK)
                _store_scales(scale, scales, row, end, block, I, stride_scales, BLOCK)


@gluon.jit(do_not_specialize=["bound", "stride_xk", "stride_scales"])
def _hopper_scaled_up_kernel(
    x, w, scales_x, scales_w, bias, h, values, scales, tiles, bound, N, H, alpha, limit,
    stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_bias_e, stride_bias_n,
    stride_scales,
    BIASED: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr,
    CLAMP: gl.constexpr, SAVE_H: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK: gl.constexpr, K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """N columns of the product, BLOCK_N of a tile; or of gate, and as many of up beside them.

    K: what one instruction contracts.
    """
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    WIDTH: gl.constexpr = 2 * BLOCK_N if HALVES else BLOCK_N
    BYTES: gl.constexpr = BLOCK * (BLOCK_M + WIDTH)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    slots_x = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK], TILE)
    slots_w = gl.allocate_shared_memory(w.dtype, [STAGES, WIDTH, BLOCK], TILE)
    full, empty, _ = _make_barriers(True, False, 1, STAGES)
    ring = (slots_x, slots_w, full, empty)
    problem = (tiles, bound, N, H)
    scaled = (scales_x, scales_w, stride_xm, stride_xk, stride_we, stride_wk, stride_wn)
    results = (h, values, scales, stride_scales)
    gl.warp_specialize(
        [
            (_project, (
                scaled, bias, results, alpha, limit, stride_bias_e, stride_bias_n, problem, ring, 0,
                BIASED, KIND, GATED, INTERLEAVED, CLAMP, SAVE_H, BLOCK_M, BLOCK_N, WIDTH // BLOCK,
                BLOCK, K, GROUP_M, STAGES,
            )),
            (_project, (
                scaled, bias, results, alpha, limit, stride_bias_e, stride_bias_n, problem, ring, 1,
                BIASED, KIND, GATED, INTERLEAVED, CLAMP, SAVE_H, BLOCK_M, BLOCK_N, WIDTH // BLOCK,
                BLOCK, K, GROUP_M, STAGES,
            )),
            (_load, (x, w, problem, ring, True, HALVES, BLOCK_N, BLOCK, GROUP_M, STAGES, BYTES)),
        ],
        [4, 1],
        [MULTIPLYING, LOADING],
    )  # fmt: skip


def project_up(
    x: Scaled,
    w: Scaled,
    bias: Tensor | None,
    h: Tensor,
    a: Scaled,
    activation: Activation,
    tiles: TileMap,
    cut: Config,
) -> None:
    """As :func:`moe_kernels.triton._scaled_up.project_up`, of what ``activates_in_roles`` admits.

    Further rows of h are left as they are.
    """
    (rows, scales_x), (weights, scales_w), (values, scales) = x, w, a
    (H, W), I = weights.shape[1:], values.shape[1]
    halves = activation.gated and not activation.interleaved
    columns, block_n = (I, SCALED) if halves else (W, cut.block_n)
    constants = {key: value for key, value in activation.constants(h).items() if key != "PRECISE"}
    steps = tiles.bound * ceil_div(columns, block_n)
    shift, strides = bias_operand(bias)
    launch(
        _hopper_scaled_up_kernel, (min(steps, processors(h.device)),),
        describe(rows, [cut.block_m, SCALED]),
        describe_weight(weights, SCALED, block_n, transposed=True), scales_x, scales_w, shift, h,
        values, scales, tiles.tiles, tiles.bound, columns, H, activation.alpha,
        activation.limit, *scales_x.stride(), *scales_w.stride(), *strides, scales.stride(1),
        BIASED=bias is not None, **constants, SAVE_H=h.shape[0] > 0, BLOCK_M=cut.block_m,
        BLOCK_N=block_n, BLOCK=SCALED, K=32, GROUP_M=cut.group_m, STAGES=cut.stages, num_warps=4,
    )  # fmt: skip
