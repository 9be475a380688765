"""The weight gradient where warps have roles, for sm_90, in Gluon.

R rows, E experts; a weight is [M, N]. A step contracts BLOCK_K of an expert's rows; tiles of
experts with more rows have more steps.

The protocol is that of ``_hopper_gemm.py``: the same ring, whose steps are numbered through all
tiles, and the same turns of groups, but for three things.

* A tile may have no steps, and is zero then. Its turn is waited for and passed on all the same.
* Rows past an expert's last are zero in both operands, since 0 * NaN is not 0: ragged descriptors
  fill them, and so does ``cp.async``, by which four warps gather the rows of one operand, as in
  ``_hopper_up.py``.
* Of a tile that both groups halve (SHARED), group 1 begins LAG steps after group 0, so that while
  one stores the other multiplies. ``turn[1]`` is that lead: phase p completes when group 0 has
  multiplied LAG steps of the p-th tile that has STAGES steps or more; group 1 waits for it before
  its first step of that tile. Shorter ones do without. Group 0 gets no two phases ahead: it
  completes the next in a step STAGES or more after the p-th tile's first, whose slot group 1 has
  read then, after its wait. Nor does it wait for group 1: the ring holds LAG steps and one more.

Sums are stored by TMA, through buffers of a group's own, 64 columns at a time, while the next tile
is multiplied; or added to what is there, by every thread to those that it holds.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices

from moe_kernels.triton._config_tables import LARGEST_TILE, Config
from moe_kernels.triton._gluon import copy_async, tma_load, tma_store
from moe_kernels.triton._hopper_gemm import (
    GROUPS,
    _await_turn,
    _hand_back,
    _make_barriers,
    _slot,
    describe,
    meet,
)
from moe_kernels.triton._hopper_up import LOADERS, UNIT, _halves
from moe_kernels.triton._launch import ceil_div, processors
from moe_kernels.triton._operands import Source
from moe_kernels.triton._replay import launch

PART = gl.constexpr(64)  # columns that are stored at once
STAGED = gl.constexpr(128)  # rows of them that a group's buffers hold


@gluon.jit
def _place(problem, number, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """A tile's expert, and its first row and column."""
    _, _, _, M, N = problem
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles = gl.cdiv(M, BLOCK_M) * tiles_n
    within = number % tiles
    return number // tiles, (within // tiles_n) * BLOCK_M, (within % tiles_n) * BLOCK_N


