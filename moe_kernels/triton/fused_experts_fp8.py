"""The experts of an MoE layer with both products in float8, scaled by blocks.

T tokens, K experts a token, R = T * K slots, H hidden size, I intermediate size, E experts,
W = 2 * I columns for gated activations, else I. Rows are slots in the order of their experts.

Rows are gathered and rounded to float8 in one pass, and multiplied from there by TMA: half the
bytes of a gather in the product's prologue, and scales that lie beside each other. The
up-projection goes through the activation and rounds it to float8 before it writes (see
``_scaled_up.py``), or one kernel does so afterwards where a tile has only a part of what a scale is
of. In backward one kernel goes back through it, from the gradient of the activation to that of h,
in x's dtype and in float8, to the weighted activation and to the parts of dS = <dA', A>.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._activation import (
    Activation,
    activate,
    activate_backward,
    activate_gated,
    activate_gated_backward,
)
from moe_kernels.triton._combine import chunk_width, sum_products
from moe_kernels.triton._configs import Config
from moe_kernels.triton._fp8 import encode, has_float8, raw
from moe_kernels.triton._fused_experts_backward import (
    Order,
    bias_dots,
    empty_gradients,
    given_back,
    prepare,
    sum_partials,
)
from moe_kernels.triton._launch import ceil_div, on_device_of, refuse_float64
from moe_kernels.triton._operands import Source, contiguous_rows, has_hopper_scaled
from moe_kernels.triton._replay import launch
from moe_kernels.triton._scaled_up import activates_in_product, activates_in_roles, project_up
from moe_kernels.triton._tiles import TileMap, build_tile_map, column_halves
from moe_kernels.triton._wgrad import gathered_weight_gradient, sum_rows, weight_gradient
from moe_kernels.triton.expert_activation import expert_activation
from moe_kernels.triton.fused_experts import check_bound, forward_outputs
from moe_kernels.triton.grouped_gemm import zero_tail
from moe_kernels.triton.permute import gathered_rows
from moe_kernels.triton.quantize import (
    Scaled,
    block_scales,
    magnitude,
    permute_quantize,
    quantize_rows,
    quantize_weights,
)
from moe_kernels.triton.scaled_grouped_gemm import (
    BLOCK,
    multiply_scaled_rows,
    scaled_config,
    without_roles,
)
from moe_kernels.triton.sort_by_expert import sort_and_map, sort_by_expert

FLOAT8 = torch.float8_e4m3fn
TILE = 2048  # activations of a program


@triton.jit
def _load_halves(
    h, row, block, valid, I, W,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gate and up of a block of activations, in float32; the same twice without a gate."""
    if INTERLEAVED:
        wide = 2 * block * BLOCK + tl.arange(0, 2 * BLOCK)
        mask = valid[:, None] & (wide < W)[None, :]
        pairs = tl.load(h + row[:, None] * W + wide[None, :], mask=mask, other=0.0)
        gate, up = tl.split(tl.reshape(pairs.to(tl.float32), (BLOCK_R, BLOCK, 2)))
    else:
        column = block * BLOCK + tl.arange(0, BLOCK)
        mask = valid[:, None] & (column < I)[None, :]
        cell = h + row[:, None] * W + column[None, :]
        gate = tl.load(cell, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(cell + I, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _store_block(
    tile, row, column, inside, block, valid, rows, W, values, scales, BYTES: tl.constexpr
):
    """A block of W columns in float8, if there is such a block."""
    scale, reciprocal = block_scales(tl.max(magnitude(tile), 1), False)
    cell = values + row[:, None] * W + column[None, :]
    tl.store(cell, encode(tile * reciprocal[:, None], BYTES), mask=valid[:, None] & inside[None, :])
    exists = block * column.shape[0] < W
    tl.store(scales + block.to(tl.int64) * rows + row, scale, mask=valid & exists)


@triton.jit(do_not_specialize=["rows", "E"])
def _activate_quantize_kernel(
    h, offsets, values, scales, rows, I, W, E, alpha, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    PRECISE: tl.constexpr, BYTES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(1)
    valid = row < tl.minimum(tl.load(offsets + E), rows)
    gate, up = _load_halves(h, row, block, valid, I, W, GATED, INTERLEAVED, BLOCK_R, BLOCK)
    if GATED:
        value = activate_gated(gate, up, alpha, limit, KIND, CLAMP, PRECISE)
    else:
        value = activate(gate, KIND, PRECISE)
    column = block * BLOCK + tl.arange(0, BLOCK)
    value = value.to(h.dtype.element_ty).to(tl.float32)
    _store_block(value, row, column, column < I, block, valid, rows, I, values, scales, BYTES)


@triton.jit(do_not_specialize=["rows", "E"])
def _activate_quantize_backward_kernel(
    grad, h, row_weights, offsets, grad_h, values, scales, weighted_a, partials,
    rows, I, W, E, alpha, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    PRECISE: tl.constexpr, NEEDS_H: tl.constexpr, NEEDS_Q: tl.constexpr, NEEDS_A: tl.constexpr,
    NEEDS_S: tl.constexpr, BYTES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From dA' to dH, s * A and <dA', A> of a block of activations: see ``_through_activation``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(1)
    valid = row < tl.minimum(tl.load(offsets + E), rows)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    mask = valid[:, None] & inside[None, :]
    own = row[:, None] * I + column[None, :]
    g = tl.load(grad + own, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(row_weights + row, mask=valid, other=0.0)
    gate, up = _load_halves(h, row, block, valid, I, W, GATED, INTERLEAVED, BLOCK_R, BLOCK)
    scaled = g * weight[:, None]
    if GATED:
        a, grad_gate, grad_up = activate_gated_backward(
            scaled, gate, up, alpha, limit, KIND, CLAMP, PRECISE
        )
    else:
        a, grad_gate = activate_backward(scaled, gate, KIND, PRECISE)
        grad_up = grad_gate
    if NEEDS_S:
        tl.store(partials + block.to(tl.int64) * rows + row, tl.sum(g * a, 1), mask=valid)
    if NEEDS_A:
        value = (a * weight[:, None]).to(weighted_a.dtype.element_ty)
        tl.store(weighted_a + own, value, mask=mask)
    first, second = grad_gate, grad_up
    step = tl.cdiv(I, BLOCK)
    begin, next_begin, next_block = block * BLOCK, I + block * BLOCK, step + block
    first_end, second_end = I, W
    if INTERLEAVED:
        pairs = tl.reshape(tl.join(grad_gate, grad_up), (BLOCK_R, 2 * BLOCK))
        first, second = column_halves(pairs, BLOCK_R, 2 * BLOCK)
        begin, next_begin, next_block = 2 * block * BLOCK, (2 * block + 1) * BLOCK, 2 * block + 1
        first_end, block = W, 2 * block
    for half in tl.static_range(2 if GATED else 1):
        tile = (first if half == 0 else second).to(h.dtype.element_ty)
        place = (begin if half == 0 else next_begin) + tl.arange(0, BLOCK)
        within = place < (first_end if half == 0 else second_end)
        if NEEDS_H:
            cell = grad_h + row[:, None] * W + place[None, :]
            tl.store(cell, tile, mask=valid[:, None] & within[None, :])
        if NEEDS_Q:
            _store_block(
                tile.to(tl.float32), row, place, within, block if half == 0 else next_block, valid,
                rows, W, values, scales, BYTES,
            )  # fmt: skip


def _empty_scaled(like: Tensor, rows: int, columns: int) -> Scaled:
    values = like.new_empty(rows, columns, dtype=FLOAT8)
    scales = like.new_empty(ceil_div(columns, BLOCK.value), rows, dtype=torch.float32).t()
    return values, scales


def _float8(weight: Tensor, scales: Tensor | None) -> Scaled:
    """Stored contiguous along what is contracted, unless they are given."""
    if scales is not None:
        return weight, scales
    return quantize_weights(weight, FLOAT8, BLOCK.value, False, True)


def _aligned(x: Tensor, inner: int, columns: int) -> bool:
    """Whether fresh rows in float8 and results in x's dtype are."""
    return inner % 16 == 0 and columns * x.element_size() % 16 == 0


def _gather(x: Tensor, order: Order, rows: int) -> Scaled:
    return permute_quantize(x, *order, rows, FLOAT8, BLOCK.value, False)


def _activate(h: Tensor, offsets: Tensor, a: Scaled, act: Activation) -> None:
    """Write the activation of the first rows of ``h``, as many as ``a`` has, in float8."""
    (values, scales), block_r = a, TILE // BLOCK.value
    rows, inner = values.shape
    if values.numel():
        launch(
            _activate_quantize_kernel, (ceil_div(rows, block_r), scales.shape[1]),
            h, offsets, raw(values), scales, rows, inner, h.shape[1], offsets.numel() - 1,
            act.alpha, act.limit, **act.constants(h), BYTES=not has_float8(h.device),
            BLOCK_R=block_r, BLOCK=BLOCK.value,
        )  # fmt: skip


def _project_up(
    x: Scaled,
    w: Scaled,
    bias: Tensor | None,
    offsets: Tensor,
    h: Tensor,
    a: Scaled,
    act: Activation,
    tiles: TileMap,
    cut: Config,
) -> None:
    """Write the activation in float8, and ``h [num_rows, W]`` unless it has no rows.

    A product whose warps have roles goes through the activation if that is asked for. Else it saves
    more than it costs to read h again, 4RI bytes, where h is written anyway.
    """
    (rows, inner), keeps_h = a[0].shape, h.shape[0] > 0
    if activates_in_roles(act, x[0], w[0], h, inner, cut):
        from moe_kernels.triton import _hopper_scaled_up  # not every Triton has Gluon

        _hopper_scaled_up.project_up(x, w, bias, h, a, act, tiles, cut)
        if keeps_h:
            zero_tail(h, offsets)
        return
    in_roles = keeps_h and has_hopper_scaled(cut, w[0], x[0], h[:rows])
    if not in_roles and activates_in_product(act, h, inner, without_roles(cut)):
        project_up(x, w, bias, offsets, h, a, act, tiles, without_roles(cut))
    elif inner:
        h = h if keeps_h else h.new_empty(rows, h.shape[1])
        multiply_scaled_rows(x, w, bias, h, tiles, cut)
        _activate(h, offsets, a, act)
        if keeps_h:
            zero_tail(h, offsets)


def _activate_backward(
    grad: Tensor,
    h: Tensor,
    row_weights: Tensor,
    offsets: Tensor,
    act: Activation,
    grad_h: Tensor | None,
    quantized: Scaled | None,
    weighted_a: Tensor | None,
    partials: Tensor | None,
) -> None:
    """Write those of the results that are given, of the rows of ``grad [rows, I]``."""
    rows, inner = grad.shape
    if grad.numel() == 0:
        return
    block_r = TILE // BLOCK.value
    values, scales = (None, None) if quantized is None else (raw(quantized[0]), quantized[1])
    launch(
        _activate_quantize_backward_kernel, (ceil_div(rows, block_r), ceil_div(inner, BLOCK.value)),
        grad, h, row_weights, offsets, grad_h, values, scales, weighted_a, partials,
        rows, inner, h.shape[1], offsets.numel() - 1, act.alpha, act.limit, **act.constants(h),
        NEEDS_H=grad_h is not None, NEEDS_Q=quantized is not None,
        NEEDS_A=weighted_a is not None, NEEDS_S=partials is not None,
        BYTES=not has_float8(h.device), BLOCK_R=block_r, BLOCK=BLOCK.value,
    )  # fmt: skip


def _multiply_and_sum(
    a: Scaled,
    b: Scaled,
    bias: Tensor | None,
    order: Order,
    weights: Tensor | None,
    out: Tensor,
    tiles: TileMap,
    cut: Config,
) -> None:
    """``out[t]``, the (weighted) sum over the token's rows r of ``a[r] @ b[e] + bias[e]``."""
    rows = a[0].shape[0]

    def multiply(chunk: slice, part: Tensor) -> None:
        # chunks start at multiples of 256: at a block's first column
        blocks = slice(chunk.start // BLOCK.value, ceil_div(chunk.stop, BLOCK.value))
        shift = None if bias is None else bias[:, chunk]
        columns = b[0][:, :, chunk], b[1][:, :, blocks]
        multiply_scaled_rows(a, columns, shift, part, tiles, cut)

    width = chunk_width(rows, out.shape[1], out.element_size())
    sum_products(multiply, rows, order, weights, out, width)


def fused_experts_fp8(
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
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    owns_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    refuse_float64("fused_experts", "x", x)
    (E, H, W), inner = gate_up.shape, down.shape[1]
    act = Activation(activation, interleaved, alpha, limit)
    rows = min(num_rows, topk_ids.numel())
    h = x.new_empty(num_rows if save_for_backward else 0, W)
    if rows == 0 or E == 0 or H == 0:
        order = sort_by_expert(topk_ids, E, "fused_experts")
        check_bound(order[2], num_rows)
        y = x.new_zeros(x.shape)
        h.zero_()
    else:
        y = x.new_empty(x.shape)
        with on_device_of(x):
            w = _float8(gate_up, gate_up_scales)
            cut = scaled_config(w[0], rows, aligned=_aligned(x, H, W))
            order, tiles = sort_and_map(topk_ids, E, rows, cut.block_m, "fused_experts")
            check_bound(order[2], num_rows)
            r = _gather(x, order, rows)
            a = _empty_scaled(x, rows, inner)
            _project_up(r, w, gate_up_bias, order[2], h, a, act, tiles, cut)
            del r, w  # before there are others
            w = _float8(down, down_scales)
            cut_down = scaled_config(w[0], rows, aligned=_aligned(x, inner, H))
            if cut_down.block_m != cut.block_m:
                tiles = build_tile_map(order[2], rows, cut_down.block_m)
            _multiply_and_sum(a, w, down_bias, order, topk_weights, y, tiles, cut_down)
    return forward_outputs(y, h, order, save_for_backward)


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
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    *,
    overwrites: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    refuse_float64("fused_experts", "x", x)
    grad, x = contiguous_rows(grad), contiguous_rows(x)
    order = (row_to_slot, slot_to_row, offsets)
    act = Activation(activation, interleaved, alpha, limit)
    grads = empty_gradients(needs, x, gate_up, down, topk_weights, gate_up_bias, down_bias)
    dx, dgate_up, ddown, dweights, dbias, ddown_bias = grads
    (E, inner, H), R, W = down.shape, row_to_slot.numel(), h.shape[1]
    rows = min(h.shape[0], R)
    known, dh = known_grad_h is not None, known_grad_h
    # a half that begins within a block is quantised when it is whole
    at_once = needs[0] and not known and (interleaved or not act.gated or inner % BLOCK.value == 0)
    if overwrites:
        dh = h
    elif not known and (needs[1] or needs[4] or keep_grad_h or (needs[0] and not at_once)):
        dh = h.new_empty(h.shape)
    kept = given_back(dh, known_grad_h) if keep_grad_h else x.new_empty(0)
    kept_a = x.new_empty((h.shape[0], inner) if keep_weighted_a else 0)
    if rows == 0 or E == 0:
        for value in (*grads, kept, kept_a):
            value.zero_()
        return grads, kept, kept_a
    through = needs[3] or at_once or (dh is not None and not known)
    weighted_a = kept_a[:rows] if keep_weighted_a else None
    if through and needs[2] and weighted_a is None:
        weighted_a = h.new_empty(rows, inner)
    dq: Scaled | None = None
    with on_device_of(x):
        block_m = BLOCK.value
        if through:
            w = _float8(down.mT, None if down_scales is None else down_scales.mT)
            cut = scaled_config(w[0], rows, aligned=_aligned(x, H, inner))
            block_m = cut.block_m
        row_weights, tiles = prepare(topk_weights, order, rows, block_m)
        if through:
            g, da = _gather(grad, order, rows), h.new_empty(rows, inner)
            if inner:
                multiply_scaled_rows(g, w, None, da, tiles, cut)
            del g, w
            dq = _empty_scaled(h, rows, W) if at_once else None
            parts = ceil_div(inner, BLOCK.value)
            all_parts = parts + (down_bias is not None)
            partials = row_weights.new_empty(all_parts, rows) if needs[3] else None
            own = None if known else dh
            _activate_backward(da, h, row_weights, offsets, act, own, dq, weighted_a, partials)
            del da
            if partials is not None:
                if down_bias is not None:
                    source = Source(row_to_slot, topk_weights.shape[1])
                    bias_dots(grad, source, down_bias, partials[parts], tiles, block_m)
                sum_partials(partials, row_to_slot, offsets, dweights)
            del partials
        elif needs[2] or keep_weighted_a:
            options = (interleaved, alpha, limit)
            weighted_a = expert_activation(h[:rows], activation, row_weights, *options)
            if keep_weighted_a:
                kept_a[:rows] = weighted_a
        if needs[2] or needs[5]:
            grad_rows, grad_source = gathered_rows(grad, order, rows)
            if needs[2] and weighted_a is not None:
                weight_gradient(weighted_a, None, grad_rows, grad_source, offsets, rows, ddown)
            if needs[5]:
                sum_rows(grad_rows, grad_source, row_weights, offsets, rows, ddown_bias)
            del grad_rows, grad_source  # perhaps a copy
        del weighted_a
        if needs[1] and dh is not None:
            gathered_weight_gradient(x, dh, order, rows, dgate_up)
        if needs[4] and dh is not None:
            sum_rows(dh, None, None, offsets, rows, dbias)
        if needs[0]:
            if dq is None and dh is not None:
                dq = quantize_rows(dh[:rows], FLOAT8, BLOCK.value, False)
            assert dq is not None
            w = _float8(gate_up.mT, None if gate_up_scales is None else gate_up_scales.mT)
            last = scaled_config(w[0], rows, aligned=_aligned(x, W, H))
            if last.block_m != block_m:
                tiles = build_tile_map(offsets, rows, last.block_m)
            _multiply_and_sum(dq, w, None, order, None, dx, tiles, last)
    return grads, kept, kept_a


def fused_experts_fp8_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, grad_h, weighted_a = _gradients(*args)
    return (*grads, grad_h, weighted_a)


def fused_experts_fp8_backward_(*args: Any) -> tuple[Tensor, ...]:
    all_args = [*args[:16], None, False, *args[16:]]
    grads, _, weighted_a = _gradients(*all_args, overwrites=True)
    return (*grads, weighted_a)
