"""Products of row groups with their expert's matrix, and the gradients of that product.

R rows, E experts, Kd contracted size, N columns.

Programs are persistent: each walks tiles of a map that is built on the device, all column tiles of
a few row tiles before the next, so that an expert's weights and the rows are found in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._configs import Config, config
from moe_kernels.triton._launch import (
    ceil_div,
    checks_values,
    dot_precision,
    on_device_of,
    processors,
    refuse_float64,
    with_scratch,
)
from moe_kernels.triton._operands import (
    TMA_IN_KERNEL,
    TMA_TRANSPOSED,
    bias_operand,
    described_in_kernel,
    has_hopper_gemm,
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
    load_tile,
    tile_count,
    walk,
)
from moe_kernels.triton._wgrad import empty_like_weight, sum_rows, weight_gradient


@triton.jit
def store_tile(
    total, bias, out, expert, first, valid, n, N, stride_bias_e, stride_bias_n,
    BIASED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STORED: tl.constexpr = True,
):  # fmt: skip
    """Write sums of the rows from ``first`` and the columns from ``n`` on, with the expert's bias.

    Returns what was written, in out's dtype; without STORED that is all.
    """
    column = n + tl.arange(0, BLOCK_N)
    if BIASED:
        shift = bias + expert.to(tl.int64) * stride_bias_e + column * stride_bias_n
        total += tl.load(shift, mask=column < N, other=0.0).to(tl.float32)[None, :]
    rounded = total.to(out.dtype.element_ty)
    if STORED:
        # rows are addressed with 32 bits from the tile's first
        tl.store(
            out + first.to(tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + column[None, :]),
            rounded,
            mask=valid[:, None] & (column < N)[None, :],
        )
    return rounded


@triton.jit(do_not_specialize=["bound", "rows"])
def _grouped_gemm_kernel(
    a, b, bias, out, tiles, bound, rows, N, Kd,
    stride_am, stride_ak, stride_be, stride_bk, stride_bn, stride_bias_e, stride_bias_n,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, BIASED: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tile_count(tiles), tl.cdiv(N, BLOCK_N)
    if A_MODE == TMA_IN_KERNEL:
        a = tl.make_tensor_descriptor(a, [rows, Kd], [stride_am, 1], [BLOCK_M, BLOCK_K])
    for step in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0),
        warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        tile, column_tile = walk(step, row_tiles, column_tiles, GROUP_M)
        expert, first, end = load_tile(tiles, bound, tile)
        n = column_tile * BLOCK_N
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        valid = row < end
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, Kd, BLOCK_K, num_stages=STAGES):
            x = load_rows(
                a, first, row, valid, k, Kd, stride_am, stride_ak, A_MODE, EVEN_K, BLOCK_K
            )
            w = load_weight(
                b, expert, k, n, Kd, N, stride_be, stride_bk, stride_bn,
                B_MODE, False, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            total = tl.dot(x, w, total, input_precision=PRECISION)
        store_tile(
            total, bias, out, expert, first, valid, n, N, stride_bias_e, stride_bias_n,
            BIASED, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def zero_rows(
    out, offsets, R, N, E, begin, end, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Zero a program's part of the rows of no expert, the columns from ``begin`` to ``end``."""
    used = tl.minimum(tl.maximum(tl.load(offsets + E), 0), R)
    for first in range(used + tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        for n in range(begin, end, BLOCK_N):
            column = n + tl.arange(0, BLOCK_N)
            tl.store(
                out + row[:, None] * N + column[None, :],
                tl.zeros((BLOCK_R, BLOCK_N), out.dtype.element_ty),
                mask=(row < R)[:, None] & (column < end)[None, :],
            )


@triton.jit(do_not_specialize=["R", "E"])
def _zero_tail_kernel(out, offsets, R, N, E, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    begin = tl.program_id(1) * BLOCK_N
    zero_rows(out, offsets, R, N, E, begin, tl.minimum(begin + BLOCK_N, N), BLOCK_R, BLOCK_N)


def zero_tail(out: Tensor, offsets: Tensor) -> None:
    """Zero the rows of ``out [R, N]`` from ``offsets[E]`` on."""
    R, N = out.shape
    if out.numel():
        launch(
            _zero_tail_kernel, (min(ceil_div(R, 16), 64), ceil_div(N, 256)),
            out, offsets, R, N, offsets.numel() - 1, BLOCK_R=16, BLOCK_N=256,
        )  # fmt: skip


def multiply_rows(
    a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, tiles: TileMap, cut: Config
) -> None:
    """Write ``out[r] = a[r] @ b[e] + bias[e]``, contiguous, for the rows of the map."""
    Kd, N = b.shape[1:]
    x = row_operand(a, None, cut.block_m, cut.block_k)
    w = weight_operand(b, cut.block_k, cut.block_n)
    if has_hopper_gemm(cut, w, x, out):
        from moe_kernels.triton import _hopper_gemm  # not every Triton has Gluon

        transposed = w.mode == TMA_TRANSPOSED.value
        _hopper_gemm.multiply_rows(a, b, bias, out, tiles, cut, transposed=transposed)
        return
    specialize = specializes("grouped_gemm", cut, w, x)
    if specialize:
        x = described_in_kernel(a)
    steps = tiles.bound * ceil_div(N, cut.block_n)
    shift, strides = bias_operand(bias)

    def multiply() -> None:
        launch(
            _grouped_gemm_kernel, (min(steps, processors(a.device) * cut.programs),),
            x.value, w.value, shift, out, tiles.tiles, tiles.bound, a.shape[0], N, Kd, *x.strides,
            *w.strides, *strides,
            A_MODE=x.mode, B_MODE=w.mode, BIASED=bias is not None, EVEN_K=Kd % cut.block_k == 0,
            PRECISION=dot_precision(a), BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
            BLOCK_K=cut.block_k, GROUP_M=cut.group_m, STAGES=pipeline_stages(cut.stages, x, w),
            SPECIALIZE=specialize, num_warps=cut.warps,
        )  # fmt: skip

    if specialize:
        with_scratch(a.device, multiply)
    else:
        multiply()


def check_offsets(offsets: Tensor, rows: int) -> None:
    """Synchronises: raise ValueError unless offsets rise from 0 to at most ``rows``."""
    ends = offsets.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > rows:
        raise ValueError(
            f"grouped_gemm: offsets must rise from 0 to at most a.shape[0] = {rows}; got {ends}"
        )


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    refuse_float64("grouped_gemm", "a", a)
    R, (E, _, N) = a.shape[0], b.shape
    if checks_values():
        check_offsets(offsets, R)
    offsets = offsets.contiguous()
    out = a.new_empty(R, N, dtype=out_dtype or a.dtype)
    if out.numel() == 0:
        return out
    if E == 0:
        return out.zero_()
    aligned = is_aligned(a, out) and weight_is_aligned(b)
    cut = config("grouped_gemm", a, R, E, aligned=aligned, inner=min(b.shape[1:]))
    with on_device_of(a):
        multiply_rows(a, b, bias, out, build_tile_map(offsets, R, cut.block_m), cut)
        zero_tail(out, offsets)
    return out


def grouped_gemm_wgrad(
    a: Tensor, grad: Tensor, offsets: Tensor, out_dtype: torch.dtype, transposed: bool
) -> Tensor:
    refuse_float64("grouped_gemm_wgrad", "a", a)
    if checks_values():
        check_offsets(offsets, a.shape[0])
    shape = (offsets.numel() - 1, a.shape[1], grad.shape[1])
    out = empty_like_weight(a, *shape, out_dtype, transposed=transposed)
    with on_device_of(a):
        weight_gradient(a, None, grad, None, offsets.contiguous(), a.shape[0], out)
    return out


def grouped_gemm_wgrad_(out: Tensor, a: Tensor, grad: Tensor, offsets: Tensor) -> None:
    refuse_float64("grouped_gemm_wgrad", "a", a)
    if checks_values():
        check_offsets(offsets, a.shape[0])
    with on_device_of(a):
        weight_gradient(a, None, grad, None, offsets.contiguous(), a.shape[0], out, accumulate=True)


def grouped_gemm_dbias(grad: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    if checks_values():
        check_offsets(offsets, grad.shape[0])
    out = grad.new_empty(offsets.numel() - 1, grad.shape[1], dtype=out_dtype)
    with on_device_of(grad):
        sum_rows(grad, None, None, offsets.contiguous(), grad.shape[0], out)
    return out
