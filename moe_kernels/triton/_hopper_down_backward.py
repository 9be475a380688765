"""Backward through the down-projection and the activation where warps have roles, for sm_90.

R rows, E experts, H contracted size, I columns of the activation, W = 2 * I of h, or I. In Gluon;
what is computed is what ``_fused_experts_backward.py`` says.

The protocol of the products is that of ``_hopper_gemm.py``, whose warp loads here, too, where rows
of dO are contiguous. Where they are gathered (GATHERED) it is that of ``_hopper_up.py``, with two
warps that gather: beside those that bring h they are four, to which registers are given together.

What comes after the sums is long: h is read, and dH and s * A, three times as much, are written. It
goes by parts of SIDE rows and columns, so that registers suffice. For each group of warps that
multiplies there is one more warp, which brings the parts of h by TMA, in the order in which the
group wants them, to AHEAD slots of the group's own, while its tile is multiplied:

* ``full[slot]``: phase u completes when all bytes of use u of the slot are there.
* ``empty[slot]``: phase u completes when the group has use u in registers, by its one arrival.
  Before use u + 1 is loaded that is waited for.

One warp loads and one group reads, both in the same order, so neither barrier gets two phases ahead
of who waits for it, and nothing waits in a circle: what a group's part waits for are its earlier
parts alone, and no product waits for one, but for the group's own later tiles.

The group's threads have read a part themselves, not by TMA, which writes the next one there. That
is another proxy, so each puts a fence between, before the group meets and one arrives for all.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moe_kernels.triton._activation import (
    Activation,
    activate_backward,
    activate_gated_backward,
)
from moe_kernels.triton._config_tables import LARGEST_TILE, Config
from moe_kernels.triton._gluon import tma_load
from moe_kernels.triton._hopper_gemm import (
    GROUPS,
    LOADING,
    MULTIPLYING,
    _begin,
    _load,
    _make_ring,
    _sum_tile,
    describe,
    describe_weight,
    meet,
)
from moe_kernels.triton._hopper_up import UNIT, _gather, _halves
from moe_kernels.triton._launch import ceil_div, processors
from moe_kernels.triton._operands import Source
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, load_tile, tile_count, walk

GATHERERS = gl.constexpr(2)  # warps that gather
# registers a thread where they do: of eight warps, and of the four that load
BESIDE_GATHERERS, GATHERING = gl.constexpr(224), gl.constexpr(56)
SIDE = gl.constexpr(64)  # rows and columns of a part
AHEAD = gl.constexpr(2)  # parts of h that a group has slots for


@gluon.jit
def _use(turns, part: gl.constexpr, PARTS: gl.constexpr):
    """The slot of a part of the group's tile of number ``turns``, and the parity of that use of it.

    As many parts of each tile are in each slot, so that a part's is known to the compiler.
    """
    SLOTS: gl.constexpr = min(AHEAD, PARTS)
    return part % SLOTS, (turns * (PARTS // SLOTS) + part // SLOTS) & 1


@gluon.jit
def _bring_h(
    h, problem, own,
    GROUP: gl.constexpr, SHARED: gl.constexpr, PLANES: gl.constexpr, WIDE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The role of a warp that brings h: every part of every tile of the group.

    A part is that of each of PLANES of h, gate and up if those are halves, WIDE columns.
    """
    tiles, bound, N, _ = problem
    parts, full, empty = own
    ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
    OWNERS: gl.constexpr = 1 if SHARED else GROUPS
    ROW: gl.constexpr = GROUP * ROWS if SHARED else 0
    ACROSS: gl.constexpr = BLOCK_N // SIDE
    PARTS: gl.constexpr = ROWS // SIDE * ACROSS
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(N, BLOCK_N)
    start, _ = _begin(0, GROUP, SHARED, 1)
    turns = 0
    for number in range(start, row_tiles * column_tiles, gl.num_programs(0) * OWNERS):
        tile, column_tile = walk(number, row_tiles, column_tiles, GROUP_M)
        _, first, _ = load_tile(tiles, bound, tile)
        for part in gl.static_range(PARTS):
            slot, parity = _use(turns, part, PARTS)
            ready = full.index(slot)
            row = first + ROW + part // ACROSS * SIDE
            column = column_tile * ACROSS + part % ACROSS
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(ready, 2 * SIDE * WIDE * PLANES)
            for plane in gl.static_range(PLANES):
                memory = parts.index(slot * PLANES + plane)
                tma_load(h, [plane, row, column * WIDE], ready, memory)
        turns += 1  # noqa: SIM113  there is no enumerate


