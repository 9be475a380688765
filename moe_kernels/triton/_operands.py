"""How a GEMM's tiles are loaded: by TMA where the layout allows it, else by masked pointers.

R rows, E experts, Kd contracted size, N columns. TMA fills with zeros past the end of each
dimension, so that sizes need no alignment; strides and the base address must be multiples of 16
bytes. A ragged descriptor also fills past the end of one expert's rows.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.triton._config_tables import GLUON, Config, suits_gluon
from moe_kernels.triton._launch import (
    INTERPRETED,
    TRITON_VERSION,
    architecture,
    is_known,
    pipelines_pointer_loads,
)

POINTER = tl.constexpr(0)
TMA = tl.constexpr(1)
TMA_TRANSPOSED = tl.constexpr(2)
# rows by TMA, whose descriptor the kernel makes; see described_in_kernel
TMA_IN_KERNEL = tl.constexpr(3)


class Source(NamedTuple):
    """Gathered rows: row r is row ``row_to_slot[r] // top_k`` of the tensor, its slot's token."""

    row_to_slot: Tensor
    top_k: int


# a column is addressed with 32 bits from the start of its tile
LARGEST_STRIDE = 2**22


class Operand(NamedTuple):
    """A tensor or its descriptor, how it is loaded (one of the modes above), and the strides that
    pointers need."""

    value: Any
    mode: int
    strides: tuple[int, ...]


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all tensors' rows, contiguous, start at multiples of 16 bytes, as TMA asks."""
    return all(_is_aligned(tensor) for tensor in tensors)


def _is_aligned(tensor: Tensor) -> bool:
    if 0 in tensor.shape or tensor.stride(-1) != 1:
        return False
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        extent == 1 or (stride > 0 and stride * size % 16 == 0)
        for extent, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    )


def _takes_tma(tensor: Tensor) -> bool:
    return architecture(tensor.device) >= 90 and is_aligned(tensor)


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if its rows are not contiguous: a copy costs less than loads so spread."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _by_tma(tensor: Tensor, block: list[int], mode: int) -> Operand:
    descriptor = TensorDescriptor(tensor, list(tensor.shape), tma_strides(tensor), block)
    return Operand(descriptor, mode, (0,) * min(tensor.dim(), 3))


def tma_strides(tensor: Tensor) -> list[int]:
    # the stride of a dimension of one is never used, but must be a multiple of 16 bytes
    step = 16 // tensor.element_size()
    extents = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return [*(step if extent == 1 else stride for extent, stride in extents), 1]


def by_pointer(tensor: Tensor) -> Operand:
    inner = tensor.stride()[-2:] if tensor.dim() == 3 else tensor.stride()[-1:]
    if max(inner) >= LARGEST_STRIDE:
        tensor = tensor.contiguous()
    return Operand(tensor, POINTER.value, tensor.stride())


