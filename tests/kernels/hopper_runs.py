"""The kernels whose warps have roles, run: on a GPU, as they are.

    python -m tests.kernels.hopper_runs up_turns

runs a group of cases and names each before it does. It is a process of its own, since a kernel that
does not end takes its process along. Without a GPU the plain kernels compute the same.

E experts, Kd contracted size, N columns; a weight's gradient is [M, N].
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.triton import _operands
from moe_kernels.triton._activation import GATED, Activation
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton._fused_experts_backward import _through_down
from moe_kernels.triton._launch import ceil_div, processors
from moe_kernels.triton._operands import Source
from moe_kernels.triton._tiles import TileMap, build_tile_map
from moe_kernels.triton._wgrad import weight_gradient
from moe_kernels.triton.fused_experts import _project_up
from moe_kernels.triton.grouped_gemm import multiply_rows, zero_tail
from tests.kernels.hopper_calls import ALPHA, BF16, INNER, KD, LIMIT, TOP_K, Call, padded
from tests.kernels.hopper_checks import (
    BACKWARD_EPILOGUES,
    EPILOGUES,
    BackwardEpilogue,
    Epilogue,
    backward,
    products,
)
from tests.kernels.hopper_scaled_runs import Scaled, ScaledUp, scaled_up_cases
from tests.kernels.hopper_scaled_runs import product as scaled_product
from tests.kernels.hopper_scaled_runs import projection as scaled_projection

CHUNKS = (range(256), range(256, 272))  # of the columns of backward through the down-projection
# rows, columns and slots; of a group of warps, which take turns, or halved
UP_TILES = {"turns": (128, 64, 4), "turns_64": (64, 128, 5), "shared": (128, 128, 4)}
GEMM_TILES = {
    "turns": (128, 128, 4),
    "turns_64": (64, 256, 5),
    "shared": (128, 256, 4),
    "shared_256": (256, 128, 3),
}
DOWN_TILES = {tile: (*GEMM_TILES[tile][:2], 3) for tile in GEMM_TILES} | {"turns": (128, 128, 4)}
GATHERING_TILES = [tile for tile in DOWN_TILES if DOWN_TILES[tile][0] <= 128]

GRADIENT_TILES = {
    "turns": (128, 128, 6),
    "turns_64": (64, 256, 4),
    "shared": (128, 256, 4),
    "shared_256": (256, 128, 3),
}


@dataclass(frozen=True)
class Case:
    """A kernel, and what it is compiled for.

    Attributes:
        epilogue: of the up-projection, or of backward through the down-projection; else the grouped
            GEMM, ``biased`` or not.
        transposed: weights are stored [E, N, Kd].
        gathered: backward through the down-projection gathers rows itself.
    """

    tile: str
    transposed: bool
    epilogue: Epilogue | BackwardEpilogue | None = None
    biased: bool = False
    gathered: bool = False

    def cut(self) -> Config:
        tiles = UP_TILES if isinstance(self.epilogue, Epilogue) else GEMM_TILES
        if isinstance(self.epilogue, BackwardEpilogue):
            tiles = DOWN_TILES
        block_m, block_n, stages = tiles[self.tile]
        by = "gluon_gather" if self.gathered else "gluon"
        return Config(block_m, block_n, 64, warps=8, stages=stages, warp_specialize=by)


@dataclass(frozen=True)
class Gradient:
    """The weight gradient, and what it is compiled for.

    Attributes:
        gathered: "a", "grad" or "", the operand whose rows are.
        transposed: it is stored [E, N, M].
    """

    tile: str
    gathered: str = ""
    accumulate: bool = False
    dtype: torch.dtype = BF16
    transposed: bool = False

    def cut(self) -> Config:
        block_m, block_n, stages = GRADIENT_TILES[self.tile]
        return Config(block_m, block_n, 64, warps=8, stages=stages, warp_specialize="gluon")


def _cases(
    tiles: Iterable[str], tile: str, epilogues: Sequence[Epilogue | BackwardEpilogue]
) -> list[Case]:
    """Every epilogue is in one tile's list, and of each list weights are stored both ways."""
    tiles = list(tiles)
    chosen = epilogues[tiles.index(tile) :: len(tiles)]
    return [Case(tile, i % 2 == 0, epilogue) for i, epilogue in enumerate(chosen)]


