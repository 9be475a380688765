"""Token permutation undone: each token's rows weighted and summed.

T tokens, K experts a token, R = T * K slots, H hidden size, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import ceil_div, float_type, next_power_of_2, on_device_of
from moe_kernels.triton._replay import launch
from moe_kernels.triton.permute import UNROLLED, copy_tile, load_rows_of

SPREAD = 128  # programs beside one another that sum a few tokens


@triton.jit(do_not_specialize=["num_rows", "T", "E", "top_k"])
def _unpermute_kernel(
    rows, slot_to_row, offsets, weights, out, num_rows, T, H, E, top_k,
    stride_r, stride_h, stride_wt, stride_wk, stride_o,
    WEIGHTED: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = tl.minimum(tl.load(offsets + E), num_rows)
    inside = (column < H)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), WIDE)
    for first in range(0, top_k, UNROLLED):
        for i in tl.static_range(UNROLLED):
            k = first + i
            row, valid = load_rows_of(slot_to_row, token, k, used, T, top_k)
            tile = tl.load(
                rows + row[:, None] * stride_r + column[None, :] * stride_h,
                mask=valid[:, None] & inside,
                other=0.0,
            ).to(WIDE)
            if WEIGHTED:
                weight = tl.load(weights + token * stride_wt + k * stride_wk, mask=valid, other=0.0)
                tile *= weight.to(WIDE)[:, None]
            total += tile
    tl.store(
        out + token[:, None] * stride_o + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(token < T)[:, None] & inside,
    )


@triton.jit(do_not_specialize=["num_rows", "R", "E", "top_k"])
def _unpermute_backward_kernel(
    grad, rows, row_to_slot, offsets, weights, grad_rows, grad_weights, num_rows, R, H, E, top_k,
    stride_gt, stride_gh, stride_r, stride_h,
    NEEDS_ROWS: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Every row of row_to_slot, the dropped at its tail too, so that all gradients are written."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    used = tl.minimum(tl.minimum(tl.load(offsets + E), num_rows), R)
    slot = tl.load(row_to_slot + row, mask=row < R, other=-1)
    sane = (slot >= 0) & (slot < R)
    valid = sane & (row < used)
    token = (slot // top_k).to(tl.int64)
    if NEEDS_ROWS:
        weight = tl.load(weights + slot, mask=valid, other=0.0).to(WIDE)
    dot = tl.zeros((BLOCK_R,), WIDE)
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H).to(tl.int64)
        inside = (column < H)[None, :]
        g = tl.load(
            grad + token[:, None] * stride_gt + column[None, :] * stride_gh,
            mask=valid[:, None] & inside,
            other=0.0,
        ).to(WIDE)
        if NEEDS_ROWS:
            tl.store(
                grad_rows + row[:, None] * H + column[None, :],
                (g * weight[:, None]).to(grad_rows.dtype.element_ty),
                mask=(row < num_rows)[:, None] & inside,
            )
        if NEEDS_WEIGHTS:
            value = tl.load(
                rows + row[:, None] * stride_r + column[None, :] * stride_h,
                mask=valid[:, None] & inside,
                other=0.0,
            )
            dot += tl.sum(g * value.to(WIDE), 1)
    if NEEDS_WEIGHTS:
        tl.store(grad_weights + slot, dot.to(grad_weights.dtype.element_ty), mask=sane)


def sum_slots(
    rows: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``out [T, H]``, of contiguous rows; see :func:`unpermute`."""
    (T, K), (num_rows, H) = slot_to_row.shape, rows.shape
    if out.numel() == 0:
        return
    block_t, block_h = copy_tile(H)
    if rows.element_size() == 8:
        block_t = max(1, block_t // 4)  # what is loaded ahead stays in registers
    # a few tokens are summed by as many programs as there can be, since each waits for memory
    block_t = min(block_t, max(1, next_power_of_2(T) // SPREAD))
    with on_device_of(rows):
        launch(
            _unpermute_kernel, (ceil_div(T, block_t), ceil_div(H, block_h)),
            rows, slot_to_row, offsets, weights, out, num_rows, T, H, offsets.numel() - 1, K,
            *rows.stride(), *(weights.stride() if weights is not None else (0, 0)), out.stride(0),
            WEIGHTED=weights is not None, WIDE=float_type(rows), BLOCK_T=block_t, BLOCK_H=block_h,
        )  # fmt: skip


def unpermute(
    rows: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
) -> Tensor:
    out = rows.new_empty(slot_to_row.shape[0], rows.shape[1])
    sum_slots(rows, row_to_slot, slot_to_row, offsets, weights, out)
    return out


def unpermute_backward(
    grad: Tensor,
    rows: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    weights: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    num_rows, H = rows.shape
    R, K = row_to_slot.numel(), slot_to_row.shape[1]
    grad_rows = rows.new_empty(rows.shape if needs[0] else (0,))
    grad_weights = weights.new_empty(weights.shape) if needs[1] else grad.new_empty(0)
    if R == 0 or H == 0:
        return grad_rows.zero_(), grad_weights.zero_()
    launched = max(R if needs[1] else 0, num_rows if needs[0] else 0)
    if launched:
        block_h = min(next_power_of_2(H), 512)
        block_r = 2048 // max(block_h, 64)
        with on_device_of(rows):
            launch(
                _unpermute_backward_kernel, (ceil_div(launched, block_r),),
                grad, rows, row_to_slot, offsets, weights.contiguous(), grad_rows, grad_weights,
                num_rows, R, H, offsets.numel() - 1, K, *grad.stride(), *rows.stride(),
                NEEDS_ROWS=needs[0], NEEDS_WEIGHTS=needs[1], WIDE=float_type(rows),
                BLOCK_R=block_r, BLOCK_H=block_h,
            )  # fmt: skip
    return grad_rows, grad_weights