@gluon.jit
def _bring(
    grad, row_to_slot, w, top_k, stride, problem, ring,
    GATHERED: gl.constexpr, TRANSPOSED: gl.constexpr, EVEN_K: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of who brings what is multiplied."""
    if GATHERED:
        _gather(
            grad, row_to_slot, w, top_k, stride, problem, ring, GATHERERS, False, TRANSPOSED,
            EVEN_K, BLOCK_M, BLOCK_N, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
        )  # fmt: skip
    else:
        tiles, bound, columns, units = problem
        BYTES: gl.constexpr = 2 * BLOCK_K * (BLOCK_M + BLOCK_N)
        problem = (tiles, bound, columns, units * UNIT)
        _load(grad, w, problem, ring, TRANSPOSED, False, BLOCK_N, BLOCK_K, GROUP_M, STAGES, BYTES)


@gluon.jit
def _write(tile, out, first, end, column, N, pitch, COLUMNS: gl.constexpr):
    """As ``_store``, of SIDE rows, addressed so that nothing is kept for the next tile."""
    ACROSS: gl.constexpr = 8 * COLUMNS // SIDE  # threads, of 8 columns each
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    tile = gl.convert_layout(tile.to(out.dtype.element_ty), LAYOUT)
    i = first + gl.arange(0, SIDE, gl.SliceLayout(1, LAYOUT))
    j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    cells = out + ((i.to(gl.int64) * pitch)[:, None] + j[None, :])
    gl.store(cells, tile, mask=(i < end)[:, None] & (j < N)[None, :])


@gluon.jit
def _half_of(tile, half: gl.constexpr, COLUMNS: gl.constexpr):
    """The left or the right half of SIDE rows."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS // 2, 16])
    return gl.convert_layout(_halves(tile, SIDE, COLUMNS)[half], LAYOUT, assert_trivial=True)


@gluon.jit
def _whole(left, right, COLUMNS: gl.constexpr):
    """That of which these are the halves."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    tile = gl.join(left, right).permute(0, 2, 1).reshape([SIDE, COLUMNS])
    return gl.convert_layout(tile, LAYOUT, assert_trivial=True)


@gluon.jit
def _take_pairs(pairs, half: gl.constexpr):
    """Gate and up of half a part, of which they are every other column."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE // 2, 16])
    # a thread's elements, in pairs, are those that it has in LAYOUT
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
    tile = pairs.slice(half * SIDE, SIDE, dim=1).load(PAIRS)
    gate, up = gl.split(tile.reshape([SIDE, SIDE // 2, 2]))
    gate = gl.convert_layout(gate, LAYOUT, assert_trivial=True)
    return gate, gl.convert_layout(up, LAYOUT, assert_trivial=True)


@gluon.jit
def _give_back(empty):
    """All of a part is in registers, or has been."""
    fence_async_shared()
    meet()
    mbarrier.arrive(empty)


@gluon.jit
def _take_h(
    own, slot: gl.constexpr, parity, half: gl.constexpr, GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """Gate and up of half a part, both the same if there is no gate.

    The other half would not fit in registers. That is left to no compiler: each half is waited for,
    and what is loaded of the other one is not used.
    """
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    parts, full, empty = own
    mbarrier.wait(full.index(slot), parity)
    if INTERLEAVED:
        gate, up = _take_pairs(parts.index(slot), half)
    elif GATED:
        gate = _half_of(parts.index(slot * 2).load(PART), half, SIDE)
        up = _half_of(parts.index(slot * 2 + 1).load(PART), half, SIDE)
    else:
        gate = _half_of(parts.index(slot).load(PART), half, SIDE)
        up = gate
    if half == 1:
        _give_back(empty.index(slot))
    return gate, up


@gluon.jit
def _differentiate_columns(
    grad, gate, up, scale, alpha, limit, KIND: gl.constexpr, GATED: gl.constexpr,
    CLAMP: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """dH, of gate and of up, and s * A, all rounded; and each row's <dA', A>."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    dtype: gl.constexpr = gate.dtype
    scale = gl.convert_layout(scale, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    scaled, gate = grad * scale[:, None], gate.to(gl.float32)
    if GATED:
        a, grad_gate, grad_up = activate_gated_backward(
            scaled, gate, up.to(gl.float32), alpha, limit, KIND, CLAMP, False
        )
    else:
        a, grad_gate = activate_backward(scaled, gate, KIND, False)
        grad_up = grad_gate
    weighted = a * scale[:, None]
    return grad_gate.to(dtype), grad_up.to(dtype), weighted.to(dtype), gl.sum(grad * a, 1)


@gluon.jit
def _differentiate(
    grad, gate, up, scale, alpha, limit, KIND: gl.constexpr, GATED: gl.constexpr,
    CLAMP: gl.constexpr,
):  # fmt: skip
    """:func:`_differentiate_columns` of half a part, a half of it after the other."""
    HALF: gl.constexpr = SIDE // 2
    left_gate, left_up, left_a, left_dot = _differentiate_columns(
        _half_of(grad, 0, HALF), _half_of(gate, 0, HALF), _half_of(up, 0, HALF), scale, alpha,
        limit, KIND, GATED, CLAMP, HALF // 2,
    )  # fmt: skip
    right_gate, right_up, right_a, right_dot = _differentiate_columns(
        _half_of(grad, 1, HALF), _half_of(gate, 1, HALF), _half_of(up, 1, HALF), scale, alpha,
        limit, KIND, GATED, CLAMP, HALF // 2,
    )  # fmt: skip
    grad_gate, grad_up = _whole(left_gate, right_gate, HALF), _whole(left_up, right_up, HALF)
    return grad_gate, grad_up, _whole(left_a, right_a, HALF), left_dot + right_dot


@gluon.jit
def _through_part(
    grad, own, slot: gl.constexpr, parity, scale, grad_h, weighted_a, first, end, column, columns,
    I, W, alpha, limit,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr,
    NEEDS_H: gl.constexpr, NEEDS_A: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Write dH and s * A of a part; returns each row's <dA', A> over its columns.

    It goes by quarters, since more at once would not fit in registers.
    """
    HALF: gl.constexpr = SIDE // 2
    dot = gl.zeros([SIDE], gl.float32, gl.SliceLayout(1, PART))
    for half in gl.static_range(2):
        gate, up = _take_h(own, slot, parity, half, GATED, INTERLEAVED)
        grad_gate, grad_up, weighted, part_dot = _differentiate(
            _half_of(grad, half, SIDE), gate, up, scale, alpha, limit, KIND, GATED, CLAMP
        )
        own_column = column + half * HALF
        if NEEDS_H:
            if INTERLEAVED:
                pairs = gl.join(grad_gate, grad_up).reshape([SIDE, SIDE])
                _write(pairs, grad_h, first, end, 2 * own_column, 2 * columns, W, SIDE)
            else:
                _write(grad_gate, grad_h, first, end, own_column, columns, W, HALF)
                if GATED:
                    _write(grad_up, grad_h + I, first, end, own_column, columns, W, HALF)
        if NEEDS_A:
            _write(weighted, weighted_a, first, end, own_column, columns, columns, HALF)
        dot += gl.convert_layout(part_dot, gl.SliceLayout(1, PART), assert_trivial=True)
    return dot


@gluon.jit
def _columns_of(tile, part: gl.constexpr, COLUMNS: gl.constexpr):
    """Of a tile of SIDE rows, SIDE columns."""
    if COLUMNS == SIDE:
        found = tile
    else:
        left, right = _halves(tile, SIDE, COLUMNS)
        HALF: gl.constexpr = COLUMNS // SIDE // 2
        found = _columns_of(left if part < HALF else right, part % HALF, COLUMNS // 2)
    return found


@gluon.jit
def _pass_down(
    row_weights, grad_h, weighted_a, partials, rows, I, W, alpha, limit, problem, ring, turn, own,
    GROUP: gl.constexpr, GATHERED: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr,
    NEEDS_H: gl.constexpr, NEEDS_A: gl.constexpr, NEEDS_S: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group: half of each tile, or every other tile."""
    tiles, bound, columns, units = problem
    H = units * UNIT
    ROWS: gl.constexpr = BLOCK_M // GROUPS if SHARED else BLOCK_M
    ROW: gl.constexpr = GROUP * ROWS if SHARED else 0  # of a tile, the first
    OWNERS: gl.constexpr = 1 if SHARED else GROUPS  # of the tiles, by turns
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    ACROSS: gl.constexpr = BLOCK_N // SIDE
    PARTS: gl.constexpr = ROWS // SIDE * ACROSS
    row_tiles, column_tiles = tile_count(tiles), gl.cdiv(columns, BLOCK_N)
    start, step = _begin(H, GROUP, SHARED, BLOCK_K)
    turns = 0
    for number in range(start, row_tiles * column_tiles, gl.num_programs(0) * OWNERS):
        tile, column_tile = walk(number, row_tiles, column_tiles, GROUP_M)
        _, first, end = load_tile(tiles, bound, tile)
        n = column_tile * BLOCK_N
        total, step, next_turn = _sum_tile(
            ring, turn, turns, step, H, end - first, GROUP, SHARED, TRANSPOSED, GATHERED, BLOCK_M,
            BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        if ROWS == SIDE:
            bands = (total,)
        else:
            bands = gl.split(total.reshape([2, SIDE, BLOCK_N]).permute(1, 2, 0))
        for band in gl.static_range(ROWS // SIDE):
            begin = first + ROW + band * SIDE
            row = begin + gl.arange(0, SIDE, gl.SliceLayout(1, PART))
            scale = gl.load(row_weights + row, mask=row < end, other=0.0)
            dot = gl.zeros([SIDE], gl.float32, gl.SliceLayout(1, PART))
            for across in gl.static_range(ACROSS):
                grad = _columns_of(bands[band], across, BLOCK_N)
                grad = gl.convert_layout(grad, PART, assert_trivial=True)
                slot, parity = _use(turns, band * ACROSS + across, PARTS)
                dot += _through_part(
                    grad, own, slot, parity, scale, grad_h, weighted_a, begin, end,
                    n + across * SIDE, columns, I, W, alpha, limit, KIND, GATED, INTERLEAVED, CLAMP,
                    NEEDS_H, NEEDS_A, PART,
                )  # fmt: skip
            if NEEDS_S:
                gl.store(partials + column_tile.to(gl.int64) * rows + row, dot, mask=row < end)
        turns = next_turn


@gluon.jit
def _make_slots(dtype: gl.constexpr, PLANES: gl.constexpr, WIDE: gl.constexpr):
    """A group's slots for parts of h, and their barriers."""
    PLANE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    parts = gl.allocate_shared_memory(dtype, [AHEAD * PLANES, SIDE, WIDE], PLANE)
    full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    for slot in gl.static_range(AHEAD):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    return parts, full, empty


@gluon.jit(do_not_specialize=["bound", "rows", "top_k"])
def _hopper_down_backward_kernel(
    grad, row_to_slot, w, h, row_weights, grad_h, weighted_a, partials, tiles, bound, rows, units,
    columns, I, W, top_k, stride, alpha, limit,
    GATHERED: gl.constexpr, EVEN_K: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr,
    NEEDS_H: gl.constexpr, NEEDS_A: gl.constexpr, NEEDS_S: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PLANES: gl.constexpr = 2 if GATED and not INTERLEAVED else 1
    WIDE: gl.constexpr = 2 * SIDE if GATED and INTERLEAVED else SIDE
    BRINGING: gl.constexpr = GATHERERS if GATHERED else 1
    ARRIVALS: gl.constexpr = 32 * GATHERERS + 1 if GATHERED else 1
    MOST: gl.constexpr = BESIDE_GATHERERS if GATHERED else MULTIPLYING
    LEAST: gl.constexpr = GATHERING if GATHERED else LOADING
    first, second = _make_slots(h.dtype, PLANES, WIDE), _make_slots(h.dtype, PLANES, WIDE)
    # last, since it shows the barriers to TMA
    ring, turn = _make_ring(
        w.dtype, SHARED, TRANSPOSED, ARRIVALS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    )
    problem = (tiles, bound, columns, units)
    gl.warp_specialize(
        [
            (_pass_down, (
                row_weights, grad_h, weighted_a, partials, rows, I, W, alpha, limit, problem, ring,
                turn, first, 0, GATHERED, SHARED, TRANSPOSED, KIND, GATED, INTERLEAVED, CLAMP,
                NEEDS_H, NEEDS_A, NEEDS_S, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
            (_pass_down, (
                row_weights, grad_h, weighted_a, partials, rows, I, W, alpha, limit, problem, ring,
                turn, second, 1, GATHERED, SHARED, TRANSPOSED, KIND, GATED, INTERLEAVED, CLAMP,
                NEEDS_H, NEEDS_A, NEEDS_S, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
            (_bring, (
                grad, row_to_slot, w, top_k, stride, problem, ring, GATHERED, TRANSPOSED, EVEN_K,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
            )),
            (_bring_h, (h, problem, first, 0, SHARED, PLANES, WIDE, BLOCK_M, BLOCK_N, GROUP_M)),
            (_bring_h, (h, problem, second, 1, SHARED, PLANES, WIDE, BLOCK_M, BLOCK_N, GROUP_M)),
        ],
        [4, BRINGING, 1, 1],
        [MOST, LEAST, LEAST, LEAST],
    )  # fmt: skip


def through_down(
    grad: Tensor,
    source: Source | None,
    down: Tensor,
    h: Tensor,
    row_weights: Tensor,
    activation: Activation,
    columns: range,
    grad_h: Tensor | None,
    weighted_a: Tensor | None,
    partials: Tensor | None,
    tiles: TileMap,
    cut: Config,
    transposed: bool,
) -> None:
    """As :func:`moe_kernels.triton._fused_experts_backward._through_down`.

    Args:
        grad: of rows that are gathered, or contiguous ones that TMA can bring.
        transposed: down.mT, [E, H, I], is stored [E, I, H].
    """
    (_, I, H), W = down.shape, h.shape[1]
    w = down[:, columns.start : columns.stop].mT
    # planes of which TMA sees these columns alone: gate and up, or both in pairs
    planes = 2 if activation.gated and not activation.interleaved else 1
    wide = 2 if activation.gated and activation.interleaved else 1
    of_h = slice(wide * columns.start, wide * columns.stop)
    seen = h.unflatten(1, (planes, W // planes)).movedim(1, 0)[..., of_h]
    constants = {key: value for key, value in activation.constants(h).items() if key != "PRECISE"}
    steps = tiles.bound * ceil_div(len(columns), cut.block_n)
    parts = partials if partials is None else partials[columns.start // cut.block_n :]
    launch(
        _hopper_down_backward_kernel, (min(steps, processors(grad.device)),),
        grad if source else describe(grad, [cut.block_m, cut.block_k]),
        source and source.row_to_slot,
        describe_weight(w, cut.block_k, cut.block_n, transposed=transposed),
        describe(seen, [1, SIDE.value, SIDE.value * wide]), row_weights,
        h if grad_h is None else grad_h[:, of_h], h if weighted_a is None else weighted_a,
        row_weights if parts is None else parts, tiles.tiles, tiles.bound, row_weights.numel(),
        H // UNIT.value, len(columns), I, W, source.top_k if source else 1,
        grad.stride(0) // UNIT.value, activation.alpha, activation.limit,
        GATHERED=source is not None, EVEN_K=H % cut.block_k == 0,
        SHARED=cut.block_m * cut.block_n > LARGEST_TILE, TRANSPOSED=transposed, **constants,
        NEEDS_H=grad_h is not None, NEEDS_A=weighted_a is not None, NEEDS_S=parts is not None,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, GROUP_M=cut.group_m,
        STAGES=cut.stages, num_warps=4,
    )  # fmt: skip