def _halves_apart(b: Tensor) -> Tensor:
    """``b [E, Kd, 2 * N]`` as [E, Kd, 2, N]."""
    return b.unflatten(2, (2, b.shape[2] // 2))


def weight_is_aligned(b: Tensor, *, halves: bool = False) -> bool:
    """Whether :func:`weight_operand` finds the weights aligned, stored either way."""
    return is_aligned(b) or is_aligned(_halves_apart(b).movedim(1, 3) if halves else b.mT)


def row_operand(a: Tensor, source: Source | None, block_m: int, block_k: int) -> Operand:
    """``a [R, Kd]``, or [T, Kd] if gathered, read in tiles of rows."""
    if source is None and _takes_tma(a):
        return _by_tma(a, [block_m, block_k], TMA.value)
    return by_pointer(a)


def described_in_kernel(a: Tensor) -> Operand:
    """``a [R, Kd]``, aligned, of which the kernel makes the descriptor, in memory of its own.

    Where Triton gives warps roles it halves a tile between two groups of warps. It can halve the
    box of a descriptor only where the kernel makes it: of the host's, 3.7 refuses to copy half a
    box, and 3.6 copies all of it to half the memory, while the barrier waits for half the bytes.
    """
    return Operand(a, TMA_IN_KERNEL.value, tuple(tma_strides(a)))


def specializes(kernel: str, cut: Config, weight: Operand, rows: Operand | None = None) -> bool:
    """Whether Triton is to give warps roles of their own in the kernel's loop over tiles.

    That is asked for by the configuration. Triton can since 3.7 where TMA brings 16-bit weights,
    and on sm_90 only if it brings all, in the loop of "grouped_gemm", to two groups of four warps
    with at least 64 rows each. Triton 3.6 gave NaN on an H100, and compiles none for sm_100.
    Elsewhere the same tiles are computed by warps that are all alike.
    """
    if cut.warp_specialize != "triton" or weight.mode == POINTER.value or TRITON_VERSION < (3, 7):
        return False
    base = weight.value.base
    if base.element_size() != 2:
        return False
    arch = architecture(base.device)
    if arch >= 100:
        return arch < 120
    by_tma = rows is not None and rows.mode == TMA.value
    return kernel == "grouped_gemm" and by_tma and cut.block_m >= 128 and cut.warps == 4


def _has_gluon(kernel: str, cut: Config, out: Tensor) -> bool:
    """Whether a kernel in Gluon is asked for, and there is one for this tile and device.

    They were compiled with the releases of Triton that are known. Without them the same tiles
    are computed by warps that are all alike.
    """
    if cut.warp_specialize not in GLUON or INTERPRETED or not is_known(TRITON_VERSION):
        return False
    return suits_gluon(kernel, cut) and 90 <= architecture(out.device) < 100


def has_hopper_gemm(cut: Config, weight: Operand, rows: Operand, out: Tensor) -> bool:
    """Whether ``_hopper_gemm.py`` is asked for, and computes this product."""
    if not _has_gluon("grouped_gemm", cut, out):
        return False
    if weight.mode == POINTER.value or rows.mode != TMA.value:
        return False
    return rows.value.base.element_size() == out.element_size() == 2


def has_hopper_scaled(cut: Config, weight: Tensor, x: Tensor, out: Tensor) -> bool:
    """Whether ``_hopper_scaled.py`` is asked for, and computes this product.

    Not where weights are stored [E, Kd, N]: tensor cores contract float8 along the last dimension.
    """
    if not _has_gluon("scaled_grouped_gemm", cut, out) or not is_aligned(x, weight.mT):
        return False
    return x.dtype == weight.dtype == torch.float8_e4m3fn and out.element_size() == 2


def has_hopper_up(cut: Config, weight: Tensor, x: Tensor, out: Tensor, kind: str) -> bool:
    """Whether ``_hopper_up.py`` is asked for, and computes this projection of gathered rows.

    Not with gelu, whose error function needs more registers than there are beside the sums. Nor to
    a number of columns that Triton does not know to be a multiple of 16: it would store them one at
    a time, whose addresses spill. Nor of rows that are no multiple of the 16 bytes that a thread
    copies: where they start says nothing of that for rows of a wider matrix, or for one row; nor of
    rows further apart than 32 bits count.
    """
    if not _has_gluon("up", cut, out) or kind == "gelu" or out.shape[1] % 16 or x.shape[1] % 8:
        return False
    aligned = is_aligned(x) and (is_aligned(weight) or is_aligned(weight.mT))
    return aligned and x.stride(0) < 2**31 and x.element_size() == out.element_size() == 2


def has_hopper_down_backward(cut: Config, grad: Tensor, down: Tensor, h: Tensor) -> bool:
    """Whether ``_hopper_down_backward.py`` is asked for, and computes this of contiguous rows.

    Those of ``grad``, or copies of them, unless :func:`gathers_grad`. Not of columns whose number
    is no multiple of 16, as ``_hopper_up.py``.
    """
    if not _has_gluon("down_backward", cut, h):
        return False
    if down.shape[1] % 16 or down.shape[2] % 8 or not h.dtype == down.dtype == grad.dtype:
        return False
    return h.element_size() == 2 and is_aligned(h) and (is_aligned(down) or is_aligned(down.mT))


def has_hopper_wgrad(
    cut: Config, a: Tensor, a_source: Source | None, grad: Tensor, grad_source: Source | None,
    out: Tensor, *, accumulate: bool,
) -> bool:  # fmt: skip
    """Whether ``_hopper_wgrad.py`` is asked for, and computes this gradient.

    Rows of one operand may be gathered, as in :func:`has_hopper_up`; the others must be such as a
    ragged descriptor brings. Results of 16 bits are stored by TMA; others, and those that are added
    to what is there, by threads, two at a time, whose addresses spill unless Triton knows rows and
    their number to be multiples of 16.
    """
    if not _has_gluon("wgrad", cut, out) or (a_source is not None and grad_source is not None):
        return False
    if not is_aligned(a, grad, out) or not a.element_size() == grad.element_size() == 2:
        return False
    for tensor, source in ((a, a_source), (grad, grad_source)):
        if source is None:
            if ragged_operand(tensor, None, cut.block_k, 64).mode != TMA.value:
                return False
        elif tensor.shape[1] % 8 or tensor.stride(0) % 8 or tensor.stride(0) >= 2**31:
            return False
    by_tma = out.element_size() == 2 and not accumulate
    return by_tma or not (out.stride(0) % 16 or out.stride(1) % 16 or out.shape[2] % 16)


def weight_operand(b: Tensor, block_k: int, block_n: int, *, halves: bool = False) -> Operand:
    """``b [E, Kd, N]``, stored with either of the last two dimensions contiguous.

    ``halves``: a tile's columns are block_n / 2 of the left half of b and as many of the right; by
    TMA with rows contiguous, they are those of one half.
    """
    if halves:
        apart = _halves_apart(b).movedim(1, 3)
        if _takes_tma(b):
            return _by_tma(b, [1, block_k, block_n // 2], TMA.value)
        if _takes_tma(apart):
            return _by_tma(apart, [1, 2, block_n // 2, block_k], TMA_TRANSPOSED.value)
        return by_pointer(b)
    if _takes_tma(b):
        return _by_tma(b, [1, block_k, block_n], TMA.value)
    if _takes_tma(b.mT):
        return _by_tma(b.mT, [1, block_n, block_k], TMA_TRANSPOSED.value)
    return by_pointer(b)


def bias_operand(bias: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """``bias [E, N]`` and its strides, copied where 32 bits do not count to its last column."""
    if bias is None:
        return None, (0, 0)
    if bias.shape[1] * bias.stride(1) >= 2**31:
        bias = bias.contiguous()
    return bias, bias.stride()


def ragged_operand(a: Tensor, source: Source | None, block_r: int, block_c: int) -> Operand:
    """``a [R, C]``, or [T, C] if gathered, read in tiles that end with an expert's rows."""
    # a ragged descriptor makes two dimensions of the rows, so that one row's stride counts too
    aligned = _takes_tma(a) and a.stride(0) * a.element_size() % 16 == 0
    if source is None and aligned and a.shape[0] <= 2**30:
        descriptor = create_ragged_descriptor(a, [block_r, block_c])
        return Operand(descriptor, TMA.value, (0, 0))
    return by_pointer(a)


def pipeline_stages(stages: int, *operands: Operand) -> int:
    """How deep to pipeline loads of these operands: see :func:`pipelines_pointer_loads`."""
    tensors = [operand.value for operand in operands if operand.mode == POINTER.value]
    return stages if all(pipelines_pointer_loads(tensor.device) for tensor in tensors) else 1


@triton.jit
def load_rows(
    a, first, rows, valid, k, Kd, stride_m, stride_k,
    MODE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A [BLOCK_M, BLOCK_K] tile: rows from ``first`` on by TMA, or ``rows`` by pointer."""
    if MODE == POINTER:
        column = k + tl.arange(0, BLOCK_K)
        mask = valid[:, None] if EVEN_K else valid[:, None] & (column < Kd)[None, :]
        cell = a + rows[:, None] * stride_m + column[None, :].to(tl.int64) * stride_k
        tile = tl.load(cell, mask=mask, other=0.0)
    else:
        tile = a.load([first, k])
    return tile


@triton.jit
def load_weight(
    b, expert, k, n, Kd, N, stride_e, stride_k, stride_n,
    MODE: tl.constexpr, HALVES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The [BLOCK_K, BLOCK_N] tile at (k, n) of the expert's matrix.

    With HALVES, but for TMA of contiguous rows, N is half the matrix's columns, and the tile's are
    those from n on in each half.
    """
    if MODE == POINTER:
        row, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
        first = b + expert.to(tl.int64) * stride_e
        first += tl.cast(k, tl.int64) * stride_k + n.to(tl.int64) * stride_n
        if HALVES:
            inside = n + column % (BLOCK_N // 2) < N
            half = (column // (BLOCK_N // 2)).to(tl.int64)
            column = half * N + column % (BLOCK_N // 2)
        else:
            inside = n + column < N
        tile = tl.load(
            first + (row[:, None] * stride_k + column[None, :] * stride_n),
            mask=(k + row < Kd)[:, None] & inside[None, :],
            other=0.0,
        )
    elif MODE == TMA:
        tile = tl.reshape(b.load([expert, k, n]), (BLOCK_K, BLOCK_N))
    else:
        tile = b.load([expert, 0, n, k]) if HALVES else b.load([expert, n, k])
        tile = tl.trans(tl.reshape(tile, (BLOCK_N, BLOCK_K)))
    return tile


@triton.jit
def load_ragged_rows(
    a, begin, end, row, rows, column, C, stride_r, stride_c,
    MODE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A [BLOCK_R, BLOCK_C] tile from row ``row`` on, zero from row ``end`` on.

    By pointer it is that of ``rows``, valid where they are not negative.
    """
    if MODE == POINTER:
        columns = column + tl.arange(0, BLOCK_C)
        tile = tl.load(
            a + rows[:, None] * stride_r + columns[None, :].to(tl.int64) * stride_c,
            mask=(rows >= 0)[:, None] & (columns < C)[None, :],
            other=0.0,
        )
    else:
        tile = load_ragged(a, begin, end - begin, [row - begin, column])
    return tile


def gathers_grad(cut: Config, grad: Tensor, interleaved: bool, limit: float) -> bool:
    """Whether ``_hopper_down_backward.py``, where it is used, gathers the rows of ``grad`` itself.

    It copies them as ``_hopper_up.py`` does. Not with gate and up in pairs, nor with a clamp of 256
    columns, which need more registers than gathering leaves.
    """
    if cut.warp_specialize != "gluon_gather" or interleaved:
        return False
    if cut.block_n > 128 and limit < sys.float_info.max:  # which stands for no clamp too
        return False
    return is_aligned(grad) and grad.stride(0) < 2**31
