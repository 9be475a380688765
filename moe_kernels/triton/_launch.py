"""What launchers know of the device and the compiler."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED: bool = triton.knobs.runtime.interpret
OLDEST = 80  # architecture whose tensor cores Triton multiplies with
# few, so that a persistent kernel's loop takes several turns where it is tested
INTERPRETED_PROCESSORS = 3
UNCHANGED = contextlib.nullcontext()


def is_known(release: tuple[int, ...]) -> bool:
    """Whether it is a release of Triton whose Gluon and launches were looked at."""
    return (3, 6) <= release < (3, 10)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches on the current device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return UNCHANGED
    return torch.cuda.device(tensor.device)


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def with_scratch(device: torch.device, launch: Callable[[], None]) -> None:
    """Call ``launch``, of kernels that ask for global memory; its allocator is set for it alone."""

    def call() -> None:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
        launch()

    contextvars.copy_context().run(call)


def float_type(tensor: Tensor) -> tl.dtype:
    """The type kernels compute in: float64 for float64, float32 for everything narrower."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability that is compiled for, times ten; interpreted kernels play sm_90.

    Raises:
        ValueError: it is below 8.0; Triton multiplies without tensor cores there. Or the GPU is of
            another maker.
    """
    if INTERPRETED:
        return 90
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < OLDEST:
        got = target.arch / 10 if target.backend == "cuda" else f"{target.backend} {target.arch}"
        raise ValueError(
            f"moe_kernels: {device} must be an NVIDIA GPU of compute capability {OLDEST / 10} or "
            f"later; got {got}. Set MOE_KERNELS_BACKEND=reference for plain PyTorch definitions."
        )
    return int(target.arch)


def pipelines_pointer_loads(device: torch.device) -> bool:
    """Whether loads by pointer may be pipelined into asynchronous tensor cores.

    Pipelined, they are copied to shared memory by ``cp.async``, and from sm_90 to sm_110 the tensor
    cores read it through another proxy: without a fence, they may read it before it is written.
    Triton emits that fence since 3.7. Before, such loads go through registers, and rows that would
    be gathered in a GEMM's prologue are gathered to a buffer first, which TMA reads.
    """
    return TRITON_VERSION >= (3, 7) or not 90 <= architecture(device) < 120


def dot_precision(tensor: Tensor) -> str:
    """Products of float32 are exact unless the user allowed TF32 in torch."""
    if tensor.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def checks_values() -> bool:
    """Whether ``MOE_KERNELS_CHECK=1`` asks for checks of device values, which synchronise."""
    return os.environ.get("MOE_KERNELS_CHECK", "0") == "1"


def refuse_float64(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float64:
        raise TypeError(
            f"{op}: {name} must be bfloat16, float16 or float32 on CUDA; got float64. Convert it, "
            "or set MOE_KERNELS_BACKEND=reference."
        )
