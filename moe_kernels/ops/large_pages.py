"""Weights on large pages of memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_kernels.ops.quantized_experts import QuantizedExperts


def _on_this_rank(tensor: Tensor) -> Tensor:
    """What this rank has of a DTensor; a plain tensor as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _in_memory(tensor: Any) -> Iterator[Tensor]:
    """The tensors that have the memory: those inside of one that only wraps others."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _in_memory(getattr(tensor, name))
    else:
        yield tensor


def use_large_pages(weights: nn.Module | Tensor | QuantizedExperts) -> int:
    """Move weights in CPU memory to pages of 2 MiB, at the same addresses.

    With few tokens an expert's time is that of reading its weights, and on pages of 4 KiB looking
    up the next page takes a good part of it. One call after loading is enough: copies and in-place
    updates keep the pages. Values, views and pointers stay as they are; memory that another
    process may hold (files, shared memory) is left alone, as are sparse tensors and all that is not
    on the CPU.

    Weights that were loaded may lie in their file still. transformers leaves those there which need
    no other dtype or layout: load with ``from_pretrained(..., disable_mmap=True)``. ``torch.load``
    does so with ``mmap=True``.

    Args:
        weights: a tensor, quantised experts, or a module, which means its parameters and buffers;
            of a DTensor what this rank has of it, of other tensors that wrap some what they wrap.

    Returns:
        Bytes that are on large pages now: about the size of the weights, less by those that are in
        files, or 0 where the system cannot do it (it takes Linux 6.1 or newer).

    Raises:
        TypeError: weights is none of these.
    """
    if isinstance(weights, Tensor):
        tensors = [weights]
    elif isinstance(weights, QuantizedExperts):
        tensors = [weights.codes, weights.scales]
    elif isinstance(weights, nn.Module):
        tensors = [*weights.parameters(), *weights.buffers()]
    else:
        raise TypeError(
            "use_large_pages: weights must be a tensor, a module or QuantizedExperts; got "
            f"{type(weights).__name__}"
        )
    native = importlib.import_module("moe_kernels._C")
    tensors = [part for t in tensors for part in _in_memory(_on_this_rank(t.detach()))]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_shared()
    }
    return sum(native.use_large_pages(tensor) for tensor in storages.values())
