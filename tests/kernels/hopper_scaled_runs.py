"""The kernels of float8 whose warps have roles, for ``hopper_runs.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_kernels import reference
from moe_kernels.triton import _operands
from moe_kernels.triton._activation import GATED, Activation
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton._launch import ceil_div
from moe_kernels.triton._scaled_up import activates_in_roles
from moe_kernels.triton._tiles import build_tile_map
from moe_kernels.triton.fused_experts_fp8 import _project_up
from moe_kernels.triton.grouped_gemm import zero_tail
from moe_kernels.triton.scaled_grouped_gemm import multiply_scaled_rows
from tests.kernels.accuracy import float8_limit
from tests.kernels.hopper_calls import ALPHA, BF16, FLOAT8, INNER, KD, LIMIT, Call, padded
from tests.kernels.hopper_checks import EPILOGUES, Epilogue, products


@dataclass(frozen=True)
class Scaled:
    """The product of float8, and what it is compiled for."""

    columns: int
    stages: int
    biased: bool = False
    dtype: torch.dtype = BF16

    def cut(self) -> Config:
        return Config(128, self.columns, 128, 8, self.stages, warp_specialize="gluon")


@dataclass(frozen=True)
class ScaledUp:
    """The up-projection of float8 that goes through its activation, and what it is compiled for."""

    columns: int
    stages: int
    epilogue: Epilogue
    dtype: torch.dtype = BF16

    def cut(self) -> Config:
        by = "gluon_activate"
        return Config(128, self.columns, 128, 8, self.stages, warp_specialize=by)


def scaled_up_cases() -> Iterator[ScaledUp]:
    """Every epilogue; tiles of one block of columns where that will do."""
    for number, epilogue in enumerate(EPILOGUES):
        dtype = torch.float16 if number % 3 == 1 else BF16
        yield ScaledUp(256, 2 + number % 3, epilogue, dtype)
        if epilogue.kind not in GATED:
            yield ScaledUp(128, 6 - number % 2, epilogue, dtype)


def product(case: Scaled, counts: list[int], device: torch.device) -> Call:
    """Scales differ by magnitudes between neighbours, so that a wrong one shows."""
    experts, used, cut = len(counts), sum(counts), case.cut()
    rows, inner = used + 3, KD + 8  # the last are of no expert; rows of 16 bytes, not of 128
    columns = 2 * INNER + 6
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    a = padded(rows, inner, device=device, dtype=FLOAT8)
    b = padded(experts, columns, inner, device=device, dtype=FLOAT8).mT
    a[used:] = torch.nan
    blocks = ceil_div(inner, 128), ceil_div(columns, 128)
    by_row = torch.randn(blocks[0], rows, device=device).exp().t()
    by_column = torch.randn(experts, *blocks, device=device).exp()
    by_row[used:] = torch.nan
    bias = torch.randn(experts, columns, device=device).to(case.dtype) if case.biased else None
    out = torch.empty(rows, columns, dtype=case.dtype, device=device)
    tiles = build_tile_map(offsets, rows, cut.block_m)

    def multiply() -> None:
        multiply_scaled_rows((a, by_row), (b, by_column), bias, out, tiles, cut)
        zero_tail(out, offsets)

    left = reference.dequantize_rows(a, by_row, torch.float64)
    weights = reference.dequantize_weights(b, by_column, torch.float64)
    right = products(left, weights, bias, counts).nan_to_num(0.0)
    # float16 is rounded to more closely than tensor cores sum
    limit = 4e-3 if case.dtype == BF16 else 4e-4 + float8_limit(device)
    selected = lambda: _operands.has_hopper_scaled(cut, b, a, out)  # noqa: E731
    return Call(selected, multiply, [(out, right)], (limit,))


def projection(case: ScaledUp, counts: list[int], device: torch.device) -> Call:
    """Scales differ by factors between neighbours, so that a wrong one shows."""
    (kind, interleaved, biased, saves), cut = case.epilogue, case.cut()
    activation = Activation(kind, interleaved, ALPHA, LIMIT)
    halves = activation.gated and not interleaved
    # halves begin with a block of columns; else the last block may be a part of one
    inner, contracted = 256 if halves else INNER, KD + 8
    width = inner * (2 if activation.gated else 1)
    experts, used = len(counts), sum(counts)
    rows = used + 3  # the last are of no expert
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    x = padded(rows, contracted, device=device, dtype=FLOAT8)
    w = padded(experts, width, contracted, device=device, dtype=FLOAT8).mT
    x[used:] = torch.nan
    blocks = ceil_div(contracted, 128), ceil_div(width, 128)
    by_row = (torch.randn(blocks[0], rows, device=device) / 2).exp().t() / 8
    by_column = (torch.randn(experts, *blocks, device=device) / 2).exp() / 8
    by_row[used:] = torch.nan
    bias = torch.randn(experts, width, device=device).to(case.dtype) if biased else None
    h = torch.empty(rows if saves else 0, width, dtype=case.dtype, device=device)
    values = torch.empty(rows, inner, device=device).to(FLOAT8)
    scales = torch.empty(ceil_div(inner, 128), rows, device=device).t()
    found, of_scales = torch.empty(rows, inner, device=device), torch.empty_like(scales)
    tiles = build_tile_map(offsets, rows, cut.block_m)

    def project() -> None:
        values.fill_(torch.nan)
        scales.fill_(torch.nan)
        pairs = (x, by_row), (w, by_column)
        _project_up(*pairs, bias, offsets, h, (values, scales), activation, tiles, cut)
        found.copy_(reference.dequantize_rows(values, scales, torch.float64) / of_row)
        of_scales.copy_(scales / of_block)

    left = reference.dequantize_rows(x, by_row, torch.float64)
    weights = reference.dequantize_weights(w, by_column, torch.float64)
    right = products(left, weights, bias, counts)
    a = reference.expert_activation(right, kind, None, interleaved, ALPHA, LIMIT)
    padded_a = torch.nn.functional.pad(a, (0, -inner % 128)).unflatten(1, (-1, 128))
    # as parts of what they should be: a few rows are far larger than all others
    of_row, of_block = a.norm(dim=1, keepdim=True), padded_a.abs().amax(2) / 448
    # a value of float8 is wrong by a sixteenth at most, and by 2.6 percent in the mean square
    outputs = [(found, a / of_row, 4e-2), (of_scales, of_block / of_block, 8e-3)]
    outputs += [(h, right.nan_to_num(0.0), 4e-3)] if saves else []
    return Call(
        lambda: activates_in_roles(activation, x, w, h, inner, cut),
        project,
        [(out, expected) for out, expected, _ in outputs],
        tuple(limit for _, _, limit in outputs),
    )
