"""A product of rows and the sum of each token's results, without keeping all of them at once.

T tokens, R rows, Kd contracted size, N columns. The results [R, N] are as wide as the hidden size
and K times as many as the tokens: the largest buffer of a layer of narrow experts. Where it would
be large, it is made and summed a chunk of columns at a time, in one buffer [R, chunk]. A sum runs
over the contracted size within a tile and over a token's slots within a column, so that its bits do
not depend on the chunks, whose bounds are bounds of tiles.

A chunk reads the product's left operand again. With 2048 columns that is Kd / 2048 of the bytes
that a chunk writes, which a product bound by tensor cores hides; more chunks would cost more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_kernels.triton._config_tables import WIDEST
from moe_kernels.triton._configs import Config
from moe_kernels.triton._launch import ceil_div
from moe_kernels.triton._tiles import TileMap
from moe_kernels.triton.grouped_gemm import multiply_rows
from moe_kernels.triton.unpermute import sum_slots

WHOLE_BYTES = 2**27  # a buffer of at most as many bytes is made whole
CHUNK = 2048  # columns
STEP = WIDEST  # chunks start at multiples: bounds of every configuration's tiles, and aligned


def chunk_width(rows: int, columns: int, element_size: int, least: int = 1) -> int:
    """Columns of the buffer of ``rows`` rows that results of ``columns`` columns go through.

    Where the whole would be large there are ``least`` chunks or more, if columns suffice.
    """
    if rows * columns * element_size * least <= WHOLE_BYTES:
        return columns
    even = ceil_div(columns, max(ceil_div(columns, CHUNK), least))
    return min(ceil_div(even, STEP) * STEP, columns)


def forward_width(rows: int, inner: int, hidden: int, element_size: int) -> int:
    """Columns of forward's buffer for rows of y, beside the activations [R, inner].

    Together they stay below two buffers [R, hidden], if the activations alone do.
    """
    room = (2 * hidden - inner - 1) // STEP * STEP
    return chunk_width(rows, hidden, element_size, ceil_div(hidden, room) if room > 0 else 1)


def backward_widths(rows: int, inner: int, hidden: int, element_size: int) -> tuple[int, int]:
    """Columns of backward's buffers for activations [R, inner] and for rows of dX [R, hidden].

    Beside the gradient of h, which has memory of its own unless h is overwritten, there is only one
    of them at a time. Where experts are wide, halves
    keep both together below two buffers [R, hidden], or thirds where those would just reach them.
    Activations are whole otherwise: each chunk of them reads the gradient of the layer's output
    again, whose rows are long compared to theirs.
    """
    if 3 * inner < 2 * hidden - STEP:
        return inner, chunk_width(rows, hidden, element_size)
    # the columns that two buffers have beside the gradient of h, in whole steps and less than all
    room = max(2 * (hidden - inner) - 1, 0) // STEP * STEP
    least = [max(2, ceil_div(columns, room)) if room else 2 for columns in (inner, hidden)]
    if max(least) > 3:
        least = [2, 2]
    return (
        chunk_width(rows, inner, element_size, least[0]),
        chunk_width(rows, hidden, element_size, least[1]),
    )


def sum_products(
    multiply: Callable[[slice, Tensor], None],
    rows: int,
    order: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | None,
    out: Tensor,
    width: int,
) -> None:
    """``out[t]``, the (weighted) sum over the token's rows of a product's results.

    Args:
        multiply: writes some columns of the results [rows, N] to a buffer of those columns.
        order: of the slots by expert.
        weights: [T, K], or None for ones.
        out: [T, N], contiguous.
        width: columns of a chunk.
    """
    columns = out.shape[1]
    if out.numel() == 0:
        return
    buffer = torch.empty(rows * width, dtype=out.dtype, device=out.device)
    for start in range(0, columns, width):
        chunk = slice(start, min(start + width, columns))
        size = chunk.stop - start
        part = buffer[: rows * size].view(rows, size)
        multiply(chunk, part)
        sum_slots(part, *order, weights, out[:, chunk])


def multiply_and_sum(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    order: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | None,
    out: Tensor,
    tiles: TileMap,
    cut: Config,
    width: int,
) -> None:
    """:func:`sum_products` of ``a[r] @ b[e] + bias[e]``.

    Args:
        a: [R, Kd], the rows of the map.
        b: [E, Kd, N], any strides.
        bias: [E, N].
    """

    def multiply(chunk: slice, part: Tensor) -> None:
        shift = None if bias is None else bias[:, chunk]
        multiply_rows(a, b[:, :, chunk], shift, part, tiles, cut)

    sum_products(multiply, a.shape[0], order, weights, out, width)
