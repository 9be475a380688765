"""The up-projection and its activation where warps have roles, for sm_90, in Gluon.

R rows, E experts, H contracted size, I columns of the activation, W = 2 * I of the product, or I.

The protocol is that of ``_hopper_gemm.py``, but for who loads: TMA gathers no rows on Hopper, so
four warps copy them with ``cp.async``, each thread 16 bytes at a time, while TMA brings the
weights. A phase of ``full`` completes when all those threads have arrived, each once its copies are
there, by an arrival that ``cp.async`` makes itself, and the weights' bytes have come.

Copied rows are in memory then, but the tensor cores read through another proxy: who multiplies puts
a fence between. Triton 3.6 puts none, so this is also how rows are gathered in its place there.

None of the four warps is overtaken at ``empty``: that its next phase completes takes a read, so a
complete phase of ``full``, so the arrival of all their threads, which follows their waits.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_kernels.triton._activation import Activation, activate, activate_gated
from moe_kernels.triton._config_tables import LARGEST_TILE, Config
from moe_kernels.triton._gluon import copy_async
from moe_kernels.triton._hopper_gemm import (
    GROUPS,
    _begin,
    _load_weight,
    _make_ring,
    _slot,
    _store,
    _sum_tile,
    _take_tile,
    _tile_of,
    describe_weight,
)
from moe_kernels.triton._launch import ceil_div, processors
from moe_kernels.triton._operands import bias_operand
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, load_tile, tile_count, walk

LOADERS = gl.constexpr(4)  # warps that gather
# registers a thread: with eight warps of the first and four of the second, all that there are
MULTIPLYING, LOADING = gl.constexpr(232), gl.constexpr(40)
PART = gl.constexpr(64)  # columns of the activation that are computed at once
UNIT = gl.constexpr(8)  # elements of 16 bytes, of which rows and their strides are multiples


@gluon.jit
def _gather(
    x, row_to_slot, w, top_k, stride, problem, ring,
    WARPS: gl.constexpr, HALVES: gl.constexpr, TRANSPOSED: gl.constexpr, EVEN_K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the warps that load: every step of every tile of the program.

    ``stride``, of rows, and the contracted size are given in UNITs, so that the compiler knows
    that they are multiples, without which it would not copy 16 bytes at a time.
    """
    tiles, bound, I, units = problem
    rows, weights, full, empty = ring
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, UNIT], [4, 8], [WARPS, 1], [1, 0])
    COLUMNS: gl.constexpr = 0 if TRANSPOSED else 1  # a slot's dimension of them
    i = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(I, BLOCK_N)
    step = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        tile, column_tile = walk(number, row_tiles, column_tiles, GROUP_M)
        expert, first, end = load_tile(tiles, bound, tile)
        n = column_tile * (BLOCK_N if HALVES else WIDTH)
        # those past the expert's last row repeat it, and are not stored
        row = first + gl.minimum(i, end - first - 1)
        token = gl.load(row_to_slot + row) // top_k
        cells = x + (token.to(gl.int64) * (stride * UNIT))[:, None] + column[None, :]
        for k in range(0, units * UNIT, BLOCK_K):
            slot, parity = _slot(step, STAGES)
            ready, weight = full.index(slot), weights.index(slot)
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(ready, 2 * BLOCK_K * WIDTH)
            if HALVES:
                gate = weight.slice(0, BLOCK_N, dim=COLUMNS)
                up = weight.slice(BLOCK_N, BLOCK_N, dim=COLUMNS)
                _load_weight(w, expert, n, k, ready, gate, TRANSPOSED)
                _load_weight(w, expert, I + n, k, ready, up, TRANSPOSED)
            else:
                _load_weight(w, expert, n, k, ready, weight, TRANSPOSED)
            if EVEN_K:
                copy_async(rows.index(slot), cells + k)
            else:
                inside = (k + column < units * UNIT)[None, :]
                copy_async(rows.index(slot), cells + k, mask=inside)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _halves(tile, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """The left and the right half of a tile's columns."""
    return gl.split(tile.reshape([ROWS, 2, WIDTH // 2]).permute(0, 2, 1))


@gluon.jit
def _shift(tile, bias, stride, column, N, WIDTH: gl.constexpr):
    """The tile and, of a bias of N columns, those from ``column`` on."""
    columns = column + gl.arange(0, WIDTH, gl.AutoLayout())
    shift = gl.load(bias + columns * stride, mask=columns < N, other=0.0)
    return tile + shift.to(gl.float32)[None, :]


@gluon.jit
def _project(
    bias, h, a, alpha, limit, W, stride_bias_e, stride_bias_n, problem, ring, turn,
    GROUP: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, BIASED: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr,
    SAVE_H: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group: half of each tile, or every other tile."""
    tiles, bound, I, units = problem
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
    ROW: gl.constexpr = GROUP * ROWS if SHARED else 0  # of a tile, the first
    OWNERS: gl.constexpr = 1 if SHARED else GROUPS  # of the tiles, by turns
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(I, BLOCK_N)
    H = units * UNIT
    start, step = _begin(H, GROUP, SHARED, BLOCK_K)
    turns, stride = 0, gl.num_programs(0) * OWNERS
    coming = _tile_of(tiles, bound, start, row_tiles, column_tiles, GROUP_M)
    for number in range(start, row_tiles * column_tiles, stride):
        _, column_tile = walk(number, row_tiles, column_tiles, GROUP_M)
        found, coming = _take_tile(
            tiles, bound, number, stride, coming, row_tiles, column_tiles, SHARED, GROUP_M
        )
        expert, first, end = found
        n = column_tile * BLOCK_N
        total, step, turns = _sum_tile(
            ring, turn, turns, step, H, end - first, GROUP, SHARED, TRANSPOSED, True, BLOCK_M,
            WIDTH, BLOCK_K, STAGES,
        )  # fmt: skip

        if BIASED:
            shifts = bias + expert.to(gl.int64) * stride_bias_e
        if HALVES:
            # biases of all columns at once would not fit in registers
            left, right = _halves(total, ROWS, WIDTH)
            if BLOCK_N > PART:
                gates, ups = _halves(left, ROWS, BLOCK_N), _halves(right, ROWS, BLOCK_N)
            else:
                gates, ups = (left,), (right,)
            SIZE: gl.constexpr = min(BLOCK_N, PART)
            for part in gl.static_range(BLOCK_N // SIZE):
                gate, up, column = gates[part], ups[part], n + part * SIZE
                if BIASED:
                    gate = _shift(gate, shifts, stride_bias_n, column, I, SIZE)
                    up = _shift(up, shifts + I * stride_bias_n, stride_bias_n, column, I, SIZE)
                if SAVE_H:
                    _store(gate, h, first, end, ROW, column, I, W, ROWS, SIZE)
                    _store(up, h + I, first, end, ROW, column, I, W, ROWS, SIZE)
                value = activate_gated(gate, up, alpha, limit, KIND, CLAMP, False)
                _store(value, a, first, end, ROW, column, I, I, ROWS, SIZE)
        else:
            # halves, as in the GEMM; the activation of a whole tile would not fit in registers
            HALF: gl.constexpr = WIDTH // 2
            wide = column_tile * WIDTH
            if BIASED:
                total = _shift(total, shifts, stride_bias_n, wide, W, WIDTH)
            left, right = _halves(total, ROWS, WIDTH)
            if SAVE_H:
                _store(left, h, first, end, ROW, wide, W, W, ROWS, HALF)
                _store(right, h, first, end, ROW, wide + HALF, W, W, ROWS, HALF)
            if GATED:
                gate, up = gl.split(total.reshape([ROWS, BLOCK_N, 2]))
                value = activate_gated(gate, up, alpha, limit, KIND, CLAMP, False)
                _store(value, a, first, end, ROW, n, I, I, ROWS, BLOCK_N)
            else:
                _store(activate(left, KIND, False), a, first, end, ROW, n, I, I, ROWS, HALF)
                right = activate(right, KIND, False)
                _store(right, a, first, end, ROW, n + HALF, I, I, ROWS, HALF)


@gluon.jit(do_not_specialize=["bound", "top_k"])
def _hopper_up_kernel(
    x, row_to_slot, w, bias, h, a, tiles, bound, units, I, W, top_k, stride, alpha, limit,
    stride_bias_e, stride_bias_n,
    TRANSPOSED: gl.constexpr, BIASED: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr, SAVE_H: gl.constexpr, EVEN_K: gl.constexpr,
    SHARED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    WIDTH: gl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    # the arrivals of all that gather, and of the one that says how many bytes of weights come
    ring, turn = _make_ring(
        w.dtype, SHARED, TRANSPOSED, 32 * LOADERS + 1, BLOCK_M, WIDTH, BLOCK_K, STAGES
    )
    problem = (tiles, bound, I, units)
    gl.warp_specialize(
        [
            (_project, (
                bias, h, a, alpha, limit, W, stride_bias_e, stride_bias_n, problem, ring, turn, 0,
                SHARED, TRANSPOSED, BIASED, KIND, GATED, INTERLEAVED, CLAMP, SAVE_H, BLOCK_M,
                BLOCK_N, WIDTH, BLOCK_K, GROUP_M, STAGES,
            )),
            (_project, (
                bias, h, a, alpha, limit, W, stride_bias_e, stride_bias_n, problem, ring, turn, 1,
                SHARED, TRANSPOSED, BIASED, KIND, GATED, INTERLEAVED, CLAMP, SAVE_H, BLOCK_M,
                BLOCK_N, WIDTH, BLOCK_K, GROUP_M, STAGES,
            )),
            (_gather, (
                x, row_to_slot, w, top_k, stride, problem, ring, LOADERS, HALVES, TRANSPOSED,
                EVEN_K, BLOCK_M, BLOCK_N, WIDTH, BLOCK_K, GROUP_M, STAGES,
            )),
        ],
        [4, LOADERS],
        [MULTIPLYING, LOADING],
    )  # fmt: skip


def project_up(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    row_to_slot: Tensor,
    top_k: int,
    h: Tensor,
    a: Tensor,
    activation: Activation,
    tiles: TileMap,
    cut: Config,
    transposed: bool,
) -> None:
    """``a [rows, I]``, and ``h`` unless it has no rows, for the rows of the map.

    Args:
        x: [T, H], aligned, H a multiple of UNIT, of which row r is row ``row_to_slot[r] // top_k``.
        gate_up: [E, H, W], that TMA can bring.
        transposed: gate_up is stored [E, W, H].
    """
    (H, W), I = gate_up.shape[1:], a.shape[1]
    width = cut.block_n * (2 if activation.gated else 1)
    columns = cut.block_n if activation.gated and not activation.interleaved else width
    w = describe_weight(gate_up, cut.block_k, columns, transposed=transposed)
    constants = {key: value for key, value in activation.constants(x).items() if key != "PRECISE"}
    steps = tiles.bound * ceil_div(I, cut.block_n)
    shift, strides = bias_operand(bias)
    launch(
        _hopper_up_kernel, (min(steps, processors(x.device)),),
        x, row_to_slot, w, shift, h, a, tiles.tiles, tiles.bound, H // UNIT.value, I, W, top_k,
        x.stride(0) // UNIT.value, activation.alpha, activation.limit, *strides,
        TRANSPOSED=transposed, BIASED=bias is not None, **constants, SAVE_H=h.shape[0] > 0,
        EVEN_K=H % cut.block_k == 0, SHARED=cut.block_m * width > LARGEST_TILE,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, GROUP_M=cut.group_m,
        STAGES=cut.stages, num_warps=4,
    )  # fmt: skip
