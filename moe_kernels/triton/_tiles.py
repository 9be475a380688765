"""Which rows each tile of a grouped GEMM has, found on the device.

R rows, E experts. A tile holds up to BLOCK_M rows of one expert; experts start new tiles. The host
knows only how many tiles there can be, so kernels read how many there are and loop that far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import ceil_div, next_power_of_2
from moe_kernels.triton._replay import launch

BLOCK_T = 128
EXPERTS = 32


class TileMap(NamedTuple):
    """Row tiles in the order of their rows.

    Attributes:
        tiles: int32 ``[1 + 3 * bound]``: how many there are; the expert of each; the first row of
            each; the row where the expert of each ends.
        bound: the most tiles there can be.
    """

    tiles: Tensor
    bound: int


@triton.jit
def row_range(offsets, expert, mask, rows):
    """The rows of an expert, within [0, rows] whatever the offsets."""
    begin = tl.load(offsets + expert, mask=mask, other=0)
    end = tl.load(offsets + expert + 1, mask=mask, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    return begin, tl.minimum(tl.maximum(end, begin), rows)


@triton.jit
def write_tile_map(
    program, offsets, tiles, rows, E, bound,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """A program's part of the map: BLOCK_T tiles."""
    tile = program * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.zeros((BLOCK_T,), tl.int32)  # how many experts end before the tile
    first = tl.zeros((BLOCK_T,), tl.int32)  # how many tiles they have
    total = tl.zeros((), tl.int32)
    for start in range(0, E, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        begin, end = row_range(offsets, e, e < E, rows)
        count = tl.where(e < E, tl.cdiv(end - begin, BLOCK_M), 0)
        ends = total + tl.cumsum(count, 0)
        before = (ends[None, :] <= tile[:, None]) & (e < E)[None, :]
        expert += tl.sum(before.to(tl.int32), 1)
        first += tl.sum(tl.where(before, count[None, :], 0), 1)
        total += tl.sum(count, 0)
    total = tl.minimum(total, bound)
    if program == 0:
        tl.store(tiles, total)
    inside = tile < total
    begin, end = row_range(offsets, expert, inside, rows)
    tl.store(tiles + 1 + tile, expert, mask=inside)
    tl.store(tiles + 1 + bound + tile, begin + (tile - first) * BLOCK_M, mask=inside)
    tl.store(tiles + 1 + 2 * bound + tile, end, mask=inside)


@triton.jit(do_not_specialize=["rows", "E", "bound"])
def _tile_map_kernel(
    offsets, tiles, rows, E, bound,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    write_tile_map(tl.program_id(0), offsets, tiles, rows, E, bound, BLOCK_M, BLOCK_T, EXPERTS)


@triton.jit
def tile_count(tiles):
    return tl.load(tiles)


@triton.jit
def load_tile(tiles, bound, tile):
    """The tile's expert, first row, and the row where the expert ends."""
    tiles += 1 + tile
    return tl.load(tiles), tl.load(tiles + bound), tl.load(tiles + 2 * bound)


@triton.jit
def walk(step, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row and column tile of a step: all columns of GROUP_M row tiles, then of the next."""
    group = step // (GROUP_M * column_tiles)
    first = group * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M)
    within = step - first * column_tiles
    return first + within % height, within // height


@triton.jit
def column_halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


def tile_bound(rows: int, experts: int, block_m: int) -> int:
    """The most tiles that ``rows`` rows of ``experts`` experts can have."""
    return (rows + min(experts, rows) * (block_m - 1)) // block_m


def empty_tile_map(device: torch.device, rows: int, experts: int, block_m: int) -> TileMap:
    """A map to be written, of ``rows`` rows: at least one, and one expert."""
    bound = tile_bound(rows, experts, block_m)
    return TileMap(torch.empty(1 + 3 * bound, dtype=torch.int32, device=device), bound)


def tile_map_cut(experts: int, block_m: int) -> dict[str, int]:
    """How :func:`write_tile_map` is cut."""
    return {
        "BLOCK_M": block_m,
        "BLOCK_T": BLOCK_T,
        "EXPERTS": min(next_power_of_2(experts), EXPERTS),
    }


def build_tile_map(offsets: Tensor, rows: int, block_m: int) -> TileMap:
    """The tiles of the first ``rows`` rows; needs at least one row and one expert."""
    experts = offsets.numel() - 1
    tiles, bound = empty_tile_map(offsets.device, rows, experts, block_m)
    launch(
        _tile_map_kernel, (ceil_div(bound, BLOCK_T),), offsets, tiles, rows, experts, bound,
        **tile_map_cut(experts, block_m),
    )  # fmt: skip
    return TileMap(tiles, bound)
