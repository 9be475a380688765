"""Products of row groups with their expert's matrix.

R rows, E experts, Kd contracted size, N columns.
"""

import itertools

import torch
from torch import Tensor

from moe_kernels.reference._accumulate import accumulate_dtype


def _bounds(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    if ends[0] != 0 or any(a > b for a, b in itertools.pairwise(ends)) or ends[-1] > rows:
        raise ValueError(
            f"grouped_gemm: offsets must rise from 0 to at most a.shape[0] = {rows}; got {ends}"
        )
    return list(itertools.pairwise(ends))


def is_transposed(weight: Tensor) -> bool:
    """Whether ``weight [E, M, N]`` is stored as [E, N, M]; its gradient is then stored alike.

    A gradient laid out as its parameter is taken over by autograd; any other is cloned first.
    """
    return weight.stride(1) == 1 and weight.stride(2) != 1


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``[R, N]``: rows ``offsets[e]:offsets[e+1]`` are ``a @ b[e] + bias[e]``; later rows zero."""
    accumulate = accumulate_dtype(a.dtype)
    pieces = []
    last = 0
    for e, (start, end) in enumerate(_bounds(offsets, a.shape[0])):
        piece = a[start:end].to(accumulate) @ b[e].to(accumulate)
        pieces.append(piece if bias is None else piece + bias[e].to(accumulate))
        last = end
    pieces.append(a.new_zeros(a.shape[0] - last, b.shape[2], dtype=accumulate))
    return torch.cat(pieces).to(out_dtype or a.dtype)


def grouped_gemm_wgrad(
    a: Tensor, grad: Tensor, offsets: Tensor, out_dtype: torch.dtype, transposed: bool
) -> Tensor:
    """``[E, Kd, N]``: ``a[rows of e].T @ grad[rows of e]``; stored as [E, N, Kd] if transposed."""
    bounds = _bounds(offsets, a.shape[0])
    shape = (len(bounds), a.shape[1], grad.shape[1])
    out = a.new_empty((shape[0], shape[2], shape[1]) if transposed else shape, dtype=out_dtype)
    out = out.mT if transposed else out
    accumulate = accumulate_dtype(a.dtype)
    for e, (start, end) in enumerate(bounds):
        out[e] = a[start:end].to(accumulate).mT @ grad[start:end].to(accumulate)
    return out


def grouped_gemm_wgrad_(out: Tensor, a: Tensor, grad: Tensor, offsets: Tensor) -> None:
    """``out[e] += a[rows of e].T @ grad[rows of e]`` in place."""
    for e, (start, end) in enumerate(_bounds(offsets, a.shape[0])):
        out[e] += a[start:end].to(out.dtype).mT @ grad[start:end].to(out.dtype)


def grouped_gemm_dbias(grad: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``[E, N]``: the sum of each expert's rows."""
    accumulate = accumulate_dtype(grad.dtype)
    bounds = _bounds(offsets, grad.shape[0])
    sums = [grad[start:end].to(accumulate).sum(0) for start, end in bounds]
    return torch.stack(sums).to(out_dtype) if sums else grad.new_empty(0, grad.shape[1])
