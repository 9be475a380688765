"""Tile shapes of the GEMM kernels, as data.

One row a kernel, architecture, precision and class of rows per expert. None of them is tuned: they
are the largest tiles that compile without spilling, which says nothing yet about their speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.triton._launch import architecture


@dataclass(frozen=True)
class Config:
    """How a GEMM is cut.

    Attributes:
        block_m, block_n, block_k: rows, columns and contracted elements of a tile. Of the kernels
            with a gate, block_n counts columns of the activation; a weight gradient contracts rows.
        warps: of a program.
        stages: how deep loads are pipelined.
        group_m: row tiles that are walked together, so that they find a weight tile in L2.
        programs: programs a multiprocessor holds; each walks many tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    programs: int = 1


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
        (90, "half", "few"): Config(16, 128, 128, warps=4, stages=4),
        (90, "half", "some"): Config(64, 128, 64, warps=4, stages=4, programs=2),
        (90, "half", "many"): Config(128, 256, 64, warps=8, stages=4),
        (100, "half", "few"): Config(16, 128, 128, warps=4, stages=4),
        (100, "half", "some"): Config(64, 128, 64, warps=4, stages=4),
        (100, "half", "many"): Config(128, 256, 64, warps=8, stages=3),
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
    },
    "up": {
        (80, "full", "any"): Config(64, 32, 16, warps=4, stages=2, programs=2),
        (80, "half", "unaligned"): Config(64, 64, 32, warps=4, stages=2),
        (90, "half", "unaligned"): Config(128, 64, 32, warps=8, stages=3),
        (100, "half", "unaligned"): Config(128, 64, 32, warps=8, stages=3),
        (80, "half", "few"): Config(16, 64, 64, warps=4, stages=4, programs=2),
        (80, "half", "some"): Config(64, 64, 32, warps=4, stages=4, programs=2),
        (80, "half", "many"): Config(128, 64, 32, warps=8, stages=4),
        (90, "half", "few"): Config(16, 64, 128, warps=4, stages=4),
        (90, "half", "some"): Config(64, 64, 64, warps=4, stages=4, programs=2),
        (90, "half", "many"): Config(128, 128, 64, warps=8, stages=4),
        (100, "half", "few"): Config(16, 64, 128, warps=4, stages=4),
        (100, "half", "some"): Config(64, 64, 64, warps=4, stages=4),
        (100, "half", "many"): Config(128, 64, 64, warps=8, stages=3),
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
    },
}


def config(kernel: str, tensor: Tensor, rows: int, experts: int, *, aligned: bool) -> Config:
    """The configuration for ``rows`` rows of the tensor's dtype, spread over ``experts``.

    ``aligned``: all operands are, so that TMA or wide loads and stores move them.
    """
    if tensor.dtype == torch.float32:
        return CONFIGS[kernel][80, "full", "any"]
    precision = "fp8" if tensor.element_size() == 1 else "half"
    arch = architecture(tensor.device)
    family = 100 if arch >= 100 else 90 if arch >= 90 else 80
    mean = rows / max(experts, 1)
    size = "few" if mean <= FEW else "some" if mean <= SOME else "many"
    if not aligned and (size != "few" or precision == "fp8"):
        size = "unaligned"
    return CONFIGS[kernel][family, precision, size]
