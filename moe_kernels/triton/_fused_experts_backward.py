"""Gradients of the experts of an MoE layer.

T tokens, K experts a token, R = T * K slots, H hidden size, I intermediate size, E experts,
W = 2 * I columns for gated activations, else I. Rows are slots in the order of their experts.

One kernel goes from the gradient dO of the output back through the down-projection and the
activation. With s the routing weight of a row and A its activation, recomputed from h,

    dA' = dO @ down[e].T      dS = <dA', A> + <dO, down_bias[e]>      dH = activation'(s * dA')

so that the rows of the down-projection are not needed. The weights' gradients then contract
``s * A`` with dO, and x with dH.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._activation import (
    Activation,
    activate_backward,
    activate_gated_backward,
)
from moe_kernels.triton._combine import backward_widths, chunk_width, multiply_and_sum
from moe_kernels.triton._configs import Config, config
from moe_kernels.triton._launch import (
    ceil_div,
    dot_precision,
    on_device_of,
    processors,
    refuse_float64,
)
from moe_kernels.triton._operands import (
    Source,
    contiguous_rows,
    gathers_grad,
    has_hopper_down_backward,
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
    BLOCK_T,
    TileMap,
    build_tile_map,
    column_halves,
    empty_tile_map,
    load_tile,
    tile_count,
    tile_map_cut,
    walk,
    write_tile_map,
)
from moe_kernels.triton._wgrad import (
    empty_like_weight,
    gathered_weight_gradient,
    rows_to_add,
    sum_rows,
    weight_gradient,
)
from moe_kernels.triton.expert_activation import expert_activation
from moe_kernels.triton.permute import gathered_rows

Order = tuple[Tensor, Tensor, Tensor]


@triton.jit(do_not_specialize=["rows", "E", "top_k", "bound"])
def _prepare_kernel(
    topk_weights, row_to_slot, offsets, row_weights, tiles, rows, E, top_k, bound,
    stride_t, stride_k,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The rows' weights; programs past the last row write the tile map."""
    program = tl.program_id(0)
    row_programs = tl.cdiv(rows, BLOCK)
    if program < row_programs:
        row = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = row < tl.minimum(tl.load(offsets + E), rows)
        slot = tl.load(row_to_slot + row, mask=valid, other=0).to(tl.int64)
        cell = topk_weights + (slot // top_k) * stride_t + (slot % top_k) * stride_k
        weight = tl.load(cell, mask=valid, other=0.0).to(tl.float32)
        tl.store(row_weights + row, weight, mask=row < rows)
    else:
        write_tile_map(
            program - row_programs, offsets, tiles, rows, E, bound, BLOCK_M, BLOCK_T, EXPERTS
        )


@triton.jit
def _through_activation(
    grad, h, grad_h, weighted_a, first, valid, weight, n, I, W, begin, columns, alpha, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    PRECISE: tl.constexpr, NEEDS_H: tl.constexpr, NEEDS_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dH and s * A for the columns from ``n`` on; returns each row's <dA', A> over them.

    s * A has ``columns`` columns, those of A from ``begin`` on.
    """
    column = n + tl.arange(0, BLOCK_N)
    mask = valid[:, None] & (column < I)[None, :]
    scaled = grad * weight[:, None]
    # rows are addressed with 32 bits from the tile's first
    row = tl.arange(0, BLOCK_M)
    h += first.to(tl.int64) * W
    cell = row[:, None] * W + column[None, :]
    if INTERLEAVED:
        wide = 2 * n + tl.arange(0, 2 * BLOCK_N)
        wide_cell = row[:, None] * W + wide[None, :]
        wide_mask = valid[:, None] & (wide < W)[None, :]
        pairs = tl.load(h + wide_cell, mask=wide_mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
    else:
        gate = tl.load(h + cell, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(h + cell + I, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        a, grad_gate, grad_up = activate_gated_backward(
            scaled, gate, up, alpha, limit, KIND, CLAMP, PRECISE
        )
    else:
        a, grad_gate = activate_backward(scaled, gate, KIND, PRECISE)
    if NEEDS_H:
        grad_h += first.to(tl.int64) * W
        if INTERLEAVED:
            pairs = tl.reshape(tl.join(grad_gate, grad_up), (BLOCK_M, 2 * BLOCK_N))
            tl.store(grad_h + wide_cell, pairs.to(grad_h.dtype.element_ty), mask=wide_mask)
        else:
            tl.store(grad_h + cell, grad_gate.to(grad_h.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(grad_h + cell + I, grad_up.to(grad_h.dtype.element_ty), mask=mask)
    if NEEDS_A:
        own = row[:, None] * columns + (column - begin)[None, :]
        tl.store(
            weighted_a + first.to(tl.int64) * columns + own,
            (a * weight[:, None]).to(weighted_a.dtype.element_ty),
            mask=mask,
        )
    return tl.sum(grad * a, 1)


@triton.jit(do_not_specialize=["bound", "rows", "top_k"])
def _down_backward_kernel(
    grad, row_to_slot, w, h, row_weights, grad_h, weighted_a, partials, tiles, bound,
    rows, H, I, W, begin, columns, top_k, alpha, limit,
    stride_gm, stride_gk, stride_we, stride_wk, stride_wn,
    G_MODE: tl.constexpr, GATHERED: tl.constexpr, W_MODE: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    PRECISE: tl.constexpr, NEEDS_H: tl.constexpr, NEEDS_A: tl.constexpr, NEEDS_S: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tile_count(tiles), tl.cdiv(columns, BLOCK_N)
    for step in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0),
        warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        tile, column_tile = walk(step, row_tiles, column_tiles, GROUP_M)
        expert, first, end = load_tile(tiles, bound, tile)
        n = begin + column_tile * BLOCK_N
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        valid = row < end
        source = row
        if GATHERED:
            source = (tl.load(row_to_slot + row, mask=valid, other=0) // top_k).to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            g = load_rows(
                grad, first, source, valid, k, H, stride_gm, stride_gk, G_MODE, EVEN_K, BLOCK_K
            )
            weight = load_weight(
                w, expert, k, n, H, I, stride_we, stride_wk, stride_wn,
                W_MODE, False, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            total = tl.dot(g, weight, total, input_precision=PRECISION)
        scale = tl.load(row_weights + row, mask=valid, other=0.0)
        if SPLIT:
            # a quarter of the columns at a time, for want of registers
            left, right = column_halves(total, BLOCK_M, BLOCK_N)
            dot = tl.zeros((BLOCK_M,), tl.float32)
            for half in tl.static_range(2):
                pair = column_halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
                for quarter in tl.static_range(2):
                    dot += _through_activation(
                        pair[quarter], h, grad_h, weighted_a, first, valid, scale,
                        n + (2 * half + quarter) * (BLOCK_N // 4), I, W, begin, columns, alpha,
                        limit, KIND, GATED, INTERLEAVED, CLAMP, PRECISE, NEEDS_H, NEEDS_A, BLOCK_M,
                        BLOCK_N // 4,
                    )  # fmt: skip
        else:
            dot = _through_activation(
                total, h, grad_h, weighted_a, first, valid, scale, n, I, W, begin, columns, alpha,
                limit, KIND, GATED, INTERLEAVED, CLAMP, PRECISE, NEEDS_H, NEEDS_A, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if NEEDS_S:
            tl.store(partials + (n // BLOCK_N).to(tl.int64) * rows + row, dot, mask=valid)


@triton.jit(do_not_specialize=["bound", "top_k"])
def _bias_dot_kernel(
    grad, row_to_slot, bias, dots, tiles, bound, H, top_k,
    stride_gt, stride_gh, stride_be, stride_bh, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``dots[r] = <dO of the row's token, down_bias[e]>``, a row tile a program."""
    tile = tl.program_id(0)
    if tile < tile_count(tiles):
        expert, first, end = load_tile(tiles, bound, tile)
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        valid = row < end
        token = (tl.load(row_to_slot + row, mask=valid, other=0) // top_k).to(tl.int64)
        dot = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, H, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H).to(tl.int64)
            g = tl.load(
                grad + token[:, None] * stride_gt + column[None, :] * stride_gh,
                mask=valid[:, None] & (column < H)[None, :],
                other=0.0,
            )
            shift = bias + expert.to(tl.int64) * stride_be + column * stride_bh
            b = tl.load(shift, mask=column < H, other=0.0)
            dot += tl.sum(g.to(tl.float32) * b.to(tl.float32)[None, :], 1)
        tl.store(dots + row, dot, mask=valid)


@triton.jit(do_not_specialize=["P", "rows", "R", "E"])
def _sum_partials_kernel(
    partials, row_to_slot, offsets, grad_weights, P, rows, R, E, BLOCK: tl.constexpr
):
    """Every slot's gradient: its row's partial sums in order, 0 for the dropped."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(row_to_slot + row, mask=row < R, other=-1)
    valid = row < tl.minimum(tl.load(offsets + E), rows)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(P):
        total += tl.load(partials + row, mask=valid, other=0.0)
        partials += rows
    sane = (slot >= 0) & (slot < R)
    tl.store(grad_weights + slot, total.to(grad_weights.dtype.element_ty), mask=sane)


def prepare(topk_weights: Tensor, order: Order, rows: int, block_m: int) -> tuple[Tensor, TileMap]:
    """Each row's routing weight, ``[rows]`` float32, zero in rows of no expert; and the tiles."""
    E = order[2].numel() - 1
    row_weights = torch.empty(rows, dtype=torch.float32, device=topk_weights.device)
    tiles, bound = empty_tile_map(topk_weights.device, rows, E, block_m)
    launch(
        _prepare_kernel, (ceil_div(rows, 1024) + ceil_div(bound, BLOCK_T),),
        topk_weights, order[0], order[2], row_weights, tiles, rows, E, topk_weights.shape[1],
        bound, *topk_weights.stride(), BLOCK=1024, **tile_map_cut(E, block_m),
    )  # fmt: skip
    return row_weights, TileMap(tiles, bound)


def _through_down(
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
) -> None:
    """Write some columns of A, of the values that are given: dH [rows, W], s * A [rows, columns]
    and the parts of dS [P, rows]."""
    _, I, H = down.shape
    in_gluon = has_hopper_down_backward(cut, grad, down, h)
    gathers = source is not None and gathers_grad(
        cut, grad, activation.interleaved, activation.limit
    )
    if in_gluon and (gathers or (source is None and is_aligned(grad))):
        from moe_kernels.triton import _hopper_down_backward  # not every Triton has Gluon

        _hopper_down_backward.through_down(
            grad, source, down, h, row_weights, activation, columns, grad_h, weighted_a, partials,
            tiles, cut, transposed=not is_aligned(down.mT),
        )  # fmt: skip
        return
    g = row_operand(grad, source, cut.block_m, cut.block_k)
    w = weight_operand(down.mT, cut.block_k, cut.block_n)
    steps = tiles.bound * ceil_div(len(columns), cut.block_n)
    launch(
        _down_backward_kernel, (min(steps, processors(grad.device) * cut.programs),),
        g.value, None if source is None else source.row_to_slot, w.value, h, row_weights,
        grad_h, weighted_a, partials, tiles.tiles, tiles.bound, row_weights.numel(), H, I,
        h.shape[1], columns.start, len(columns), 1 if source is None else source.top_k,
        activation.alpha, activation.limit,
        *g.strides, *w.strides, G_MODE=g.mode, GATHERED=source is not None, W_MODE=w.mode,
        **activation.constants(h), NEEDS_H=grad_h is not None, NEEDS_A=weighted_a is not None,
        NEEDS_S=partials is not None, EVEN_K=H % cut.block_k == 0, PRECISION=dot_precision(h),
        SPLIT=cut.block_m * cut.block_n >= 1024 * cut.warps, BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, GROUP_M=cut.group_m,
        STAGES=pipeline_stages(cut.stages, g, w),
        SPECIALIZE=specializes("down_backward", cut, w), num_warps=cut.warps,
    )  # fmt: skip


def bias_dots(
    grad: Tensor, source: Source, bias: Tensor, dots: Tensor, tiles: TileMap, block_m: int
) -> None:
    """``dots[r] = <dO of the row's token, down_bias[e]>``."""
    launch(
        _bias_dot_kernel, (tiles.bound,),
        grad, source.row_to_slot, bias, dots, tiles.tiles, tiles.bound, grad.shape[1],
        source.top_k, *grad.stride(), *bias.stride(), BLOCK_M=block_m, BLOCK_H=32,
    )  # fmt: skip


def sum_partials(
    partials: Tensor, row_to_slot: Tensor, offsets: Tensor, grad_weights: Tensor
) -> None:
    """Write every slot's gradient: the sum of its row's ``partials [P, rows]``."""
    (parts, rows), R = partials.shape, row_to_slot.numel()
    launch(
        _sum_partials_kernel, (ceil_div(R, 1024),),
        partials, row_to_slot, offsets, grad_weights, parts, rows, R, offsets.numel() - 1,
        BLOCK=1024,
    )  # fmt: skip


def empty_gradients(needs: list[bool], *inputs: Tensor | None) -> list[Tensor]:
    """Those that are needed, with no elements where one is not."""
    x = inputs[0]
    assert x is not None
    return [
        _empty_like(value) if need and value is not None else x.new_empty(0)
        for need, value in zip(needs, inputs, strict=True)
    ]


def given_back(grad_h: Tensor | None, known_grad_h: Tensor | None) -> Tensor:
    """The gradient of h as an output of the op, which must be no input."""
    assert grad_h is not None
    return grad_h if known_grad_h is None else grad_h.clone()


def _gradients(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    h: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: list[bool],
    known_grad_h: Tensor | None = None,
    keep_grad_h: bool = False,
    keep_weighted_a: bool = False,
    *,
    overwrites: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    refuse_float64("fused_experts", "x", x)
    grad, x = contiguous_rows(grad), contiguous_rows(x)
    order = (row_to_slot, slot_to_row, offsets)
    act = Activation(activation, interleaved, alpha, limit)
    grads = empty_gradients(needs, x, gate_up, down, topk_weights, gate_up_bias, down_bias)
    dx, dgate_up, ddown, dweights, dbias, ddown_bias = grads
    (E, I, H), R = down.shape, row_to_slot.numel()
    rows = min(h.shape[0], R)
    dh = h if overwrites else known_grad_h  # every element of h is read by who then writes it
    if dh is None and (needs[0] or needs[1] or needs[4] or keep_grad_h):
        dh = h.new_empty(h.shape)
    kept = given_back(dh, known_grad_h) if keep_grad_h else x.new_empty(0)
    kept_a = x.new_empty((h.shape[0], I) if keep_weighted_a else 0)
    if rows == 0 or E == 0:
        for value in (*grads, kept, kept_a):
            value.zero_()
        return grads, kept, kept_a
    with on_device_of(x):
        aligned = is_aligned(grad) and weight_is_aligned(down)
        cut = config("down_backward", x, rows, E, aligned=aligned, inner=min(H, I))
        row_weights, tiles = prepare(topk_weights, order, rows, cut.block_m)
        through_down = known_grad_h is None and (dh is not None or needs[3])
        in_gluon = through_down and has_hopper_down_backward(cut, grad, down, h)
        gathers = in_gluon and gathers_grad(cut, grad, interleaved, limit)
        source = Source(row_to_slot, topk_weights.shape[1])
        grad_rows, grad_source = (
            (grad, source) if gathers else gathered_rows(grad, order, rows, by_tma=in_gluon)
        )
        widths = I, chunk_width(rows, H, h.element_size())
        if not overwrites:
            widths = backward_widths(rows, I, H, h.element_size())
        if through_down:
            parts = ceil_div(I, cut.block_n)
            all_parts = parts + (down_bias is not None)
            partials = row_weights.new_empty(all_parts, rows) if needs[3] else None
            width = widths[0] if needs[2] and not keep_weighted_a else I
            buffer = kept_a.view(-1) if keep_weighted_a else None
            if needs[2] and buffer is None:
                buffer = h.new_empty(rows * width)
            weighted_a = None
            added, added_source = grad_rows, grad_source
            for start in range(0, I, max(width, 1)):
                columns = range(start, min(start + width, I))
                weighted_a = None
                if buffer is not None:
                    weighted_a = buffer[: rows * len(columns)].view(rows, len(columns))
                _through_down(
                    grad_rows, grad_source, down, h, row_weights, act, columns, dh, weighted_a,
                    partials, tiles, cut,
                )  # fmt: skip
                if needs[2] and weighted_a is not None:
                    part = ddown[:, start : columns.stop]
                    # with a source they are not copied yet: the first part that needs it does
                    if gathers and added_source is not None:
                        added, added_source = rows_to_add(grad, weighted_a, order, rows, part.mT)
                    weight_gradient(weighted_a, None, added, added_source, offsets, rows, part)
            del buffer, weighted_a, added
            if partials is not None:
                if down_bias is not None:
                    bias_dots(grad, source, down_bias, partials[parts], tiles, cut.block_m)
                sum_partials(partials, row_to_slot, offsets, dweights)
            del partials
        elif needs[2] or keep_weighted_a:
            weighted_a = expert_activation(
                h[:rows], activation, row_weights, interleaved, alpha, limit
            )
            if keep_weighted_a:
                kept_a[:rows] = weighted_a
            if needs[2]:
                weight_gradient(weighted_a, None, grad_rows, grad_source, offsets, rows, ddown)
            del weighted_a
        if needs[5]:
            sum_rows(grad_rows, grad_source, row_weights, offsets, rows, ddown_bias)
        del grad_rows, grad_source  # perhaps a copy
        if dh is not None:
            if needs[1]:
                gathered_weight_gradient(x, dh, order, rows, dgate_up)
            if needs[4]:
                sum_rows(dh, None, None, offsets, rows, dbias)
            if needs[0]:
                aligned = is_aligned(dh) and H * x.element_size() % 16 == 0
                aligned = aligned and weight_is_aligned(gate_up)
                last = config("grouped_gemm", x, rows, E, aligned=aligned, inner=min(H, h.shape[1]))
                if last.block_m != cut.block_m:
                    tiles = build_tile_map(offsets, rows, last.block_m)
                multiply_and_sum(
                    dh[:rows], gate_up.mT, None, order, None, dx, tiles, last, widths[1]
                )
    return grads, kept, kept_a


def fused_experts_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, grad_h, weighted_a = _gradients(*args)
    return (*grads, grad_h, weighted_a)


def fused_experts_backward_(*args: Any) -> tuple[Tensor, ...]:
    all_args = [*args[:16], None, False, *args[16:]]
    grads, _, weighted_a = _gradients(*all_args, overwrites=True)
    return (*grads, weighted_a)


def fused_experts_wgrad_(
    out: Tensor,
    a: Tensor,
    grad: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    gather_a: bool,
) -> None:
    refuse_float64("fused_experts_wgrad_", "a", a)
    grad = grad.to(a.dtype)
    rows = min((grad if gather_a else a).shape[0], row_to_slot.numel())
    if rows == 0 or out.shape[0] == 0:
        return
    order = (row_to_slot, slot_to_row, offsets)
    with on_device_of(a):
        if not gather_a:
            a, grad, out = grad, a, out.mT
        gathered_weight_gradient(contiguous_rows(a), grad, order, rows, out, accumulate=True)


def _empty_like(value: Tensor) -> Tensor:
    """Contiguous, but a weight's gradient is stored as the weight: autograd takes it over then."""
    if value.dim() == 2:
        return value.new_empty(value.shape)
    transposed = value.stride(1) == 1 and value.stride(2) != 1
    E, M, N = value.shape
    return empty_like_weight(value, E, M, N, value.dtype, transposed=transposed)
