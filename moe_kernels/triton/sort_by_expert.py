"""Order slots by expert: a stable counting sort.

R slots, E experts, B blocks of BLOCK slots, P parts of as many blocks each. Slots that belong to no
expert have bin E, and lanes past the last slot bin E + 1.

A slot's row is the first row of its bin, plus the slots of that bin in earlier blocks, plus those
earlier in its block, which sorting its pairs of bin and lane tells: integers only, so the order is
the same however programs are scheduled.
Several blocks take two launches: one counts, a part a program, the bins of earlier blocks of the
part and of all; the other sums those over the parts and scatters, a block a program.

A slot whose row begins a tile of a grouped GEMM knows all of that tile, so that the tile map costs
no launch where slots are sorted for one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import ceil_div, checks_values, next_power_of_2, on_device_of
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import TileMap, empty_tile_map

ONE_BLOCK = 1024  # up to as many slots are sorted in one launch
BLOCK = 256
PARTS = 64  # the most
SCAN = 4096  # counts that are summed at a time


@triton.jit
def _load_bins(ids, slot, R, E):
    expert = tl.load(ids + slot, mask=slot < R, other=0)
    bins = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return tl.where(slot < R, bins, E + 1)


@triton.jit
def _sort_block(bins, BLOCK: tl.constexpr):
    """The block's bins in order, and the lane that each is from: stable, by sorting pairs."""
    pair = tl.sort(bins * BLOCK + tl.arange(0, BLOCK))
    return pair // BLOCK, pair % BLOCK


