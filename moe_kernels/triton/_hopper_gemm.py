"""The product of row groups with their expert's matrix where warps have roles, for sm_90, in Gluon.

R rows, E experts, Kd contracted size, N columns. Of a program's warps one loads, by TMA, into a
ring of slots in shared memory; a slot holds what a step contracts, BLOCK_K of Kd. Two groups of
four warps multiply what is in the slots, and store. The warp that loads gives up most of its
registers to the others, whose sums fill theirs.

A tile whose sums one group can hold belongs to one group: they take turns at the tensor cores, and
while one multiplies the other stores (ping-pong). A larger tile belongs to both (SHARED), half of
its rows each.

The steps of a program are numbered through all its tiles, as they are loaded. Step s is in slot
s % STAGES, as use s // STAGES of that slot. Barriers order them; a wait for a parity returns once
the phase of that parity is complete, and a phase of parity 1 counts as complete before the first.

* ``full[slot]``: phase u completes when all bytes of use u are there, which TMA counts; the one
  arrival is that of the loading warp, when it has said how many come. Use u is waited for with
  parity u % 2.
* ``empty[slot]``: phase u completes when use u has been read, by an arrival of the group that read
  it, or of both if SHARED. Before use u is loaded, phase u - 1 is waited for; use 0 does not wait.
* ``turn[group]``, not if SHARED: the other group has multiplied its tile. The p-th tile of group 1
  waits for phase p, after the p-th of group 0; that of group 0 for phase p - 1, and so its first
  for none.

No barrier gets two phases ahead of who waits for it, which would look like none ahead. Phase u + 1
of ``full`` needs use u + 1 to be loaded, so use u to be read, so every reader to have left its wait
for use u. This holds for a group only if all its warps have: they meet before one arrives for them.
Likewise for ``empty``, whose phase u needs use u to be loaded after the wait for phase u - 1, and
for turns, since groups alternate.

Nothing waits in a circle. To load step s waits for step s - STAGES to be read; to read it, for it
to be loaded, and through a turn for steps of earlier tiles to be read: each wait is for something
earlier.

A slot is handed back when the product that reads it is known to be complete: each is waited for
after the next is issued, and the last at the end of its tile. So there are two slots or more: the
next one's load would wait for the only one's, and that for the next product.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_kernels.triton._config_tables import LARGEST_TILE, Config
from moe_kernels.triton._gluon import tma_load
from moe_kernels.triton._launch import ceil_div, processors
from moe_kernels.triton._operands import bias_operand, tma_strides
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, load_tile, tile_count, walk

GROUPS = gl.constexpr(2)  # of four warps that multiply
# registers a thread: with eight warps of the first and one of the second, all that there are
MULTIPLYING, LOADING = gl.constexpr(240), gl.constexpr(24)
# a barrier of the warps with one role; Triton 3.7 renamed it
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _slot(step, STAGES: gl.constexpr):
    """A step's slot, and the parity of that use of it."""
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def _hand_back(empty, step, done, STAGES: gl.constexpr):
    slot, _ = _slot(step, STAGES)
    mbarrier.arrive(empty.index(slot), pred=done)


@gluon.jit
def _load_weight(w, expert, n, k, ready, slot, TRANSPOSED: gl.constexpr):
    """What a step that begins at k contracts, of the columns from n on."""
    if TRANSPOSED:
        tma_load(w, [expert, n, k], ready, slot)
    else:
        tma_load(w, [expert, k, n], ready, slot)