def _gathering_cases(tile: str) -> list[Case]:
    wide = DOWN_TILES[tile][1] > 128
    epilogues = [e for e in BACKWARD_EPILOGUES if not (e.interleaved or (wide and e.clamps))]
    return [replace(case, gathered=True) for case in _cases(GATHERING_TILES, tile, epilogues)]


AnyCase = Case | Gradient | Scaled | ScaledUp
GROUPS: dict[str, list[AnyCase]] = {
    **{f"up_{tile}": list(_cases(UP_TILES, tile, EPILOGUES)) for tile in UP_TILES},
    **{f"down_{tile}": list(_cases(DOWN_TILES, tile, BACKWARD_EPILOGUES)) for tile in DOWN_TILES},
    **{f"down_gathers_{tile}": list(_gathering_cases(tile)) for tile in GATHERING_TILES},
    "gemm_turns": [Case("turns", True, biased=True), Case("turns_64", False)],
    "gemm_shared": [Case("shared", False, biased=True), Case("shared_256", True)],
    "scaled_shared": [
        Scaled(256, 4),
        Scaled(256, 3, biased=True, dtype=torch.float16),
        Scaled(256, 2, biased=True),
    ],
    **{f"scaled_up_{part}": list(scaled_up_cases())[part::4] for part in range(4)},
    "scaled_128": [Scaled(128, 6, biased=True), Scaled(128, 5, dtype=torch.float16)],
    "wgrad_shared": [
        Gradient("shared", "grad", transposed=True),
        Gradient("shared", "grad"),
        Gradient("shared"),
        Gradient("shared_256", "a"),
    ],
    "wgrad_turns": [
        Gradient("turns", "grad"),
        Gradient("turns", transposed=True),
        Gradient("turns_64", "a"),
    ],
    "wgrad_sums": [
        Gradient("shared", "a", True, torch.float32, transposed=True),
        Gradient("shared", "", True),
        Gradient("shared_256", "grad", False, torch.float32),
        Gradient("turns", "grad", True, torch.float32),
    ],
}


def routings(case: AnyCase, device: torch.device) -> dict[str, list[int]]:
    """Rows of each expert."""
    if isinstance(case, Gradient):
        return {
            "ragged": [65, 0, 512, 37, 1],
            "all to one": [0, 0, 720, 0],
            "many": [i * 37 % 500 for i in range(2 * processors(device) + 3)],
        }
    block_m = case.cut().block_m
    return {
        "ragged": [block_m + 1, 0, 2 * block_m, 37, 1],
        "all to one": [0, 0, 2 * block_m + 77, 0],
        # so that every program walks several tiles, and comes around the ring
        "many": [processors(device) * block_m, 0, 5, processors(device) * block_m + 3],
    }


def _weight(experts: int, columns: int, case: Case, device: torch.device) -> Tensor:
    if case.transposed:
        return padded(experts, columns, KD, device=device).mT
    return padded(experts, KD, columns, device=device)


