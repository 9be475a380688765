"""Tensors that may be DTensors."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiably; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
