"""Token permutation: rows grouped by expert.

T tokens, K experts a token, R = T * K slots, H hidden size, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._fp8 import raw
from moe_kernels.triton._launch import (
    ceil_div,
    next_power_of_2,
    on_device_of,
    pipelines_pointer_loads,
)
from moe_kernels.triton._operands import Source

TILE = 4096  # elements a program copies


@triton.jit(do_not_specialize=["num_rows", "R", "E", "top_k"])
def _permute_kernel(
    x, row_to_slot, offsets, out, num_rows, R, H, E, top_k, stride_t, stride_h,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = tl.minimum(tl.load(offsets + E), R)
    slot = tl.load(row_to_slot + row, mask=row < used, other=-1)
    valid = (slot >= 0) & (slot < R)
    token = (slot // top_k).to(tl.int64)
    inside = (column < H)[None, :]
    tile = tl.load(
        x + token[:, None] * stride_t + column[None, :].to(tl.int64) * stride_h,
        mask=valid[:, None] & inside,
        other=0.0,
    )
    tl.store(
        out + row[:, None] * H + column[None, :], tile, mask=(row < num_rows)[:, None] & inside
    )


def copy_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of the tile a program copies, for rows of ``columns`` elements."""
    block_columns = min(next_power_of_2(columns), 512)
    return TILE // max(block_columns, 32), block_columns


def gathered_rows(
    x: Tensor, order: tuple[Tensor, Tensor, Tensor], rows: int
) -> tuple[Tensor, Source | None]:
    """What a GEMM multiplies for ``rows`` rows gathered from ``x [T, H]``.

    ``x`` and the source of its rows; or the rows, gathered, where the GEMM cannot pipeline loads by
    pointer (see :func:`pipelines_pointer_loads`) but can load the copy by TMA.
    """
    if pipelines_pointer_loads(x.device) or x.shape[1] * x.element_size() % 16:
        return x, Source(order[0], order[1].shape[1])
    return permute(x, *order, rows), None


def permute(
    x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, offsets: Tensor, num_rows: int
) -> Tensor:
    H = x.shape[1]
    out = x.new_empty(num_rows, H)
    if out.numel() == 0:
        return out
    if row_to_slot.numel() == 0:
        return out.zero_()
    block_r, block_h = copy_tile(H)
    with on_device_of(x):
        _permute_kernel[(ceil_div(num_rows, block_r), ceil_div(H, block_h))](
            raw(x), row_to_slot, offsets, raw(out), num_rows, row_to_slot.numel(), H,
            offsets.numel() - 1, slot_to_row.shape[1], *x.stride(),
            BLOCK_R=block_r, BLOCK_H=block_h, num_warps=8 if x.element_size() == 1 else 4,
        )  # fmt: skip
    return out