@gluon.jit
def _load(
    a, b, problem, ring,
    TRANSPOSED: gl.constexpr, HALVES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """The role of the warp that loads: every step of every tile of the program.

    With HALVES, of TRANSPOSED weights, a tile also has the BLOCK_N columns that lie N further.
    """
    tiles, bound, N, Kd = problem
    x, w, full, empty = ring
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(N, BLOCK_N)
    step = 0
    for number in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        tile, column_tile = walk(number, row_tiles, column_tiles, GROUP_M)
        expert, first, _ = load_tile(tiles, bound, tile)
        n = column_tile * BLOCK_N
        for k in range(0, Kd, BLOCK_K):
            slot, parity = _slot(step, STAGES)
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(ready, BYTES)
            tma_load(a, [first, k], ready, x.index(slot))
            weight = w.index(slot)
            if HALVES:
                left, right = weight.slice(0, BLOCK_N, dim=0), weight.slice(BLOCK_N, BLOCK_N, dim=0)
                _load_weight(b, expert, n, k, ready, left, TRANSPOSED)
                _load_weight(b, expert, N + n, k, ready, right, TRANSPOSED)
            else:
                _load_weight(b, expert, n, k, ready, weight, TRANSPOSED)
            step += 1


@gluon.jit
def _begin(contracted, GROUP: gl.constexpr, SHARED: gl.constexpr, BLOCK_K: gl.constexpr):
    """A group's first tile, and the step that its sums begin with."""
    number, step = gl.program_id(0), 0
    if not SHARED:
        number += GROUP * gl.num_programs(0)
        step += GROUP * gl.cdiv(contracted, BLOCK_K)
    return number, step


@gluon.jit
def _await_turn(turn, turns, GROUP: gl.constexpr):
    """Until the other group has multiplied the tile before this group's of that number."""
    mbarrier.wait(turn.index(GROUP), (turns & 1) ^ (1 - GROUP))


@gluon.jit
def _tile_of(tiles, bound, number, row_tiles, column_tiles, GROUP_M: gl.constexpr):
    """The expert, first row and end of the tile of that number, or of the last one.

    Who needs to know a tile before it multiplies asks for it before the products of the one before,
    so as not to wait for memory. If there are no tiles, what is found means nothing.
    """
    row_tiles = gl.maximum(row_tiles, 1)  # the map has room for one
    number = gl.minimum(number, row_tiles * column_tiles - 1)
    tile, _ = walk(number, row_tiles, column_tiles, GROUP_M)
    return load_tile(tiles, bound, tile)


@gluon.jit
def _take_tile(
    tiles, bound, number, stride, coming, row_tiles, column_tiles,
    SHARED: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The expert, first row and end of a group's tile; and those that come next, if SHARED."""
    if SHARED:
        found = coming
        coming = _tile_of(tiles, bound, number + stride, row_tiles, column_tiles, GROUP_M)
    else:
        found = _tile_of(tiles, bound, number, row_tiles, column_tiles, GROUP_M)
    return found, coming


@gluon.jit
def _sum_tile(
    ring, turn, turns, step, contracted, rows_left,
    GROUP: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, COPIED: gl.constexpr,
    BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums of a group's tile, of number ``turns`` and from ``step`` on, or of its half of one.

    With them come both numbers of its next tile.

    ``rows_left``: of the expert from the tile's first on. A half without rows is not multiplied, so
    that the other has the tensor cores to itself; its slots are handed back all the same.

    COPIED: a slot's rows came by ``cp.async``. The tensor cores read through another proxy, to
    which the fence shows them.
    """
    x, w, full, empty = ring
    ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    if not SHARED:
        _await_turn(turn, turns, GROUP)
    total = gl.zeros([ROWS, WIDTH], gl.float32, SUMS)
    used = contracted
    if SHARED:
        used = gl.where(rows_left > GROUP * ROWS, contracted, 0)
    for k in range(0, used, BLOCK_K):
        slot, parity = _slot(step, STAGES)
        mbarrier.wait(full.index(slot), parity)
        if COPIED:
            fence_async_shared()
        rows, weight = x.index(slot), w.index(slot)
        if SHARED:
            rows = rows.slice(GROUP * ROWS, ROWS, dim=0)
        if TRANSPOSED:
            weight = weight.permute([1, 0])
        total = warpgroup_mma(rows, weight, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=(total,))
        meet()
        _hand_back(empty, step - 1, k > 0, STAGES)
        step += 1
    total = warpgroup_mma_wait(0, deps=(total,))
    meet()
    _hand_back(empty, step - 1, used > 0, STAGES)
    if SHARED:
        for _ in range(used, contracted, BLOCK_K):
            slot, parity = _slot(step, STAGES)
            mbarrier.wait(full.index(slot), parity)
            meet()
            _hand_back(empty, step, True, STAGES)
            step += 1
    else:
        mbarrier.arrive(turn.index(1 - GROUP))
        step += gl.cdiv(contracted, BLOCK_K)  # those of the other group's tile
    return total, step, turns + 1


@gluon.jit
def _store(
    tile, out, first, end, ROW: gl.constexpr, column, N, pitch,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Store the rows of one expert, of which N columns are, ``pitch`` elements from row to row.

    A thread's elements lie side by side, 16 bytes of them.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = gl.convert_layout(tile.to(out.dtype.element_ty), LAYOUT)
    i = ROW + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    gl.store(
        out + first.to(gl.int64) * pitch + (i[:, None] * pitch + j[None, :]),
        tile,
        mask=(i < end - first)[:, None] & (j < N)[None, :],
    )


@gluon.jit
def _multiply(
    bias, out, stride_bias_e, stride_bias_n, problem, ring, turn,
    GROUP: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, BIASED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group: half of each tile, or every other tile."""
    tiles, bound, N, Kd = problem
    ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
    OWNERS: gl.constexpr = 1 if SHARED else GROUPS  # of the tiles, by turns
    ROW: gl.constexpr = GROUP * ROWS if SHARED else 0  # of a tile, the first
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(N, BLOCK_N)
    start, step = _begin(Kd, GROUP, SHARED, BLOCK_K)
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
            ring, turn, turns, step, Kd, end - first, GROUP, SHARED, TRANSPOSED, False, BLOCK_M,
            BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip

        if BIASED:
            column = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
            shift = bias + expert.to(gl.int64) * stride_bias_e + column * stride_bias_n
            total += gl.load(shift, mask=column < N, other=0.0).to(gl.float32)[None, :]
        # halves, since what they go through on the way to their layout is taken from the ring
        HALF: gl.constexpr = BLOCK_N // 2
        left, right = gl.split(total.reshape([ROWS, 2, HALF]).permute(0, 2, 1))
        _store(left, out, first, end, ROW, n, N, N, ROWS, HALF)
        _store(right, out, first, end, ROW, n + HALF, N, N, ROWS, HALF)


@gluon.jit
def _make_barriers(
    SHARED: gl.constexpr, TURNS: gl.constexpr, ARRIVALS: gl.constexpr, STAGES: gl.constexpr
):
    """Those of the ring's slots, and of turns, if there are any.

    Where no role waits for turns their memory would be given to others, which must not write where
    barriers were made.

    ARRIVALS: at ``full``, of the warps that load.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turn = empty  # roles take only what there is
    if TURNS:
        turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
        for group in gl.static_range(GROUPS):
            mbarrier.init(turn.index(group), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=ARRIVALS)
        mbarrier.init(empty.index(slot), count=GROUPS if SHARED else 1)
    fence_async_shared()  # TMA arrives through another proxy than these writes
    return full, empty, turn


@gluon.jit
def _make_ring(
    dtype: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, ARRIVALS: gl.constexpr,
    BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The ring, and the barriers of turns: see :func:`_make_barriers`."""
    W_SHAPE: gl.constexpr = [WIDTH, BLOCK_K] if TRANSPOSED else [BLOCK_K, WIDTH]
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], TILE)
    w = gl.allocate_shared_memory(dtype, [STAGES, W_SHAPE[0], W_SHAPE[1]], TILE)
    full, empty, turn = _make_barriers(SHARED, not SHARED, ARRIVALS, STAGES)
    return (x, w, full, empty), turn


@gluon.jit(do_not_specialize=["bound"])
def _hopper_gemm_kernel(
    a, b, bias, out, tiles, bound, N, Kd, stride_bias_e, stride_bias_n,
    SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, BIASED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = 2 * BLOCK_K * (BLOCK_M + BLOCK_N)
    ring, turn = _make_ring(a.dtype, SHARED, TRANSPOSED, 1, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    problem = (tiles, bound, N, Kd)
    gl.warp_specialize(
        [
            (_multiply, (
                bias, out, stride_bias_e, stride_bias_n, problem, ring, turn, 0, SHARED, TRANSPOSED,
                BIASED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
            (_multiply, (
                bias, out, stride_bias_e, stride_bias_n, problem, ring, turn, 1, SHARED, TRANSPOSED,
                BIASED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
            (_load, (
                a, b, problem, ring, TRANSPOSED, False, BLOCK_N, BLOCK_K, GROUP_M, STAGES, BYTES,
            )),
        ],
        [4, 1],
        [MULTIPLYING, LOADING],
    )  # fmt: skip


def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(128, 8 * tensor.element_size(), tensor.dim())
    return TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), block, layout)


def describe_weight(w: Tensor, block_k: int, block_n: int, *, transposed: bool) -> TensorDescriptor:
    """``w [E, Kd, N]``, stored [E, N, Kd] if transposed, in tiles of an expert."""
    if transposed:
        return describe(w.mT, [1, block_n, block_k])
    return describe(w, [1, block_k, block_n])


def multiply_rows(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tiles: TileMap,
    cut: Config,
    transposed: bool,
) -> None:
    """As :func:`moe_kernels.triton.grouped_gemm.multiply_rows`, of operands that TMA can bring.

    Args:
        transposed: b is stored [E, N, Kd].
    """
    Kd, N = b.shape[1:]
    steps = tiles.bound * ceil_div(N, cut.block_n)
    w = describe_weight(b, cut.block_k, cut.block_n, transposed=transposed)
    shift, strides = bias_operand(bias)
    launch(
        _hopper_gemm_kernel, (min(steps, processors(a.device)),),
        describe(a, [cut.block_m, cut.block_k]), w, shift, out, tiles.tiles, tiles.bound, N, Kd,
        *strides,
        SHARED=cut.block_m * cut.block_n > LARGEST_TILE, TRANSPOSED=transposed,
        BIASED=bias is not None, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        GROUP_M=cut.group_m, STAGES=cut.stages, num_warps=4,
    )  # fmt: skip
