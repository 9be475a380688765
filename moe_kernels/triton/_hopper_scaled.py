"""The product of float8 row groups with their expert's matrix where warps have roles, for sm_90.

R rows, E experts, Kd contracted size, N columns; blocks of 128 along Kd and N share a scale.

The protocol is that of ``_hopper_gemm.py``: one warp loads into a ring, whose steps are numbered
through all tiles, and two groups of four warps multiply half of each tile's 128 rows, but for this.

* A step contracts the 128 elements that share a scale. Its product is summed anew, a block of 128
  columns at a time, and added to the total with its scales: a total of 256 columns takes 128
  registers a thread, a product 64. A product is complete before it is added, so a group has none
  on its way while it adds; the other group's keep the tensor cores busy.
* A slot is handed back when its last product is complete, before that is added.
* Every thread loads the scales of its rows from memory, a step ahead.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_kernels.triton._config_tables import SCALED, Config
from moe_kernels.triton._hopper_gemm import (
    GROUPS,
    LOADING,
    MULTIPLYING,
    _hand_back,
    _load,
    _make_barriers,
    _slot,
    _store,
    _tile_of,
    describe,
    describe_weight,
    meet,
)
from moe_kernels.triton._launch import ceil_div, processors
from moe_kernels.triton._operands import bias_operand
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, tile_count, walk


@gluon.jit
def _product(rows, weight, before, PART: gl.constexpr, BLOCK: gl.constexpr):
    """Of a step and the PART-th block of columns, in float32, in the registers of another."""
    columns = weight.slice(PART * BLOCK, BLOCK, dim=0).permute([1, 0])
    product = warpgroup_mma(rows, columns, before, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def _sum_tile(
    ring, step, scales, contracted, rows_left,
    GROUP: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr,
    K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The scaled sums of a group's half of a tile, by blocks of columns, and its next step.

    The second block's are the first's where there is one.

    ``rows_left``: of the expert from the tile's first on; see ``_hopper_gemm.py``.
    """
    x, w, full, empty = ring
    of_row, of_left, of_right, stride_row, stride_column, valid = scales
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, K])
    left = gl.zeros([ROWS, BLOCK], gl.float32, SUMS)
    right = gl.zeros([ROWS, BLOCK], gl.float32, SUMS)
    product = gl.zeros([ROWS, BLOCK], gl.float32, SUMS)
    used = gl.where(rows_left > GROUP * ROWS, contracted, 0)
    none = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, SUMS))
    next_row = gl.load(of_row, mask=valid, other=0.0)
    next_left = gl.load(of_left + none, mask=valid, other=0.0)
    next_right = gl.load(of_right + none, mask=valid, other=0.0)
    for k in range(0, used, BLOCK):
        by_left, by_right = next_row * next_left, next_row * next_right
        more = k + BLOCK < contracted
        of_row += stride_row
        of_left += stride_column
        of_right += stride_column
        next_row = gl.load(of_row, mask=valid & more, other=0.0)
        next_left = gl.load(of_left + none, mask=valid & more, other=0.0)
        next_right = gl.load(of_right + none, mask=valid & more, other=0.0)
        slot, parity = _slot(step, STAGES)
        mbarrier.wait(full.index(slot), parity)
        rows, weight = x.index(slot).slice(GROUP * ROWS, ROWS, dim=0), w.index(slot)
        product = _product(rows, weight, product, 0, BLOCK)
        if PARTS == 2:
            left += product * by_left[:, None]
            product = _product(rows, weight, product, 1, BLOCK)
        meet()
        _hand_back(empty, step, True, STAGES)
        if PARTS == 2:
            right += product * by_right[:, None]
        else:
            left += product * by_left[:, None]
        step += 1
    for _ in range(used, contracted, BLOCK):
        slot, parity = _slot(step, STAGES)
        mbarrier.wait(full.index(slot), parity)
        meet()
        _hand_back(empty, step, True, STAGES)
        step += 1
    return left, right, step


