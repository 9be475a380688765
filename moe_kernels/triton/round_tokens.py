"""Every expert's tokens rounded to a multiple of the tile of a grouped GEMM.

T tokens, C columns of which the first K were chosen, R = T * C slots, E experts.

Slots are sorted by expert. One program an expert then counts its slots, finds how many of one kind,
chosen or candidates, it keeps, and the least weight among those by a radix select: digit by digit
from the highest, 256 bins each. Slots are in order within an expert, so that ties go to the lowest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import checks_values, float_type, on_device_of
from moe_kernels.triton._math import sort_key
from moe_kernels.triton._replay import launch
from moe_kernels.triton._tiles import row_range
from moe_kernels.triton.sort_by_expert import check_ids, sort_by_expert

BLOCK = 512
BINS = tl.constexpr(256)
DIGIT = tl.constexpr(8)  # bits


@triton.jit
def _load_slots(
    row_to_slot, token_mask, first, end, R, C, stride_m, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """The slots of rows from ``first`` on, and which of them take part."""
    row = first + tl.arange(0, BLOCK)
    slot = tl.load(row_to_slot + row, mask=row < end, other=-1)
    live = (slot >= 0) & (slot < R)
    if MASKED:
        token = (slot // C).to(tl.int64)
        live &= tl.load(token_mask + token * stride_m, mask=live, other=0) != 0
    return slot, live


@triton.jit
def _load_keys(weights, slot, live, C, stride_t, stride_c, WIDE: tl.constexpr, BITS: tl.constexpr):
    """Weights, and unsigned integers that order as they do, NaN above all."""
    cell = weights + (slot // C).to(tl.int64) * stride_t + (slot % C).to(tl.int64) * stride_c
    weight = tl.load(cell, mask=live, other=0.0)
    key = sort_key(weight.to(WIDE))
    if BITS == 64:
        unsigned = key.to(tl.uint64, bitcast=True) ^ (tl.full(key.shape, 1, tl.uint64) << 63)
    else:
        unsigned = key.to(tl.uint32, bitcast=True) ^ (tl.full(key.shape, 1, tl.uint32) << 31)
    return weight, unsigned


@triton.jit
def _target(chosen, available, tile, MODE: tl.constexpr):
    """How many slots the expert keeps; see ``rounded_count`` of the definition."""
    rest = chosen % tile
    missing = tl.where(rest > 0, tile - rest, 0)
    if MODE == "up":
        target = chosen + tl.minimum(missing, available)
    elif MODE == "nearest":
        grows = (2 * rest >= tile) & (missing <= available)
        target = tl.where(grows, chosen + missing, chosen - rest)
    else:
        tl.static_assert(MODE == "down")
        target = chosen - rest
    return target


@triton.jit(do_not_specialize=["R", "E", "C", "top_k", "tile"])
def _round_tokens_kernel(
    weights, row_to_slot, offsets, token_mask, out_weights, out_ids, load, R, E, C, top_k, tile,
    stride_t, stride_c, stride_m,
    MODE: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    begin, end = row_range(offsets, expert, True, R)
    chosen = tl.zeros((), tl.int32)
    available = tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK):
        slot, live = _load_slots(row_to_slot, token_mask, first, end, R, C, stride_m, MASKED, BLOCK)
        is_chosen = slot % C < top_k
        chosen += tl.sum((live & is_chosen).to(tl.int32), 0)
        available += tl.sum((live & (is_chosen == 0)).to(tl.int32), 0)
    target = _target(chosen, available, tile, MODE)
    tl.store(load + expert, target)
    # of chosen slots some are kept and no candidate, or all of them and some candidates
    drops = target < chosen
    wanted = tl.where(drops, target, target - chosen)

    bin = tl.arange(0, BINS)
    threshold = tl.zeros((), tl.uint64 if BITS == 64 else tl.uint32)
    for step in tl.static_range(BITS // DIGIT):
        shift = BITS - (step + 1) * DIGIT
        counts = tl.zeros((BINS,), tl.int32)
        for first in range(begin, end, BLOCK):
            slot, live = _load_slots(
                row_to_slot, token_mask, first, end, R, C, stride_m, MASKED, BLOCK
            )
            _, key = _load_keys(weights, slot, live, C, stride_t, stride_c, WIDE, BITS)
            competes = live & ((slot % C < top_k) == drops)
            if step > 0:
                competes &= (key >> (shift + DIGIT)) == threshold
            digit = ((key >> shift) & (BINS - 1)).to(tl.int32)
            counts += tl.histogram(digit, BINS, mask=competes)
        from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        best = tl.max(tl.where(from_here >= wanted, bin, 0), 0)
        wanted -= tl.sum(tl.where(bin > best, counts, 0), 0)
        threshold = (threshold << DIGIT) | best.to(threshold.dtype)

    ties = tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK):
        slot, live = _load_slots(row_to_slot, token_mask, first, end, R, C, stride_m, MASKED, BLOCK)
        weight, key = _load_keys(weights, slot, live, C, stride_t, stride_c, WIDE, BITS)
        is_chosen = slot % C < top_k
        competes = live & (is_chosen == drops)
        tied = (competes & (key == threshold)).to(tl.int32)
        earlier = ties + tl.cumsum(tied, 0) - tied
        wins = competes & ((key > threshold) | ((tied > 0) & (earlier < wanted)))
        kept = wins | (live & is_chosen & (drops == 0))
        inside = (slot >= 0) & (slot < R)
        tl.store(out_ids + slot, tl.where(kept, expert, -1), mask=inside)
        tl.store(out_weights + slot, tl.where(kept, weight, 0.0), mask=inside)
        ties += tl.sum(tied, 0)

    # slots of no expert, shared out among the programs
    tail = tl.minimum(tl.maximum(tl.load(offsets + E), 0), R)
    for first in range(tail + expert * BLOCK, R, E * BLOCK):
        row = first + tl.arange(0, BLOCK)
        slot = tl.load(row_to_slot + row, mask=row < R, other=-1)
        inside = (slot >= 0) & (slot < R)
        tl.store(out_ids + slot, tl.full((BLOCK,), -1, tl.int32), mask=inside)
        zero = tl.zeros((BLOCK,), out_weights.dtype.element_ty)
        tl.store(out_weights + slot, zero, mask=inside)


def round_tokens(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_mask: Tensor | None,
    num_experts: int,
    top_k: int,
    tile: int,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    R, E = topk_ids.numel(), num_experts
    if checks_values():
        meaning = f" (-1 and {E} mean dropped)"
        check_ids("round_tokens", "topk_ids", topk_ids, -1, E, meaning)
    out_weights = topk_weights.new_empty(topk_weights.shape)
    out_ids = topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)
    load = topk_ids.new_empty(E, dtype=torch.int32)
    if R == 0 or E == 0:
        return out_weights.zero_(), out_ids.fill_(-1), load.zero_()
    row_to_slot, _, offsets = sort_by_expert(topk_ids, E)
    wide = float_type(topk_weights)
    with on_device_of(topk_ids):
        launch(
            _round_tokens_kernel, (E,),
            topk_weights, row_to_slot, offsets, token_mask, out_weights, out_ids, load,
            R, E, topk_ids.shape[1], top_k, tile, *topk_weights.stride(),
            0 if token_mask is None else token_mask.stride(0),
            MODE=mode, MASKED=token_mask is not None, WIDE=wide, BITS=wide.primitive_bitwidth,
            BLOCK=BLOCK,
        )  # fmt: skip
    return out_weights, out_ids, load