def _gradient(case: Gradient, counts: list[int], device: torch.device) -> Call:
    experts, used, columns = len(counts), sum(counts), (208, 144)
    rows = used + 3  # the last are of no expert
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    slots = torch.randperm(rows, device=device).int()
    slots[used:] = 2**30  # never read
    operands: list[Tensor] = []
    sources: list[Source | None] = []
    found: list[Tensor] = []
    for name, width in zip(("a", "grad"), columns, strict=True):
        gathered = name == case.gathered
        operand = padded(rows // TOP_K + 1 if gathered else rows, width, device=device)
        if not gathered:
            operand[used:] = torch.nan
        operands.append(operand)
        sources.append(Source(slots, TOP_K) if gathered else None)
        found.append(operand[slots[:used].long() // TOP_K] if gathered else operand[:used])
    sides = columns[::-1] if case.transposed else columns
    out = torch.empty(experts, *sides, dtype=case.dtype, device=device)
    before = torch.randn(experts, *columns, device=device).to(case.dtype)
    parts = (value.double().split(counts) for value in found)
    right = torch.stack([a.T @ grad for a, grad in zip(*parts, strict=True)])
    if case.accumulate:
        right += before.double()
    out = out.mT if case.transposed else out
    a, grad = zip(operands, sources, strict=True)

    def add() -> None:
        if case.accumulate:
            out.copy_(before)
        weight_gradient(
            *a, *grad, offsets, used, out, accumulate=case.accumulate, cut=case.cut()
        )  # fmt: skip

    def selected() -> bool:
        # what is stored by columns is written as the transposed product
        pairs = (*grad, *a, out.mT) if case.transposed else (*a, *grad, out)
        return _operands.has_hopper_wgrad(case.cut(), *pairs, accumulate=case.accumulate)

    return Call(selected, add, list(zip(out, right, strict=True)))


def call(case: AnyCase, counts: list[int], device: torch.device) -> Call:
    if isinstance(case, Gradient):
        return _gradient(case, counts, device)
    if isinstance(case, Scaled):
        return scaled_product(case, counts, device)
    if isinstance(case, ScaledUp):
        return scaled_projection(case, counts, device)
    experts, used = len(counts), sum(counts)
    rows = used + 3  # the last are of no expert
    cut = case.cut()
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    tiles = build_tile_map(offsets, rows, cut.block_m)
    if case.epilogue is None:
        # columns that are no multiple of 16 bytes, where the weights' storage lets them be
        columns = 2 * INNER + 6 if case.transposed else 2 * INNER
        a, b = padded(rows, KD, device=device), _weight(experts, columns, case, device)
        bias = torch.randn(experts, columns, device=device).to(BF16) if case.biased else None
        out = torch.empty(rows, columns, dtype=BF16, device=device)

        def is_gluon() -> bool:
            x = _operands.row_operand(a, None, cut.block_m, cut.block_k)
            w = _operands.weight_operand(b, cut.block_k, cut.block_n)
            return _operands.has_hopper_gemm(cut, w, x, out)

        def multiply() -> None:
            multiply_rows(a, b, bias, out, tiles, cut)
            zero_tail(out, offsets)

        return Call(is_gluon, multiply, [(out, products(a, b, bias, counts).nan_to_num(0.0))])

    if isinstance(case.epilogue, BackwardEpilogue):
        return _backward_call(case, case.epilogue, counts, offsets, tiles, device)

    kind, interleaved, biased, saves = case.epilogue
    columns = INNER * (2 if kind in GATED else 1)
    activation = Activation(kind, interleaved, ALPHA, LIMIT)
    tokens = rows // TOP_K + 1
    x, w = padded(tokens, KD, device=device), _weight(experts, columns, case, device)
    shift = torch.randn(experts, columns, device=device).to(BF16) if biased else None
    slots = torch.randperm(rows, device=device).int()
    slots[used:] = 2**30  # never read
    rows_of = torch.full((tokens * TOP_K,), rows, dtype=torch.int32, device=device)
    rows_of[slots[:used].long()] = torch.arange(used, dtype=torch.int32, device=device)
    order = slots, rows_of.view(tokens, TOP_K), offsets
    h = torch.empty(rows if saves else 0, columns, dtype=BF16, device=device)
    activated = torch.empty(rows, INNER, dtype=BF16, device=device)

    def project() -> None:
        _project_up(x, w, shift, order, h, activated, activation, tiles, cut)

    gathered = x[slots.clamp(max=rows - 1).long() // TOP_K]
    sums = products(gathered, w, shift, counts)
    right = reference.expert_activation(sums, kind, None, interleaved, ALPHA, LIMIT)
    return Call(
        lambda: _operands.has_hopper_up(cut, w, x, activated, kind),
        project,
        [(activated, right)] + ([(h, sums.nan_to_num(0.0))] if saves else []),
    )


def _backward_call(
    case: Case,
    epilogue: BackwardEpilogue,
    counts: list[int],
    offsets: Tensor,
    tiles: TileMap,
    device: torch.device,
) -> Call:
    """All columns in two launches, as where buffers would be large; dH over h every second time."""
    kind, interleaved, clamps, writes = epilogue
    used, columns, cut = sum(counts), CHUNKS[-1].stop, case.cut()
    rows = 4 * ceil_div(used + 3, 4)  # so that both launches are of one kernel, of aligned parts
    activation = Activation(kind, interleaved, ALPHA, LIMIT if clamps else math.inf)
    grad = rows_of_grad = padded(rows, KD, device=device)
    rows_source = None
    if case.gathered:
        slots = torch.randperm(rows, device=device).int()
        grad = padded(ceil_div(rows, TOP_K), KD, device=device)
        rows_of_grad = grad[slots.long() // TOP_K]
        slots[used:] = 2**30  # never read
        rows_source = Source(slots, TOP_K)
    down = _weight(len(counts), columns, case, device).mT
    h = torch.randn(rows, columns * (2 if kind in GATED else 1), device=device).to(BF16)
    scale = torch.rand(rows, device=device)
    dh = torch.empty_like(h)
    a = [torch.empty(rows, len(chunk), dtype=BF16, device=device) for chunk in CHUNKS]
    partials = torch.empty(ceil_div(columns, cut.block_n), rows, device=device)
    ds = torch.empty(1, used, device=device)
    h[used:] = torch.nan
    overwrites = itertools.cycle([False, "h" in writes])

    def through_down() -> None:
        partials.fill_(torch.nan)
        source = h
        if next(overwrites):
            source = dh.copy_(h)
        for chunk, part in zip(CHUNKS, a, strict=True):
            _through_down(
                grad, rows_source, down, source, scale, activation, chunk,
                dh if "h" in writes else None, part if "a" in writes else None,
                partials if "s" in writes else None, tiles, cut,
            )  # fmt: skip
        assert partials[:, used:].isnan().all(), "written for rows of no expert"
        torch.sum(partials[:, :used], 0, keepdim=True, out=ds)

    right_h, right_a, right_s = backward(rows_of_grad, down, h, scale, activation, counts)
    outputs = {
        "h": [(dh, right_h)],
        "a": list(zip(a, right_a.split([len(chunk) for chunk in CHUNKS], 1), strict=True)),
        # compared as one row, since some of them are the difference of large numbers
        "s": [(ds, right_s[:used].T)],
    }

    def selected() -> bool:
        chosen = _operands.has_hopper_down_backward(cut, grad, down, h)
        gathers = _operands.gathers_grad(cut, grad, interleaved, activation.limit)
        return chosen and gathers == case.gathered

    return Call(
        selected,
        through_down,
        [pair for name in writes for pair in outputs[name]],
    )


def run(case: AnyCase, counts: list[int], device: torch.device) -> None:
    """Run it twice: results are right, and the same bits."""
    made = call(case, counts, device)
    kept: list[Tensor] = []
    for _ in range(2):
        made.poison()
        made.run()
        made.check()
        bits = [
            out.clone(memory_format=torch.contiguous_format).view(torch.int16)
            for out, _ in made.outputs
        ]
        assert all(torch.equal(one, other) for one, other in zip(kept, bits, strict=False))
        kept = bits


def _calls(group: str, device: torch.device) -> Iterator[tuple[str, AnyCase, list[int]]]:
    for case in GROUPS[group]:
        for name, counts in routings(case, device).items():
            yield f"{case}, {name}", case, counts


if __name__ == "__main__":
    torch.manual_seed(0)
    gpu = torch.device("cuda")
    for text, chosen, rows_of_experts in _calls(sys.argv[1], gpu):
        print(text, flush=True)
        assert call(chosen, [1, 1], gpu).selected(), "the plain kernel is chosen"
        run(chosen, rows_of_experts, gpu)
