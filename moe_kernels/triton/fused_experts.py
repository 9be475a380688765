"""The experts of an MoE layer: up-projection and activation, down-projection, weighted sum.

T tokens, K experts a token, R = T * K slots, H hidden size, I intermediate size, E experts,
W = 2 * I columns for gated activations, else I. Rows are slots in the order of their experts.

The first GEMM gathers its rows from x and applies the activation to its sums, before they are
rounded; the second reads contiguous rows; the last kernel sums each token's rows in slot order. The
last two run a chunk of columns at a time where their rows would take much memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._activation import Activation, activate, activate_gated
from moe_kernels.triton._combine import forward_width, multiply_and_sum
from moe_kernels.triton._configs import Config, config
from moe_kernels.triton._fused_experts_backward import (
    fused_experts_backward,
    fused_experts_backward_,
    fused_experts_wgrad_,
)
from moe_kernels.triton._launch import (
    ceil_div,
    checks_values,
    dot_precision,
    on_device_of,
    processors,
    refuse_float64,
)
from moe_kernels.triton._operands import (
    TMA,
    bias_operand,
    contiguous_rows,
    has_hopper_up,
    is_aligned,
    load_rows,
    load_weight,
    pipeline_stages,
    row_operand,
    specializes,
    weight_is_aligned,
    weight_operand,
)
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import (
    TileMap,
    build_tile_map,
    column_halves,
    load_tile,
    tile_count,
    walk,
)
from moe_kernels.triton.grouped_gemm import zero_rows, zero_tail
from moe_kernels.triton.permute import gathered_rows
from moe_kernels.triton.sort_by_expert import sort_and_map, sort_by_expert

__all__ = [
    "fused_experts",
    "fused_experts_backward",
    "fused_experts_backward_",
    "fused_experts_wgrad_",
]


@triton.jit(do_not_specialize=["bound", "top_k", "h_rows", "E"])
def _up_kernel(
    x, row_to_slot, offsets, w, bias, h, a, tiles, bound, h_rows, H, I, W, E, top_k, alpha, limit,
    stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_bias_e, stride_bias_n,
    X_MODE: tl.constexpr, GATHERED: tl.constexpr, W_MODE: tl.constexpr, BIASED: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    PRECISE: tl.constexpr, SAVE_H: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """A tile's gate and up columns are one product, BLOCK_N of each; they part in registers.

    But where rows of the two halves are contiguous, TMA brings them as two tiles, for two products.
    """
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    TWO: tl.constexpr = HALVES and W_MODE == TMA
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED and not TWO else BLOCK_N
    row_tiles, column_tiles = tile_count(tiles), tl.cdiv(I, BLOCK_N)
    for step in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0),
        warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        tile, column_tile = walk(step, row_tiles, column_tiles, GROUP_M)
        expert, first, end = load_tile(tiles, bound, tile)
        n = column_tile * (BLOCK_N if HALVES else WIDTH)
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        valid = row < end
        source = row
        if GATHERED:
            source = (tl.load(row_to_slot + row, mask=valid, other=0) // top_k).to(tl.int64)
        total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            rows = load_rows(
                x, first, source, valid, k, H, stride_xm, stride_xk, X_MODE, EVEN_K, BLOCK_K
            )
            weight = load_weight(
                w, expert, k, n, H, I if HALVES else W, stride_we, stride_wk, stride_wn,
                W_MODE, HALVES, BLOCK_K, WIDTH,
            )  # fmt: skip
            total = tl.dot(rows, weight, total, input_precision=PRECISION)
            if TWO:
                weight = load_weight(
                    w, expert, k, I + n, H, W, stride_we, stride_wk, stride_wn,
                    W_MODE, HALVES, BLOCK_K, WIDTH,
                )  # fmt: skip
                up = tl.dot(rows, weight, up, input_precision=PRECISION)

        # rows are addressed with 32 bits from the tile's first
        within = tl.arange(0, BLOCK_M)[:, None]
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = valid[:, None] & (column < I)[None, :]
        if BIASED:
            bias_row = bias + expert.to(tl.int64) * stride_bias_e
        if SAVE_H:
            h_row = h + first.to(tl.int64) * W
        if HALVES:
            if TWO:
                gate = total
            else:
                gate, up = column_halves(total, BLOCK_M, WIDTH)
            if BIASED:
                shift = bias_row + column * stride_bias_n
                gate += tl.load(shift, mask=column < I, other=0.0).to(tl.float32)[None, :]
                shift += I * stride_bias_n
                up += tl.load(shift, mask=column < I, other=0.0).to(tl.float32)[None, :]
            if SAVE_H:
                cell = h_row + (within * W + column[None, :])
                tl.store(cell, gate.to(h.dtype.element_ty), mask=stored)
                tl.store(cell + I, up.to(h.dtype.element_ty), mask=stored)
        else:
            wide = n + tl.arange(0, WIDTH)
            if BIASED:
                shift = bias_row + wide * stride_bias_n
                total += tl.load(shift, mask=wide < W, other=0.0).to(tl.float32)[None, :]
            if SAVE_H:
                cell = h_row + (within * W + wide[None, :])
                mask = valid[:, None] & (wide < W)[None, :]
                tl.store(cell, total.to(h.dtype.element_ty), mask=mask)
            if INTERLEAVED:
                gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N, 2)))
        if GATED:
            value = activate_gated(gate, up, alpha, limit, KIND, CLAMP, PRECISE)
        else:
            value = activate(total, KIND, PRECISE)
        cell = a + first.to(tl.int64) * I + (within * I + column[None, :])
        tl.store(cell, value.to(a.dtype.element_ty), mask=stored)
    if SAVE_H:
        zero_rows(h, offsets, h_rows, W, E, 0, W, 16, 256)


def _project_up(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    order: tuple[Tensor, Tensor, Tensor],
    h: Tensor,
    a: Tensor,
    activation: Activation,
    tiles: TileMap,
    cut: Config,
) -> None:
    """``a [rows, I]``, and ``h [num_rows, W]`` unless it has no rows, for the rows of the map.

    Further rows of h are zero.
    """
    (H, W), (rows, I) = gate_up.shape[1:], a.shape
    if I == 0:
        return
    if has_hopper_up(cut, gate_up, x, a, activation.kind):
        from moe_kernels.triton import _hopper_up  # not every Triton has Gluon

        _hopper_up.project_up(
            x, gate_up, bias, order[0], order[1].shape[1], h, a, activation, tiles, cut,
            transposed=not is_aligned(gate_up),
        )  # fmt: skip
        zero_tail(h, order[2])
        return
    x, source = gathered_rows(x, order, rows)
    r = row_operand(x, source, cut.block_m, cut.block_k)
    halves = activation.gated and not activation.interleaved
    w = weight_operand(
        gate_up, cut.block_k, cut.block_n * (2 if activation.gated else 1), halves=halves
    )
    steps = tiles.bound * ceil_div(I, cut.block_n)
    shift, strides = bias_operand(bias)
    launch(
        _up_kernel, (min(steps, processors(x.device) * cut.programs),),
        r.value, order[0], order[2], w.value, shift, h, a, tiles.tiles, tiles.bound, h.shape[0],
        H, I, W, gate_up.shape[0], order[1].shape[1], activation.alpha, activation.limit,
        *r.strides, *w.strides, *strides,
        X_MODE=r.mode, GATHERED=source is not None, W_MODE=w.mode, BIASED=bias is not None,
        **activation.constants(x), SAVE_H=h.shape[0] > 0, EVEN_K=H % cut.block_k == 0,
        PRECISION=dot_precision(x), BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        GROUP_M=cut.group_m, STAGES=pipeline_stages(cut.stages, r, w),
        SPECIALIZE=specializes("up", cut, w), num_warps=cut.warps,
    )  # fmt: skip


def check_bound(offsets: Tensor, num_rows: int) -> None:
    if checks_values() and int(offsets[-1]) > num_rows:
        raise ValueError(
            f"fused_experts: num_rows must be at least the number of ids in [0, E) = "
            f"{int(offsets[-1])}; got {num_rows}"
        )


def forward_outputs(
    y: Tensor, h: Tensor, order: tuple[Tensor, Tensor, Tensor], save_for_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op returns; ``h`` has no rows without a backward, and the order is not kept."""
    if save_for_backward:
        return y, h, *order
    row_to_slot, slot_to_row, offsets = order
    top_k = slot_to_row.shape[1]
    return y, h, row_to_slot.new_empty(0), slot_to_row.new_empty(0, top_k), offsets.new_empty(0)


