"""Autocast, by the rules of linear: floating operands become the autocast dtype."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor | None)


def autocast(*tensors: T) -> tuple[T, ...]:
    """The operands as the enabled autocast wants them; the first decides the device.

    float64 operands stay as they are, as in torch.
    """
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)  # type: ignore[misc]
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )
