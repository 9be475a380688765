"""Weights on large pages of memory."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn


def _on_this_rank(tensor: Tensor) -> Tensor:
    """What this rank has of a DTensor; a plain tensor as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def use_large_pages(weights: nn.Module | Tensor) -> int:
    """Move weights in CPU memory to pages of 2 MiB, at the same addresses.

    With few tokens an expert's time is that of reading its weights, and on pages of 4 KiB looking
    up the next page takes a good part of it. One call after loading is enough: copies and in-place
    updates keep the pages. Values, views and pointers stay as they are; memory that another
    process may hold (files, shared memory) is left alone, as are sparse tensors and all that is not
    on the CPU.

    Args:
        weights: a tensor, or a module, which means its parameters and buffers; of a DTensor what
            this rank has of it.

    Returns:
        Bytes that are on large pages now: about the size of the weights, or 0 where the system
        cannot do it (it takes Linux 6.1 or newer).

    Raises:
        TypeError: weights is neither a tensor nor a module.
    """
    if not isinstance(weights, Tensor | nn.Module):
        raise TypeError(
            f"use_large_pages: weights must be a tensor or a module; got {type(weights).__name__}"
        )
    native = importlib.import_module("moe_kernels._C")
    tensors = (
        [weights] if isinstance(weights, Tensor) else [*weights.parameters(), *weights.buffers()]
    )
    tensors = [_on_this_rank(tensor.detach()) for tensor in tensors]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_shared()
    }
    return sum(native.use_large_pages(tensor) for tensor in storages.values())
