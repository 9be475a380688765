"""A call of a kernel whose warps have roles, with what it writes and what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.hopper_checks import check

BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
KD, INNER, TOP_K = 200, 144, 3  # neither is a multiple of a tile's side
ALPHA, LIMIT = 1.702, 0.5


@dataclass(frozen=True)
class Call:
    """A launch on tensors that are made: outputs hold NaN until ``run``.

    Attributes:
        selected: whether a kernel in Gluon computes it.
        outputs: each with what is right, in float64.
        limits: of their errors, if not the usual one.
    """

    selected: Callable[[], bool]
    run: Callable[[], None]
    outputs: list[tuple[Tensor, Tensor]]
    limits: tuple[float, ...] = ()

    def poison(self) -> None:
        for out, _ in self.outputs:
            out.fill_(torch.nan)

    def check(self) -> None:
        limits = self.limits or (4e-3,) * len(self.outputs)
        for (out, right), limit in zip(self.outputs, limits, strict=True):
            check(out, right, limit)


def padded(*shape: int, device: torch.device, dtype: torch.dtype = BF16) -> Tensor:
    """Random values; rows are those of a wider matrix, whose other columns hold NaN."""
    width = shape[-1] + 16 // dtype.itemsize
    whole = torch.full((*shape[:-1], width), torch.nan, device=device).to(dtype)
    part = whole[..., : shape[-1]]
    return part.copy_(torch.randn(shape, device=device))
