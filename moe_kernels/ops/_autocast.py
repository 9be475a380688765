"""Autocast, by the rules of linear: floating operands become the autocast dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(*operands: Tensor | None) -> tuple[Any, ...]:
    """The operands as the enabled autocast wants them; the first decides the device.

    float64 operands stay as they are, as in torch.
    """
    device = operands[0].device.type if isinstance(operands[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return operands
    dtype = torch.get_autocast_dtype(device)

    def convert(value: Any) -> Any:
        narrow = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if narrow and value.dtype != torch.float64 else value

    return tuple(convert(value) for value in operands)