def fused_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_rows: int,
    save_for_backward: bool,
    gate_up_main_grad: Tensor | None,
    down_main_grad: Tensor | None,
    owns_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    refuse_float64("fused_experts", "x", x)
    x = contiguous_rows(x)
    (E, H, W), I = gate_up.shape, down.shape[1]
    act = Activation(activation, interleaved, alpha, limit)
    h = x.new_empty(num_rows if save_for_backward else 0, W)
    rows = min(num_rows, topk_ids.numel())
    if rows == 0 or E == 0 or H == 0:
        order = sort_by_expert(topk_ids, E, "fused_experts")
        check_bound(order[2], num_rows)
        y = x.new_zeros(x.shape)
        h.zero_()
    else:
        y, a = x.new_empty(x.shape), x.new_empty(rows, I)
        halves = act.gated and not interleaved
        aligned = is_aligned(x, a) and weight_is_aligned(gate_up, halves=halves)
        cut = config("up", x, rows, E, aligned=aligned, inner=min(H, I))
        aligned = is_aligned(a) and H * x.element_size() % 16 == 0 and weight_is_aligned(down)
        cut_down = config("grouped_gemm", x, rows, E, aligned=aligned, inner=min(H, I))
        order, tiles = sort_and_map(topk_ids, E, rows, cut.block_m, "fused_experts")
        check_bound(order[2], num_rows)
        with on_device_of(x):
            _project_up(x, gate_up, gate_up_bias, order, h, a, act, tiles, cut)
            if cut_down.block_m != cut.block_m:
                tiles = build_tile_map(order[2], rows, cut_down.block_m)
            width = forward_width(rows, I, H, x.element_size())
            multiply_and_sum(a, down, down_bias, order, topk_weights, y, tiles, cut_down, width)
    return forward_outputs(y, h, order, save_for_backward)