@gluon.jit
def _load_offsets(problem, number, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where the rows of a tile's expert begin and end; past the last tile there are none.

    As they are stored, so that nothing waits for them: see :func:`_row_range`.
    """
    offsets, _, E, _, _ = problem
    expert, _, _ = _place(problem, number, BLOCK_M, BLOCK_N)
    begin = gl.load(offsets + expert, mask=expert < E, other=0)
    return begin, gl.load(offsets + expert + 1, mask=expert < E, other=0)


@gluon.jit
def _row_range(problem, found):
    """The rows, within [0, R] whatever the offsets."""
    _, R, _, _, _ = problem
    begin = gl.minimum(gl.maximum(found[0], 0), R)
    return begin, gl.minimum(gl.maximum(found[1], begin), R)


@gluon.jit
def _step_count(problem, found, BLOCK_K: gl.constexpr):
    begin, end = _row_range(problem, found)
    return gl.cdiv(end - begin, BLOCK_K)


@gluon.jit
def _tile_count(problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    _, _, E, M, N = problem
    return E * gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)


@gluon.jit
def _load_ragged(source, begin, end, row, column, ready, slot):
    """Rows from ``row`` on, zero from ``end`` on."""
    billion, last, first = to_ragged_indices(begin, end - begin, row - begin)
    tma_load(source, [billion, last, first, column], ready, slot)


@gluon.jit
def _copy(
    rows, problem, ring,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the warp that loads, where no rows are gathered."""
    a, grad, _, _, _ = rows
    x, w, full, empty = ring
    step = 0
    tiles = _tile_count(problem, BLOCK_M, BLOCK_N)
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, m, n = _place(problem, number, BLOCK_M, BLOCK_N)
        begin, end = _row_range(problem, _load_offsets(problem, number, BLOCK_M, BLOCK_N))
        for row in range(begin, end, BLOCK_K):
            slot, parity = _slot(step, STAGES)
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(ready, 2 * BLOCK_K * (BLOCK_M + BLOCK_N))
            _load_ragged(a, begin, end, row, m, ready, x.index(slot))
            _load_ragged(grad, begin, end, row, n, ready, w.index(slot))
            step += 1


@gluon.jit
def _gather(
    rows, problem, ring,
    A_GATHERED: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the warps that load, where the rows of one operand are gathered.

    ``stride``, of those rows, is in UNITs, as in ``_hopper_up.py``. Slots are read a step ahead.
    """
    a, grad, row_to_slot, top_k, stride = rows
    x, w, full, empty = ring
    _, _, _, M, N = problem
    WIDTH: gl.constexpr = BLOCK_M if A_GATHERED else BLOCK_N
    OTHER: gl.constexpr = BLOCK_N if A_GATHERED else BLOCK_M
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, UNIT], [4, 8], [LOADERS, 1], [1, 0])
    i = gl.arange(0, BLOCK_K, gl.SliceLayout(1, LAYOUT))
    j = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    step = 0
    tiles = _tile_count(problem, BLOCK_M, BLOCK_N)
    found = _load_offsets(problem, gl.program_id(0), BLOCK_M, BLOCK_N)
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, m, n = _place(problem, number, BLOCK_M, BLOCK_N)
        begin, end = _row_range(problem, found)
        found = _load_offsets(problem, number + gl.num_programs(0), BLOCK_M, BLOCK_N)
        column = (m if A_GATHERED else n) + j
        units = (M if A_GATHERED else N) // UNIT
        last = end - 1
        chosen = gl.load(row_to_slot + gl.minimum(begin + i, last), mask=begin + i < end, other=0)
        for row in range(begin, end, BLOCK_K):
            token = (chosen // top_k).to(gl.int64)
            source = a if A_GATHERED else grad
            cells = source + (token * (stride * UNIT))[:, None] + column[None, :]
            inside = (row + i < end)[:, None]
            if not EVEN:
                inside = inside & (column < units * UNIT)[None, :]
            chosen = gl.load(row_to_slot + gl.minimum(row + BLOCK_K + i, last))
            slot, parity = _slot(step, STAGES)
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(ready, 2 * BLOCK_K * OTHER)
            if A_GATHERED:
                _load_ragged(grad, begin, end, row, n, ready, w.index(slot))
                copy_async(x.index(slot), cells, mask=inside)
            else:
                _load_ragged(a, begin, end, row, m, ready, x.index(slot))
                copy_async(w.index(slot), cells, mask=inside)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _load(
    rows, problem, ring,
    A_GATHERED: gl.constexpr, G_GATHERED: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    if A_GATHERED or G_GATHERED:
        _gather(rows, problem, ring, A_GATHERED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    else:
        _copy(rows, problem, ring, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)


@gluon.jit
def _contract(
    ring, turn, turns, step, steps,
    GROUP: gl.constexpr, SHARED: gl.constexpr, COPIED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums of a group's tile, or of its half of one: of ``steps`` steps from ``step`` on.

    With them come the number of the step after them, and that of the next turn.

    COPIED: rows in the slots came by ``cp.async``: see ``_hopper_gemm.py``.
    """
    x, w, full, empty = ring
    ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LAG: gl.constexpr = STAGES // 2
    apart = steps >= STAGES
    if not SHARED:
        _await_turn(turn, turns, GROUP)
        turns += 1
    else:
        if GROUP == 1:
            mbarrier.wait(turn.index(1), turns & 1, pred=apart)
        turns += gl.where(apart, 1, 0)
    total = gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)
    for i in range(steps):
        slot, parity = _slot(step, STAGES)
        mbarrier.wait(full.index(slot), parity)
        if COPIED:
            fence_async_shared()
        rows = x.index(slot)
        if SHARED:
            rows = rows.slice(GROUP * ROWS, ROWS, dim=1)
        total = warpgroup_mma(rows.permute([1, 0]), w.index(slot), total, is_async=True)
        total = warpgroup_mma_wait(1, deps=(total,))
        meet()
        _hand_back(empty, step - 1, i > 0, STAGES)
        if SHARED and GROUP == 0:
            mbarrier.arrive(turn.index(1), pred=apart & (i == LAG))
        step += 1
    total = warpgroup_mma_wait(0, deps=(total,))
    meet()
    _hand_back(empty, step - 1, steps > 0, STAGES)
    if not SHARED:
        mbarrier.arrive(turn.index(1 - GROUP))
    return total, step, turns


@gluon.jit
def _parts(total, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """The sums, so many columns at a time: all, half or a quarter."""
    if BLOCK_N == WIDTH:
        parts = (total,)
    else:
        left, right = _halves(total, ROWS, BLOCK_N)
        if BLOCK_N == 2 * WIDTH:
            parts = (left, right)  # type: ignore[assignment]
        else:
            one, two = _halves(left, ROWS, BLOCK_N // 2)
            three, four = _halves(right, ROWS, BLOCK_N // 2)
            parts = (one, two, three, four)  # type: ignore[assignment]
    return parts


@gluon.jit
def _add(
    tile, out, expert, m, n, M, N, stride_e, pitch,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Store a part, or add it to what is there: of a row, every thread has pairs of columns."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    tile = gl.convert_layout(tile, SUMS, assert_trivial=True)
    i = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    j = n + gl.arange(0, WIDTH, gl.SliceLayout(0, SUMS))
    cell = out + gl.cast(expert, gl.int64) * stride_e + gl.cast(m, gl.int64) * pitch
    cell += i[:, None] * pitch + j[None, :]
    inside = (m + i < M)[:, None] & (j < N)[None, :]
    tile = tile.to(out.dtype.element_ty)
    if ACCUMULATE:
        tile += gl.load(cell, mask=inside, other=0.0)
    gl.store(cell, tile, mask=inside)


@gluon.jit
def _sum(
    kept, staging, problem, ring, turn,
    GROUP: gl.constexpr, SHARED: gl.constexpr, COPIED: gl.constexpr, STAGING: gl.constexpr,
    ACCUMULATE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group: half of each tile, or every other tile."""
    out, stride_e, pitch = kept
    _, _, _, M, N = problem
    ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
    ROW: gl.constexpr = GROUP * ROWS if SHARED else 0  # of a tile, the first
    OWNERS: gl.constexpr = 1 if SHARED else GROUPS  # of the tiles, by turns
    BUFFERS: gl.constexpr = STAGED // ROWS
    # of columns; of twice the rows half as many, where what was there takes registers, too
    WIDTH: gl.constexpr = PART if STAGING else PART * BUFFERS // 2
    tiles, programs = _tile_count(problem, BLOCK_M, BLOCK_N), gl.num_programs(0)
    start, step, turns = gl.program_id(0), 0, 0
    found = _load_offsets(problem, start, BLOCK_M, BLOCK_N)
    if OWNERS == 2 and GROUP == 1:
        step += _step_count(problem, found, BLOCK_K)
        start += programs
        found = _load_offsets(problem, start, BLOCK_M, BLOCK_N)
    for number in range(start, tiles, programs * OWNERS):
        expert, m, n = _place(problem, number, BLOCK_M, BLOCK_N)
        m += ROW
        steps = _step_count(problem, found, BLOCK_K)
        if OWNERS == 2:
            skipped = _load_offsets(problem, number + programs, BLOCK_M, BLOCK_N)
        found = _load_offsets(problem, number + programs * OWNERS, BLOCK_M, BLOCK_N)
        total, step, turns = _contract(
            ring, turn, turns, step, steps, GROUP, SHARED, COPIED, BLOCK_M, BLOCK_N, STAGES
        )
        if OWNERS == 2:
            step += _step_count(problem, skipped, BLOCK_K)

        parts = _parts(total, ROWS, BLOCK_N, WIDTH)
        for part in gl.static_range(BLOCK_N // WIDTH):
            if STAGING:
                buffer = staging.index(GROUP * BUFFERS + part % BUFFERS)
                tma.store_wait(BUFFERS - 1)  # until what the buffer held before was read
                meet()
                buffer.store(parts[part].to(out.dtype))
                fence_async_shared()
                meet()
                tma_store(out, [expert, m, n + part * WIDTH], buffer)
            else:
                _add(
                    parts[part], out, expert, m, n + part * WIDTH, M, N, stride_e, pitch, ROWS,
                    WIDTH, ACCUMULATE,
                )  # fmt: skip
    if STAGING:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["R", "E", "top_k"])
def _hopper_wgrad_kernel(
    a, grad, row_to_slot, out, offsets, R, E, M, N, top_k, stride, stride_e, pitch,
    A_GATHERED: gl.constexpr, G_GATHERED: gl.constexpr, EVEN: gl.constexpr, STAGING: gl.constexpr,
    ACCUMULATE: gl.constexpr, SHARED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = grad.dtype if A_GATHERED else a.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    COPIED: gl.constexpr = A_GATHERED or G_GATHERED
    x = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, BLOCK_M], TILE)
    w = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, BLOCK_N], TILE)
    if STAGING:
        ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
        BUFFERS: gl.constexpr = GROUPS * STAGED // ROWS
        staging = gl.allocate_shared_memory(out.dtype, [BUFFERS, ROWS, PART], TILE)
    ARRIVALS: gl.constexpr = 32 * LOADERS + 1 if COPIED else 1
    full, empty, turn = _make_barriers(SHARED, True, ARRIVALS, STAGES)
    if not STAGING:
        staging = turn  # none: roles take only what there is
    ring, problem = (x, w, full, empty), (offsets, R, E, M, N)
    kept, rows = (out, stride_e, pitch), (a, grad, row_to_slot, top_k, stride)
    WARPS: gl.constexpr = LOADERS if COPIED else 1
    SUMMING: gl.constexpr = 232 if COPIED else 240
    LOADING: gl.constexpr = 40 if COPIED else 24
    gl.warp_specialize(
        [
            (_sum, (
                kept, staging, problem, ring, turn, 0, SHARED, COPIED, STAGING, ACCUMULATE, BLOCK_M,
                BLOCK_N, BLOCK_K, STAGES,
            )),
            (_sum, (
                kept, staging, problem, ring, turn, 1, SHARED, COPIED, STAGING, ACCUMULATE, BLOCK_M,
                BLOCK_N, BLOCK_K, STAGES,
            )),
            (_load, (
                rows, problem, ring, A_GATHERED, G_GATHERED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
                STAGES,
            )),
        ],
        [4, WARPS],
        [SUMMING, LOADING],
    )  # fmt: skip


def _describe_rows(rows: Tensor, block_k: int, columns: int) -> TensorDescriptor:
    """Rows in tiles that end with an expert's."""
    ragged = create_ragged_descriptor(rows, [block_k, columns])
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(rows, ragged.shape, ragged.strides, ragged.block_shape, layout)


def sum_products(
    a: Tensor,
    a_source: Source | None,
    grad: Tensor,
    grad_source: Source | None,
    offsets: Tensor,
    rows: int,
    out: Tensor,
    cut: Config,
    *,
    accumulate: bool,
) -> None:
    """As :func:`moe_kernels.triton._wgrad.weight_gradient`, of what ``has_hopper_wgrad`` admits."""
    E, M, N = out.shape
    source, gathered = a_source or grad_source, a if a_source else grad
    shared = cut.block_m * cut.block_n > LARGEST_TILE
    by_tma = not accumulate and out.element_size() == 2
    box = [1, cut.block_m // (GROUPS.value if shared else 1), PART.value]
    width = cut.block_m if a_source else cut.block_n
    steps = E * ceil_div(M, cut.block_m) * ceil_div(N, cut.block_n)
    launch(
        _hopper_wgrad_kernel, (min(steps, processors(a.device)),),
        a if a_source else _describe_rows(a, cut.block_k, cut.block_m),
        grad if grad_source else _describe_rows(grad, cut.block_k, cut.block_n),
        None if source is None else source.row_to_slot, describe(out, box) if by_tma else out,
        offsets, rows, E, M, N, 1 if source is None else source.top_k,
        gathered.stride(0) // UNIT.value, *out.stride()[:2],
        A_GATHERED=a_source is not None, G_GATHERED=grad_source is not None,
        EVEN=gathered.shape[1] % width == 0, STAGING=by_tma, ACCUMULATE=accumulate, SHARED=shared,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, STAGES=cut.stages,
        num_warps=4,
    )  # fmt: skip
