"""Sums over each expert's rows: of outer products, for its weights, and of rows, for its bias.

R rows, E experts; a weight is [M, N]. The rows of one operand may be gathered: see ``Source``.

A product contracts an expert's rows, however many they are; rows past its last must count as zero
in both operands, since 0 * NaN is not 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._configs import Config, config
from moe_kernels.triton._launch import (
    ceil_div,
    dot_precision,
    float_type,
    next_power_of_2,
    processors,
)
from moe_kernels.triton._operands import (
    LARGEST_STRIDE,
    Source,
    has_hopper_wgrad,
    is_aligned,
    load_ragged_rows,
    pipeline_stages,
    ragged_operand,
)
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import column_halves, row_range
from moe_kernels.triton.permute import gathered_rows


@triton.jit
def _source_rows(source, row, end, top_k, GATHERED: tl.constexpr):
    """The rows to read, -1 past the end."""
    if GATHERED:
        slot = tl.load(source + row, mask=row < end, other=-1)
        # truncation would take -1 to row 0
        found = tl.where(slot < 0, -1, slot // top_k).to(tl.int64)
    else:
        found = tl.where(row < end, row, -1).to(tl.int64)
    return found


@triton.jit
def _write(
    tile, out, m, n, M, N, stride_m, stride_n,
    ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cell = out + m.to(tl.int64) * stride_m + n.to(tl.int64) * stride_n
    cell += i[:, None] * stride_m + j[None, :] * stride_n
    inside = (m + i < M)[:, None] & (n + j < N)[None, :]
    if ACCUMULATE:
        before = tl.load(cell, mask=inside, other=0.0)
        tl.store(cell, before + tile.to(before.dtype), mask=inside)
    else:
        tl.store(cell, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "E", "top_k"])
def _wgrad_kernel(
    a, grad, source, out, offsets, R, E, M, N, top_k,
    stride_am, stride_ac, stride_gm, stride_gc, stride_oe, stride_om, stride_on,
    A_MODE: tl.constexpr, A_GATHERED: tl.constexpr, G_MODE: tl.constexpr, G_GATHERED: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for step in tl.range(tl.program_id(0), E * tiles_m * tiles_n, tl.num_programs(0)):
        expert = step // (tiles_m * tiles_n)
        within = step % (tiles_m * tiles_n)
        m, n = (within // tiles_n) * BLOCK_M, (within % tiles_n) * BLOCK_N
        begin, end = row_range(offsets, expert, True, R)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in tl.range(begin, end, BLOCK_R, num_stages=STAGES):
            row = r + tl.arange(0, BLOCK_R)
            x = load_ragged_rows(
                a, begin, end, r, _source_rows(source, row, end, top_k, A_GATHERED), m, M,
                stride_am, stride_ac, A_MODE, BLOCK_M,
            )  # fmt: skip
            g = load_ragged_rows(
                grad, begin, end, r, _source_rows(source, row, end, top_k, G_GATHERED), n, N,
                stride_gm, stride_gc, G_MODE, BLOCK_N,
            )  # fmt: skip
            total = tl.dot(tl.trans(x), g, total, input_precision=PRECISION)
        first = out + expert.to(tl.int64) * stride_oe
        if ACCUMULATE:
            # a quarter at a time: what was there before takes as many registers as the sum
            left, right = column_halves(total, BLOCK_M, BLOCK_N)
            for half in tl.static_range(2):
                pair = column_halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
                for quarter in tl.static_range(2):
                    _write(
                        pair[quarter], first, m, n + (2 * half + quarter) * (BLOCK_N // 4), M, N,
                        stride_om, stride_on, True, BLOCK_M, BLOCK_N // 4,
                    )  # fmt: skip
        else:
            _write(total, first, m, n, M, N, stride_om, stride_on, False, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["R", "top_k"])
def _sum_rows_kernel(
    grad, source, scale, out, offsets, R, N, top_k, stride_r, stride_c,
    GATHERED: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = row_range(offsets, expert, True, R)
    total = tl.zeros((BLOCK_R, BLOCK_N), WIDE)
    for r in range(begin, end, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        found = _source_rows(source, row, end, top_k, GATHERED)
        tile = tl.load(
            grad + found[:, None] * stride_r + column[None, :] * stride_c,
            mask=(found >= 0)[:, None] & (column < N)[None, :],
            other=0.0,
        ).to(WIDE)
        if SCALED:
            tile *= tl.load(scale + row, mask=row < end, other=0.0).to(WIDE)[:, None]
        total += tile
    tl.store(
        out + expert.to(tl.int64) * N + column,
        tl.sum(total, 0).to(out.dtype.element_ty),
        mask=column < N,
    )


def _is_transposed(out: Tensor) -> bool:
    return out.stride(1) == 1 and out.stride(2) != 1


def _config(a: Tensor, grad: Tensor, rows: int, out: Tensor) -> Config:
    E, M, N = out.shape
    return config("wgrad", a, rows, E, aligned=is_aligned(out, a, grad), inner=min(M, N))


def weight_gradient(
    a: Tensor,
    a_source: Source | None,
    grad: Tensor,
    grad_source: Source | None,
    offsets: Tensor,
    rows: int,
    out: Tensor,
    *,
    accumulate: bool = False,
    cut: Config | None = None,
) -> None:
    """``out[e] (+)= a[rows of e].T @ grad[rows of e]``, over the first ``rows`` rows.

    Args:
        a: [R, M], or [T, M] if gathered.
        grad: [R, N], or [T, N] if gathered.
        offsets: [E + 1], contiguous.
        out: [E, M, N], any strides.
        cut: instead of the configuration that the call would get.
    """
    if max(out.stride()[1:]) >= LARGEST_STRIDE:
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        weight_gradient(a, a_source, grad, grad_source, offsets, rows, dense, cut=cut)
        (out.add_ if accumulate else out.copy_)(dense)
        return
    if _is_transposed(out):  # write rows of the transposed product
        a, a_source, grad, grad_source = grad, grad_source, a, a_source
        out = out.mT
    E, M, N = out.shape
    if out.numel() == 0:
        return
    if rows == 0:
        if not accumulate:
            out.zero_()
        return
    cut = cut or _config(a, grad, rows, out)
    if has_hopper_wgrad(cut, a, a_source, grad, grad_source, out, accumulate=accumulate):
        from moe_kernels.triton import _hopper_wgrad  # only where it is asked for

        _hopper_wgrad.sum_products(
            a, a_source, grad, grad_source, offsets, rows, out, cut, accumulate=accumulate
        )
        return
    x = ragged_operand(a, a_source, cut.block_k, cut.block_m)
    g = ragged_operand(grad, grad_source, cut.block_k, cut.block_n)
    source = a_source or grad_source
    steps = E * ceil_div(M, cut.block_m) * ceil_div(N, cut.block_n)
    launch(
        _wgrad_kernel, (min(steps, processors(a.device) * cut.programs),),
        x.value, g.value, None if source is None else source.row_to_slot, out, offsets,
        rows, E, M, N, 1 if source is None else source.top_k,
        *x.strides, *g.strides, *out.stride(),
        A_MODE=x.mode, A_GATHERED=a_source is not None,
        G_MODE=g.mode, G_GATHERED=grad_source is not None,
        ACCUMULATE=accumulate, PRECISION=dot_precision(a), BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n, BLOCK_R=cut.block_k, STAGES=pipeline_stages(cut.stages, x, g),
        num_warps=cut.warps,
    )  # fmt: skip


def gathered_weight_gradient(
    x: Tensor,
    grad: Tensor,
    order: tuple[Tensor, Tensor, Tensor],
    rows: int,
    out: Tensor,
    *,
    accumulate: bool = False,
    cut: Config | None = None,
) -> None:
    """:func:`weight_gradient` of rows that are gathered from ``x [T, M]``."""
    added, source = rows_to_add(x, grad, order, rows, out, accumulate=accumulate, cut=cut)
    weight_gradient(added, source, grad, None, order[2], rows, out, accumulate=accumulate, cut=cut)


def rows_to_add(
    x: Tensor,
    grad: Tensor,
    order: tuple[Tensor, Tensor, Tensor],
    rows: int,
    out: Tensor,
    *,
    accumulate: bool = False,
    cut: Config | None = None,
) -> tuple[Tensor, Source | None]:
    """What :func:`weight_gradient` takes for rows that are gathered from ``x [T, M]``.

    ``x`` itself where the kernel that adds them up is one in Gluon; else :func:`gathered_rows`.
    """
    source = Source(order[0], order[1].shape[1])
    if _gathers(x, source, grad, rows, out, accumulate, cut):
        return x, source
    return gathered_rows(x, order, rows)


def _gathers(
    x: Tensor, source: Source | None, grad: Tensor, rows: int, out: Tensor, accumulate: bool,
    cut: Config | None,
) -> bool:  # fmt: skip
    if rows == 0 or out.numel() == 0:
        return True
    if _is_transposed(out):
        cut = cut or _config(grad, x, rows, out.mT)
        return has_hopper_wgrad(cut, grad, None, x, source, out.mT, accumulate=accumulate)
    cut = cut or _config(x, grad, rows, out)
    return has_hopper_wgrad(cut, x, source, grad, None, out, accumulate=accumulate)


def sum_rows(
    grad: Tensor,
    source: Source | None,
    scale: Tensor | None,
    offsets: Tensor,
    rows: int,
    out: Tensor,
) -> None:
    """``out[e] = sum of scale[r] * grad[r] over e's rows``, of the first ``rows``.

    Args:
        grad: [R, N], or [T, N] if gathered.
        scale: [R], contiguous, or None for ones.
        offsets: [E + 1], contiguous.
        out: [E, N], contiguous.
    """
    E, N = out.shape
    if out.numel() == 0:
        return
    block_n = min(next_power_of_2(N), 64)
    launch(
        _sum_rows_kernel, (E, ceil_div(N, block_n)),
        grad, None if source is None else source.row_to_slot, scale, out, offsets, rows, N,
        1 if source is None else source.top_k, *grad.stride(),
        GATHERED=source is not None, SCALED=scale is not None, WIDE=float_type(grad),
        BLOCK_R=64, BLOCK_N=block_n,
    )  # fmt: skip


def empty_like_weight(
    like: Tensor, experts: int, rows: int, columns: int, dtype: torch.dtype, *, transposed: bool
) -> Tensor:
    """An empty [experts, rows, columns], stored with the last two swapped if ``transposed``."""
    if transposed:
        return like.new_empty((experts, columns, rows), dtype=dtype).mT
    return like.new_empty((experts, rows, columns), dtype=dtype)
