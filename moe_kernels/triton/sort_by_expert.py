"""Order slots by expert: a stable counting sort.

R slots, E experts, B blocks of BLOCK slots. Slots that belong to no expert have bin E, and lanes
past the last slot bin E + 1.

A slot's row is the first row of its bin, plus the slots of that bin in earlier blocks, plus those
earlier in its block: integers only, so the order is the same however programs are scheduled.
Several blocks take three launches: count bins in each, sum the counts over earlier blocks, scatter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import ceil_div, checks_values, next_power_of_2, on_device_of
from moe_kernels.triton._tiles import TileMap, build_tile_map, empty_tile_map

ONE_BLOCK = 1024  # up to as many slots are sorted in one launch
BLOCK = 256
LANES = 16  # slots that every slot of a block is compared with at a time
SCAN_BLOCKS, SCAN_BINS = 32, 32  # tile of the sum over blocks


@triton.jit
def _load_bins(ids, slot, R, E):
    expert = tl.load(ids + slot, mask=slot < R, other=0)
    bins = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return tl.where(slot < R, bins, E + 1)


@triton.jit
def _rank_in_block(ids, bins, lane, first, R, E, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """How many earlier lanes of the block have the same bin."""
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, LANES):
        other = start + tl.arange(0, LANES)
        same = _load_bins(ids, first + other, R, E)[None, :] == bins[:, None]
        rank += tl.sum((same & (other[None, :] < lane[:, None])).to(tl.int32), 1)
    return rank


@triton.jit
def _store_tiles(tiles, bound, expert, first_row, count, E, rows, BLOCK_M: tl.constexpr):
    """The map of ``_tiles.py``, from the rows of all experts: each writes its own tiles."""
    begin = tl.minimum(first_row, rows)
    end = tl.minimum(first_row + count, rows)
    number = tl.where(expert < E, tl.cdiv(end - begin, BLOCK_M), 0)
    first = tl.cumsum(number, 0) - number
    tl.store(tiles, tl.minimum(tl.sum(number, 0), bound))
    for i in range(tl.max(number, 0)):
        inside = (i < number) & (first + i < bound)
        cell = tiles + 1 + first + i
        tl.store(cell, expert, mask=inside)
        tl.store(cell + bound, begin + i * BLOCK_M, mask=inside)
        tl.store(cell + 2 * bound, end, mask=inside)


@triton.jit(do_not_specialize=["R", "E", "rows", "bound"])
def _sort_one_block_kernel(
    ids, row_to_slot, slot_to_row, offsets, tiles, R, E, rows, bound,
    BINS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, BLOCK)
    bins = _load_bins(ids, slot, R, E)
    count = tl.histogram(bins, BINS)
    first_row = tl.cumsum(count, 0) - count
    expert = tl.arange(0, BINS)
    tl.store(offsets + expert, first_row, mask=expert <= E)
    if BLOCK_M:
        _store_tiles(tiles, bound, expert, first_row, count, E, rows, BLOCK_M)
    row = tl.gather(first_row, bins, 0) + _rank_in_block(ids, bins, slot, 0, R, E, BLOCK, LANES)
    tl.store(row_to_slot + row, slot, mask=slot < R)
    tl.store(slot_to_row + slot, row, mask=slot < R)


@triton.jit(do_not_specialize=["R", "E"])
def _count_kernel(ids, counts, R, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    bins = _load_bins(ids, block * BLOCK + tl.arange(0, BLOCK), R, E)
    expert = tl.arange(0, BINS)
    tl.store(counts + block * (E + 1) + expert, tl.histogram(bins, BINS), mask=expert <= E)


@triton.jit(do_not_specialize=["B", "E"])
def _sum_earlier_kernel(counts, totals, B, E, SCAN_BLOCKS: tl.constexpr, SCAN_BINS: tl.constexpr):
    """Replace each block's counts by their sum over the blocks before it."""
    expert = tl.program_id(0) * SCAN_BINS + tl.arange(0, SCAN_BINS)
    earlier = tl.zeros((SCAN_BINS,), tl.int32)
    for start in range(0, B, SCAN_BLOCKS):
        block = start + tl.arange(0, SCAN_BLOCKS)
        cell = counts + block[:, None].to(tl.int64) * (E + 1) + expert[None, :]
        inside = (block < B)[:, None] & (expert <= E)[None, :]
        count = tl.load(cell, mask=inside, other=0)
        tl.store(cell, tl.cumsum(count, 0) - count + earlier[None, :], mask=inside)
        earlier += tl.sum(count, 0)
    tl.store(totals + expert, earlier, mask=expert <= E)


