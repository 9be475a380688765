"""Arguments that no kernel takes, found before a call: PyTorch would raise on the rank that has
them, and leave the others waiting, or pass them to the fake of the op."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_kernels.ops._checks import check_number

DEVICES = ("cpu", "cuda")
MAX_TIMEOUT = 1e9  # seconds, 31 years: clocks count nanoseconds in 64 bits


def check_timeout(op: str, name: str, seconds: Any) -> None:
    """Raise unless ``seconds`` is a time to wait."""
    check_number(op, name, seconds)
    if not 0 < seconds <= MAX_TIMEOUT:
        raise ValueError(
            f"{op}: {name} must be positive and at most {MAX_TIMEOUT:g}, in seconds; got "
            f"{seconds}. None is the group's own timeout."
        )


def check_tensor(op: str, name: str, tensor: Any) -> None:
    """Raise unless a kernel of ``op`` takes ``tensor``.

    Raises:
        TypeError: it is no tensor, a DTensor, or not dense.
        ValueError: it is neither on a CPU nor on a CUDA device.
    """
    if (
        type(tensor) is Tensor
        and (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
    ):
        return  # in half a microsecond
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
    if hasattr(tensor, "device_mesh"):
        raise TypeError(f"{op}: {name} must be a plain tensor; got a DTensor. Use to_local().")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        what = "nested" if tensor.is_nested else str(tensor.layout)
        what = f"quantized, {tensor.dtype}" if tensor.is_quantized else what
        raise TypeError(
            f"{op}: {name} must be dense, of layout torch.strided; got {what}. Make it dense first."
        )
    if tensor.device.type not in DEVICES:
        raise ValueError(
            f"{op}: {name} must be on a CPU or CUDA device; got {tensor.device}. Move it there."
        )


def device_among(tensors: tuple[Any, ...], default: str) -> torch.device:
    """Where those tensors are that a kernel could take, or ``default``."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type in DEVICES:
            return tensor.device
    return torch.device(default)


def refuse_pickling(name: str) -> NoReturn:
    """Raise a TypeError: a dispatcher is of its process and group alone."""
    raise TypeError(
        f"{name}: it cannot be pickled, for it is of this process and its group alone. Save the "
        "state_dict() of a module that has one, and make the module where it is loaded."
    )
