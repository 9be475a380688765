"""Tile shapes of the GEMM kernels: which a call gets.

A tuned table decides (see ``_config_tables.py``), else the default below: one row a kernel,
architecture, precision and class of rows per expert. No default is tuned: they are the largest
tiles that compile without spilling, which says nothing yet about their speed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_kernels.triton._config_tables import (
    Bucket,
    Config,
    inner_classes,
    precision_class,
    rows_class,
    tuned,
)
from moe_kernels.triton._launch import architecture

__all__ = ["CONFIGS", "Config", "config", "default_config"]


# the most rows an expert has on average, for which a class is meant
FEW, SOME = 16, 64

CONFIGS: dict[str, dict[tuple[int, str, str], Config]] = {
    "grouped_gemm": {
        (80, "full", "any"): Config(64, 64, 16, warps=4, stages=2, programs=2),
        (80, "half", "unaligned"): Config(64, 64, 32, warps=4, stages=2),
        (90, "half", "unaligned"): Config(128, 128, 32, warps=8, stages=3),
        (100, "half", "unaligned"): Config(128, 128, 32, warps=8, stages=3),
        (80, "half", "few"): Config(16, 128, 64, warps=4, stages=4, programs=2),
        (80, "half", "some"): Config(64, 128, 32, warps=4, stages=4, programs=2),
        (80, "half", "many"): Config(128, 128, 32, warps=8, stages=4),
        (90, "half", "few"): Config(16, 64, 128, warps=4, stages=6, programs=2),
        (90, "half", "some"): Config(64, 128, 64, warps=4, stages=4, programs=2),
        (90, "half", "many"): Config(128, 256, 64, warps=8, stages=4),
        (100, "half", "few"): Config(16, 64, 128, warps=4, stages=6, programs=2),
        (100, "half", "some"): Config(64, 128, 64, warps=4, stages=4),
        (100, "half", "many"): Config(128, 256, 64, warps=8, stages=3),
        (86, "half", "few"): Config(16, 128, 64, warps=4, stages=3, programs=2),
        (120, "half", "few"): Config(16, 64, 128, warps=4, stages=3, programs=2),
        (120, "half", "some"): Config(64, 128, 32, warps=4, stages=4, programs=2),
        (120, "half", "many"): Config(128, 128, 64, warps=8, stages=3),
    },
    # at most 128 columns and contracted elements, which share a scale
    "scaled_grouped_gemm": {
        (80, "fp8", "unaligned"): Config(64, 64, 64, warps=8, stages=2, programs=2),
        (90, "fp8", "unaligned"): Config(64, 64, 64, warps=8, stages=2, programs=2),
        (100, "fp8", "unaligned"): Config(64, 64, 64, warps=8, stages=2, programs=2),
        (80, "fp8", "few"): Config(16, 128, 128, warps=4, stages=3, programs=2),
        (80, "fp8", "some"): Config(64, 128, 32, warps=4, stages=4, programs=2),
        (80, "fp8", "many"): Config(128, 128, 32, warps=8, stages=4),
        (90, "fp8", "few"): Config(16, 128, 128, warps=4, stages=4, programs=2),
        (90, "fp8", "some"): Config(64, 128, 128, warps=4, stages=4, programs=2),
        (90, "fp8", "many"): Config(128, 128, 128, warps=8, stages=5),
        (100, "fp8", "few"): Config(16, 128, 128, warps=4, stages=4, programs=2),
        (100, "fp8", "some"): Config(64, 128, 128, warps=4, stages=4),
        (100, "fp8", "many"): Config(128, 128, 128, warps=8, stages=5),
        (120, "fp8", "few"): Config(16, 128, 128, warps=4, stages=3, programs=2),
        (120, "fp8", "some"): Config(64, 128, 128, warps=4, stages=3),
        (120, "fp8", "many"): Config(128, 128, 128, warps=8, stages=4),
    },
    "up": {
        (80, "full", "any"): Config(64, 32, 16, warps=4, stages=2, programs=2),
        (80, "half", "unaligned"): Config(64, 64, 32, warps=4, stages=2),
        (90, "half", "unaligned"): Config(128, 64, 32, warps=8, stages=3),
        (100, "half", "unaligned"): Config(128, 64, 32, warps=8, stages=3),
        (80, "half", "few"): Config(16, 64, 64, warps=4, stages=4, programs=2),
        (80, "half", "some"): Config(64, 64, 32, warps=4, stages=4, programs=2),
        (80, "half", "many"): Config(128, 64, 32, warps=8, stages=4),
        (90, "half", "few"): Config(16, 32, 128, warps=4, stages=6, programs=2),
        (90, "half", "some"): Config(64, 64, 64, warps=4, stages=4, programs=2),
        (90, "half", "many"): Config(128, 128, 64, warps=8, stages=4),
        (100, "half", "few"): Config(16, 32, 128, warps=4, stages=6, programs=2),
        (100, "half", "some"): Config(64, 64, 64, warps=4, stages=4),
        (100, "half", "many"): Config(128, 64, 64, warps=8, stages=3),
        (86, "half", "few"): Config(16, 64, 64, warps=4, stages=3, programs=2),
        (120, "half", "unaligned"): Config(64, 64, 32, warps=8, stages=2),
        (120, "half", "few"): Config(16, 32, 128, warps=4, stages=3, programs=2),
        (120, "half", "some"): Config(64, 64, 32, warps=4, stages=4, programs=2),
        (120, "half", "many"): Config(128, 64, 64, warps=8, stages=3),
    },
    "down_backward": {
        (80, "full", "any"): Config(64, 32, 16, warps=4, stages=2, programs=2),
        (80, "half", "unaligned"): Config(64, 64, 32, warps=4, stages=2),
        (90, "half", "unaligned"): Config(128, 64, 32, warps=8, stages=3),
        (100, "half", "unaligned"): Config(128, 64, 32, warps=8, stages=3),
        (80, "half", "few"): Config(16, 64, 64, warps=4, stages=4, programs=2),
        (80, "half", "some"): Config(64, 64, 32, warps=4, stages=4, programs=2),
        (80, "half", "many"): Config(128, 64, 32, warps=8, stages=3),
        (90, "half", "few"): Config(16, 64, 128, warps=4, stages=4),
        (90, "half", "some"): Config(64, 64, 64, warps=4, stages=4, programs=2),
        (90, "half", "many"): Config(128, 128, 64, warps=8, stages=4),
        (100, "half", "few"): Config(16, 64, 128, warps=4, stages=4),
        (100, "half", "some"): Config(64, 64, 64, warps=4, stages=4),
        (100, "half", "many"): Config(128, 128, 64, warps=8, stages=3),
        (120, "half", "few"): Config(16, 64, 128, warps=4, stages=3),
        (120, "half", "some"): Config(64, 64, 32, warps=4, stages=4, programs=2),
        (120, "half", "many"): Config(128, 64, 64, warps=8, stages=3),
    },
    "wgrad": {
        (80, "full", "any"): Config(64, 64, 32, warps=4, stages=2, programs=2),
        (80, "half", "unaligned"): Config(64, 64, 32, warps=4, stages=2),
        (90, "half", "unaligned"): Config(128, 128, 32, warps=8, stages=3),
        (100, "half", "unaligned"): Config(128, 128, 32, warps=8, stages=3),
        (80, "half", "few"): Config(128, 128, 16, warps=8, stages=4),
        (80, "half", "some"): Config(128, 128, 32, warps=8, stages=4),
        (80, "half", "many"): Config(128, 128, 32, warps=8, stages=4),
        (90, "half", "few"): Config(128, 128, 16, warps=8, stages=4),
        (90, "half", "some"): Config(128, 256, 64, warps=8, stages=3),
        (90, "half", "many"): Config(128, 256, 64, warps=8, stages=4),
        (100, "half", "few"): Config(128, 128, 16, warps=8, stages=4),
        (100, "half", "some"): Config(128, 256, 64, warps=8, stages=3),
        (100, "half", "many"): Config(128, 256, 64, warps=8, stages=3),
        (120, "half", "few"): Config(128, 128, 16, warps=8, stages=4),
        (120, "half", "some"): Config(128, 128, 32, warps=8, stages=4),
        (120, "half", "many"): Config(128, 128, 64, warps=8, stages=4),
    },
}


def config(
    kernel: str, tensor: Tensor, rows: int, experts: int, *, aligned: bool, inner: int = 0
) -> Config:
    """The configuration for ``rows`` rows of the tensor's dtype, spread over ``experts``.

    It follows from these arguments, the device and its table alone: it is the same in every call.

    Args:
        aligned: all operands are, so that TMA or wide loads and stores move them. Tables are of
            such operands; others get the default.
        inner: the shorter side of an expert's matrix, or 0 where that is not told.
    """
    precision = precision_class(tensor.dtype)
    rows_of = rows_class(rows, experts)
    if aligned:
        inner_of = inner_classes(inner)
        if found := _tuned_config(tensor.device, kernel, precision, rows_of, inner_of):
            return found
    return default_config(
        kernel, architecture(tensor.device), precision, rows, experts, aligned=aligned
    )


@functools.cache
def _tuned_config(
    device: torch.device, kernel: str, precision: str, rows: int | None, inner: tuple[str, ...]
) -> Config | None:
    for table in tuned(device, tuple(CONFIGS)):
        for part in inner:
            if found := table.get(Bucket(kernel, precision, rows, part)):
                return found
    return None


def default_config(
    kernel: str, arch: int, precision: str, rows: int, experts: int, *, aligned: bool = True
) -> Config:
    """The untuned configuration."""
    if precision == "full":
        return CONFIGS[kernel][80, "full", "any"]
    mean = rows / max(experts, 1)
    size = "few" if mean <= FEW else "some" if mean <= SOME else "many"
    if not aligned and (size != "few" or precision == "fp8"):
        size = "unaligned"
    of = CONFIGS[kernel]
    return of.get((_family(arch), precision, size)) or of[80, precision, size]


def _family(arch: int) -> int:
    """Whose row holds; those of 80 hold where there is none.

    GPUs that are not for servers have 99 KB of shared memory a block, from sm_120 on too, where
    tensor cores are those of sm_80, whose sums are in registers, and TMA copies.
    """
    if arch >= 120:
        return 120
    return 100 if arch >= 100 else 90 if arch >= 90 else 86 if arch in (86, 89) else 80