@triton.jit(do_not_specialize=["R", "E"])
def _scatter_kernel(
    ids, counts, totals, row_to_slot, slot_to_row, offsets, R, E,
    BINS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    bins = _load_bins(ids, slot, R, E)
    expert = tl.arange(0, BINS)
    total = tl.load(totals + expert, mask=expert <= E, other=0)
    first_row = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets + expert, first_row, mask=expert <= E)
    earlier = tl.load(counts + block * (E + 1) + bins, mask=bins <= E, other=0)
    rank = _rank_in_block(ids, bins, lane, block * BLOCK, R, E, BLOCK, LANES)
    row = tl.gather(first_row, bins, 0) + earlier + rank
    tl.store(row_to_slot + row, slot.to(tl.int32), mask=slot < R)
    tl.store(slot_to_row + slot, row, mask=slot < R)


def check_ids(op: str, name: str, ids: Tensor, low: int, high: int, meaning: str) -> None:
    """Synchronises: raise IndexError unless ids are in [low, high]."""
    outside = (ids < low) | (ids > high)
    if bool(outside.any()):
        raise IndexError(
            f"{op}: {name} must be in [{low}, {high}]{meaning}; got {int(ids[outside][0])}"
        )


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _sort(topk_ids, num_experts, None)


def sort_and_tile(
    topk_ids: Tensor, num_experts: int, rows: int, block_m: int
) -> tuple[tuple[Tensor, Tensor, Tensor], TileMap]:
    """The order, and the tiles of its first ``rows`` rows: one launch where one block sorts.

    Needs at least one row and one expert.
    """
    if topk_ids.numel() > ONE_BLOCK:
        order = _sort(topk_ids, num_experts, None)
        with on_device_of(topk_ids):
            return order, build_tile_map(order[2], rows, block_m)
    tiles = empty_tile_map(topk_ids.device, rows, num_experts, block_m)
    return _sort(topk_ids, num_experts, tiles, rows, block_m), tiles


def _sort(
    topk_ids: Tensor, num_experts: int, tiles: TileMap | None, rows: int = 0, block_m: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    if checks_values():
        meaning = f" (-1 and {num_experts} mean dropped)"
        check_ids("sort_by_expert", "topk_ids", topk_ids, -1, num_experts, meaning)
    ids = topk_ids.reshape(-1).contiguous()
    R, E = ids.numel(), num_experts
    row_to_slot = ids.new_empty(R, dtype=torch.int32)
    slot_to_row = ids.new_empty(topk_ids.shape, dtype=torch.int32)
    if R == 0:
        return row_to_slot, slot_to_row, ids.new_zeros(E + 1, dtype=torch.int32)
    offsets = ids.new_empty(E + 1, dtype=torch.int32)
    bins = max(next_power_of_2(E + 2), 32)
    with on_device_of(ids):
        if R <= ONE_BLOCK:
            block = max(next_power_of_2(R), 32)
            _sort_one_block_kernel[(1,)](
                ids, row_to_slot, slot_to_row, offsets, None if tiles is None else tiles.tiles, R,
                E, rows, 0 if tiles is None else tiles.bound, BINS=bins, BLOCK=block, LANES=LANES,
                BLOCK_M=block_m, num_warps=8 if block > 256 else 4,
            )  # fmt: skip
            return row_to_slot, slot_to_row, offsets
        blocks = ceil_div(R, BLOCK)
        counts = ids.new_empty((blocks, E + 1), dtype=torch.int32)
        totals = ids.new_empty(E + 1, dtype=torch.int32)
        _count_kernel[(blocks,)](ids, counts, R, E, BINS=bins, BLOCK=BLOCK)
        _sum_earlier_kernel[(ceil_div(E + 1, SCAN_BINS),)](
            counts, totals, blocks, E, SCAN_BLOCKS=SCAN_BLOCKS, SCAN_BINS=SCAN_BINS
        )
        _scatter_kernel[(blocks,)](
            ids, counts, totals, row_to_slot, slot_to_row, offsets, R, E,
            BINS=bins, BLOCK=BLOCK, LANES=LANES,
        )  # fmt: skip
    return row_to_slot, slot_to_row, offsets