@triton.jit
def _write_tiles(
    tiles, bound, bins, row, inside, first_row, count, E, rows,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Write the tiles that begin at these slots; see ``TileMap``. Returns how many there are."""
    # within the rows of the map, as row_range has it
    begin = tl.minimum(first_row, rows)
    end = tl.minimum(first_row + count, rows)
    number = tl.where(tl.arange(0, BINS) < E, tl.cdiv(end - begin, BLOCK_M), 0)
    first_tile = tl.cumsum(number, 0) - number
    within = row - tl.gather(begin, bins, 0)
    starts = inside & (bins < E) & (row < rows) & (within % BLOCK_M == 0)
    cell = tiles + 1 + tl.gather(first_tile, bins, 0) + within // BLOCK_M
    tl.store(cell, bins, mask=starts)
    tl.store(cell + bound, row, mask=starts)
    tl.store(cell + 2 * bound, tl.gather(end, bins, 0), mask=starts)
    return tl.sum(number, 0)


@triton.jit(do_not_specialize=["R", "E", "rows", "bound"])
def _sort_one_block_kernel(
    ids, row_to_slot, slot_to_row, offsets, tiles, R, E, rows, bound,
    BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    bins = _load_bins(ids, row, R, E)
    count = tl.histogram(bins, BINS)
    first_row = tl.cumsum(count, 0) - count
    expert = tl.arange(0, BINS)
    tl.store(offsets + expert, first_row, mask=expert <= E)
    bins, slot = _sort_block(bins, BLOCK)
    tl.store(row_to_slot + row, slot, mask=row < R)
    tl.store(slot_to_row + slot, row, mask=row < R)
    if BLOCK_M > 0:
        number = _write_tiles(
            tiles, bound, bins, row, row < R, first_row, count, E, rows, BLOCK_M, BINS
        )
        tl.store(tiles, number)


@triton.jit(do_not_specialize=["R", "E", "B", "blocks"])
def _count_kernel(ids, earlier, totals, R, E, B, blocks, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """For each of a part's blocks, the bins of those before it in the part; and of all of them."""
    part = tl.program_id(0)
    expert = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    for block in range(part * blocks, tl.minimum((part + 1) * blocks, B)):
        first = tl.cast(block, tl.int64)
        tl.store(earlier + first * (E + 1) + expert, count, mask=expert <= E)
        count += tl.histogram(_load_bins(ids, first * BLOCK + tl.arange(0, BLOCK), R, E), BINS)
    tl.store(totals + part * (E + 1) + expert, count, mask=expert <= E)


@triton.jit(do_not_specialize=["R", "E", "P", "blocks", "rows", "bound"])
def _scatter_kernel(
    ids, earlier, totals, row_to_slot, slot_to_row, offsets, tiles,
    R, E, P, blocks, rows, bound,
    BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)  # in earlier parts
    for start in range(0, P, SCAN):
        part = start + tl.arange(0, SCAN)
        cell = totals + part[:, None] * (E + 1) + expert[None, :]
        inside = (part < P)[:, None] & (expert <= E)[None, :]
        found = tl.load(cell, mask=inside, other=0)
        count += tl.sum(found, 0)
        before += tl.sum(tl.where((part < block // blocks)[:, None], found, 0), 0)
    first_row = tl.cumsum(count, 0) - count
    if block == 0:
        tl.store(offsets + expert, first_row, mask=expert <= E)
    before += first_row + tl.load(earlier + block * (E + 1) + expert, mask=expert <= E, other=0)

    place = tl.arange(0, BLOCK)
    bins = _load_bins(ids, block * BLOCK + place, R, E)
    here = tl.histogram(bins, BINS)
    before -= tl.cumsum(here, 0) - here
    bins, lane = _sort_block(bins, BLOCK)
    slot = block * BLOCK + lane
    row = tl.gather(before, bins, 0) + place
    tl.store(row_to_slot + row, slot.to(tl.int32), mask=slot < R)
    tl.store(slot_to_row + slot, row, mask=slot < R)
    if BLOCK_M > 0:
        number = _write_tiles(
            tiles, bound, bins, row, slot < R, first_row, count, E, rows, BLOCK_M, BINS
        )
        if block == 0:
            tl.store(tiles, number)


def check_ids(op: str, name: str, ids: Tensor, low: int, high: int, meaning: str) -> None:
    """Synchronises: raise IndexError unless ids are in [low, high]."""
    outside = (ids < low) | (ids > high)
    if bool(outside.any()):
        raise IndexError(
            f"{op}: {name} must be in [{low}, {high}]{meaning}; got {int(ids[outside][0])}"
        )


def sort_by_expert(
    topk_ids: Tensor, num_experts: int, op: str = "sort_by_expert"
) -> tuple[Tensor, Tensor, Tensor]:
    """``op`` is what an error names."""
    return _sort(op, topk_ids, num_experts, None, 0, 0)


def sort_and_map(
    topk_ids: Tensor, num_experts: int, rows: int, block_m: int, op: str = "sort_by_expert"
) -> tuple[tuple[Tensor, Tensor, Tensor], TileMap]:
    """The order, and the tiles of its first ``rows`` rows: at least one, and one expert."""
    tile_map = empty_tile_map(topk_ids.device, rows, num_experts, block_m)
    return _sort(op, topk_ids, num_experts, tile_map, rows, block_m), tile_map


def _sort(
    op: str,
    topk_ids: Tensor,
    num_experts: int,
    tile_map: TileMap | None,
    rows: int,
    block_m: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if checks_values():
        meaning = f" (-1 and {num_experts} mean dropped)"
        check_ids(op, "topk_ids", topk_ids, -1, num_experts, meaning)
    ids = topk_ids.reshape(-1).contiguous()
    R, E = ids.numel(), num_experts
    row_to_slot = ids.new_empty(R, dtype=torch.int32)
    slot_to_row = ids.new_empty(topk_ids.shape, dtype=torch.int32)
    if R == 0:
        return row_to_slot, slot_to_row, ids.new_zeros(E + 1, dtype=torch.int32)
    offsets = ids.new_empty(E + 1, dtype=torch.int32)
    tiles, bound = (None, 0) if tile_map is None else tile_map
    bins = max(next_power_of_2(E + 2), 32)
    with on_device_of(ids):
        if R <= ONE_BLOCK:
            block = max(next_power_of_2(R), 32)
            launch(
                _sort_one_block_kernel, (1,),
                ids, row_to_slot, slot_to_row, offsets, tiles, R, E, rows, bound,
                BINS=bins, BLOCK=block, BLOCK_M=block_m,
                num_warps=8 if block > 256 else 4,
            )  # fmt: skip
            return row_to_slot, slot_to_row, offsets
        count = ceil_div(R, BLOCK)
        blocks = ceil_div(count, PARTS)  # of a part
        parts = ceil_div(count, blocks)
        earlier = ids.new_empty((count, E + 1), dtype=torch.int32)
        totals = ids.new_empty((parts, E + 1), dtype=torch.int32)
        launch(
            _count_kernel, (parts,),
            ids, earlier, totals, R, E, count, blocks, BINS=bins, BLOCK=BLOCK,
        )  # fmt: skip
        launch(
            _scatter_kernel, (count,),
            ids, earlier, totals, row_to_slot, slot_to_row, offsets, tiles,
            R, E, parts, blocks, rows, bound, BINS=bins, BLOCK=BLOCK, BLOCK_M=block_m,
            SCAN=max(min(SCAN // bins, next_power_of_2(PARTS)), 1),
        )  # fmt: skip
    return row_to_slot, slot_to_row, offsets