@gluon.jit
def _add_bias(total, bias, expert, n, N, stride_e, stride_n, BLOCK: gl.constexpr, K: gl.constexpr):
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, K])
    column = n + gl.arange(0, BLOCK, gl.SliceLayout(0, SUMS))
    shift = bias + expert.to(gl.int64) * stride_e + column * stride_n
    return total + gl.load(shift, mask=column < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _scales_of(
    scaled, expert, first, end, n, m, N, ROW: gl.constexpr, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """What ``_sum_tile`` takes, of the blocks of columns from n and from m on, of N columns."""
    scales_a, scales_b, stride_am, stride_ak, stride_be, stride_bk, stride_bn = scaled
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, K])
    row = first + ROW + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    of_column = scales_b + expert.to(gl.int64) * stride_be
    # past the last column, the last scale
    second = gl.minimum(m // BLOCK, (N - 1) // BLOCK)
    return (
        scales_a + row.to(gl.int64) * stride_am, of_column + (n // BLOCK) * stride_bn,
        of_column + second * stride_bn, stride_ak, stride_bk, row < end,
    )  # fmt: skip


@gluon.jit
def _multiply(
    scaled, bias, out, stride_bias_e, stride_bias_n, problem, ring,
    GROUP: gl.constexpr, BIASED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK: gl.constexpr, K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group: half of each tile."""
    tiles, bound, N, Kd = problem
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    ROW: gl.constexpr = GROUP * ROWS  # of a tile, the first
    PARTS: gl.constexpr = BLOCK_N // BLOCK
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(N, BLOCK_N)
    start, step = gl.program_id(0), 0
    coming = _tile_of(tiles, bound, start, row_tiles, column_tiles, GROUP_M)
    for number in range(start, row_tiles * column_tiles, gl.num_programs(0)):
        _, column_tile = walk(number, row_tiles, column_tiles, GROUP_M)
        expert, first, end = coming
        n = column_tile * BLOCK_N
        m = n + (PARTS - 1) * BLOCK
        scales = _scales_of(scaled, expert, first, end, n, m, N, ROW, ROWS, BLOCK, K)
        left, right, step = _sum_tile(
            ring, step, scales, Kd, end - first, GROUP, ROWS, PARTS, BLOCK, K, STAGES
        )
        # not before the sums, beside which there are no registers for it
        after = number + gl.num_programs(0)
        coming = _tile_of(tiles, bound, after, row_tiles, column_tiles, GROUP_M)
        if BIASED:
            left = _add_bias(left, bias, expert, n, N, stride_bias_e, stride_bias_n, BLOCK, K)
        _store(left, out, first, end, ROW, n, N, N, ROWS, BLOCK)
        if PARTS == 2:
            n += BLOCK
            if BIASED:
                right = _add_bias(right, bias, expert, n, N, stride_bias_e, stride_bias_n, BLOCK, K)
            _store(right, out, first, end, ROW, n, N, N, ROWS, BLOCK)


@gluon.jit(do_not_specialize=["bound", "stride_ak"])
def _hopper_scaled_kernel(
    a, b, scales_a, scales_b, bias, out, tiles, bound, N, Kd,
    stride_am, stride_ak, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
    BIASED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK: gl.constexpr,
    K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """K: what one instruction contracts."""
    BYTES: gl.constexpr = BLOCK * (BLOCK_M + BLOCK_N)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    x = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, BLOCK], TILE)
    w = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK], TILE)
    full, empty, _ = _make_barriers(True, False, 1, STAGES)
    ring = (x, w, full, empty)
    problem = (tiles, bound, N, Kd)
    scaled = (scales_a, scales_b, stride_am, stride_ak, stride_be, stride_bk, stride_bn)
    gl.warp_specialize(
        [
            (_multiply, (
                scaled, bias, out, stride_bias_e, stride_bias_n, problem, ring, 0, BIASED, BLOCK_M,
                BLOCK_N, BLOCK, K, GROUP_M, STAGES,
            )),
            (_multiply, (
                scaled, bias, out, stride_bias_e, stride_bias_n, problem, ring, 1, BIASED, BLOCK_M,
                BLOCK_N, BLOCK, K, GROUP_M, STAGES,
            )),
            (_load, (a, b, problem, ring, True, False, BLOCK_N, BLOCK, GROUP_M, STAGES, BYTES)),
        ],
        [4, 1],
        [MULTIPLYING, LOADING],
    )  # fmt: skip


def multiply_scaled_rows(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    tiles: TileMap,
    cut: Config,
) -> None:
    """As :func:`moe_kernels.triton.scaled_grouped_gemm.multiply_scaled_rows`, of what
    ``has_hopper_scaled`` admits."""
    (rows, scales_a), (weights, scales_b) = a, b
    Kd, N = weights.shape[1:]
    x = describe(rows, [cut.block_m, SCALED])
    w = describe_weight(weights, SCALED, cut.block_n, transposed=True)
    steps = tiles.bound * ceil_div(N, cut.block_n)
    shift, strides = bias_operand(bias)
    launch(
        _hopper_scaled_kernel, (min(steps, processors(rows.device)),),
        x, w, scales_a, scales_b, shift, out, tiles.tiles, tiles.bound, N, Kd,
        *scales_a.stride(), *scales_b.stride(), *strides,
        BIASED=bias is not None, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
        BLOCK=SCALED, K=32, GROUP_M=cut.group_m, STAGES=cut.stages, num_warps=4,
    )  # fmt: skip
