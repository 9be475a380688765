"""Autocast, by the rules of linear: floating operands become the autocast dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONVERTED = (torch.bfloat16, torch.float16, torch.float32)


def autocast(*operands: Tensor | None) -> tuple[Any, ...]:
    """The operands as the enabled autocast wants them; the first decides the device.

    float64 operands stay as they are, as in torch. So do those in float8, which would be widened
    without their scales: the checks of the op refuse them.
    """
    device = operands[0].device.type if isinstance(operands[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return operands
    dtype = torch.get_autocast_dtype(device)

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype in CONVERTED else value

    return tuple(convert(value) for value in operands)
