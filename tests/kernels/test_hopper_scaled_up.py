"""The float8 up-projection whose warps have roles, for sm_90: its protocol, in a model; its use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.triton import _hopper_scaled_up, _operands
from moe_kernels.triton._activation import GATED, Activation
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton._scaled_up import activates_in_roles
from tests.conftest import HAS_GPU, triton_under_cpu
from tests.kernels.gluon_machine import DeadlockError, RaceError
from tests.kernels.gluon_model import Descriptor, Pointer
from tests.kernels.hopper_checks import (
    BLOCK_M,
    BLOCK_N,
    EPILOGUES,
    Epilogue,
    Mistake,
    Names,
    check,
    check_it_is_used_on_hopper_alone,
    check_that_some_schedule_ends_in,
    described,
    launch,
    no_mistake,
    other_parity,
    products,
    tile_map,
)

pytestmark = pytest.mark.skipif(HAS_GPU, reason="models what a GPU does")

FLOAT8, BLOCK = torch.float8_e4m3fn, BLOCK_N


def project(
    counts: list[int],
    contracted: int,
    columns: int,
    *,
    kind: str = "swiglu",
    interleaved: bool = False,
    biased: bool = False,
    saves: bool = True,
    parts: int = 2,
    stages: int = 3,
    seed: int = 0,
    mistake: Mistake = no_mistake,
    codes: list[tuple[Tensor, Tensor]] | None = None,
) -> list[tuple[Tensor, Tensor, float]]:
    """Of a model the activation, its scales, and h, each with what is right and the limit of its
    error; rows of no expert stay NaN.

    Args:
        counts: rows of each expert.
        columns: of the activation.
        parts: blocks of h in a tile; without a gate one will do.
        codes: gets float8 and scales as they are, and of what is right, rounded as the layer does.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, experts, gated = sum(counts) + 3, len(counts), kind in GATED
    halves, width = gated and not interleaved, columns * (2 if gated else 1)
    x, w = normal(rows, contracted).to(FLOAT8), normal(experts, contracted, width).to(FLOAT8)
    blocks_k, blocks_n = -(-contracted // BLOCK), -(-width // BLOCK)
    # of other magnitudes, so that a scale of another row or block shows
    by_row = torch.exp(normal(blocks_k, rows)).t() / 4
    by_column = torch.exp(normal(experts, blocks_k, blocks_n)) / 4
    bias = normal(experts, width)
    tiles, bound = tile_map(counts)
    h = torch.full((rows if saves else 0, width), torch.nan, dtype=torch.bfloat16)
    values = torch.full((rows, columns), torch.nan).to(FLOAT8)
    scales = torch.full((-(-columns // BLOCK), rows), torch.nan)
    # halves of a tile come as two copies
    block_n = BLOCK if halves else parts * BLOCK
    constants = Activation(kind, interleaved, 1.702, 0.5).constants(h)
    del constants["PRECISE"]
    arguments = (
        Descriptor(x, (BLOCK_M, BLOCK)), described(w, BLOCK, block_n, True),
        Pointer(by_row.t().flatten()), Pointer(by_column.flatten()), Pointer(bias.flatten()),
        Pointer(h.view(-1)), Pointer(values.view(-1)), Pointer(scales.view(-1)), Pointer(tiles),
        bound, columns if halves else width, contracted, 1.702, 0.5, *by_row.stride(),
        *by_column.stride(), width, 1, rows,
    )  # fmt: skip
    launch(
        _hopper_scaled_up._hopper_scaled_up_kernel, arguments, seed, mistake, BLOCK_N=block_n,
        BIASED=biased, SAVE_H=saves, BLOCK=BLOCK, K=BLOCK, STAGES=stages, **constants,
    )  # fmt: skip
    wide = by_row.repeat_interleave(BLOCK, 1)[:, :contracted].double()
    both = by_column.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    weights = w.double() * both[:, :contracted, :width]
    right = products(x.double() * wide, weights, bias if biased else None, counts)
    a = reference.expert_activation(right, kind, None, interleaved, 1.702, 0.5)
    found = reference.dequantize_rows(values, scales.t(), torch.float64, BLOCK)
    if codes is not None:
        options = (kind, None, interleaved, 1.702, 0.5)
        rounded = reference.expert_activation(right.bfloat16().double(), *options).bfloat16()
        codes += [(values, scales.t()), reference.quantize_rows(rounded, FLOAT8, BLOCK)]
    padded = torch.nn.functional.pad(a, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    # as parts of what they should be: a few rows are far larger than all others
    of_row, of_block = a.norm(dim=1, keepdim=True), padded.abs().amax(2) / 448
    # a value of float8 is wrong by a sixteenth at most, and by 2.6 percent in the mean square
    outputs = [
        (found / of_row, a / of_row, 4e-2),
        (scales.t() / of_block, of_block / of_block, 8e-3),
    ]
    return outputs + ([(h, right, 4e-3)] if saves else [])


@pytest.mark.parametrize(
    ("counts", "contracted", "columns", "stages"),
    [
        ([9, 0, 16, 3], 10, 24, 3),  # ragged rows and contraction; halves of tiles without rows
        ([8], 8, 8, 2),  # one tile of one step: a program with none
        ([5, 30], 8, 32, 4),  # tiles of a step, fewer than slots
        ([17], 48, 16, 2),  # more steps than slots
        ([1, 4, 2], 12, 8, 2),  # the second half never has rows
    ],
)
def test_every_schedule_gives_the_projection(
    counts: list[int], contracted: int, columns: int, stages: int
) -> None:
    for seed in range(4):
        options = {"biased": seed % 2 == 1, "interleaved": seed == 2, "saves": seed < 3}
        for out, right, limit in project(
            counts, contracted, columns, stages=stages, seed=seed, **options
        ):
            check(out, right, limit)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue_is_computed(epilogue: Epilogue) -> None:
    """The last block of columns is a part of one where a tile's neighbours are its blocks."""
    halves = epilogue.kind in GATED and not epilogue.interleaved
    ways = (2,) if epilogue.kind in GATED else (2, 1)
    for parts in ways:
        options = epilogue._asdict() | {"parts": parts}
        for out, right, limit in project([9, 4], 24, 16 if halves else 20, **options):
            check(out, right, limit)


@pytest.mark.parametrize(
    ("kind", "interleaved"), [("swiglu", False), ("geglu", True), ("silu", False)]
)
def test_is_rounded_as_it_would_be_afterwards(kind: str, interleaved: bool) -> None:
    """h to its dtype, its activation to the same, and that to float8: all but a few codes are the
    same, whose h or activation lay between two numbers."""
    codes: list[tuple[Tensor, Tensor]] = []
    project([9, 24, 16], 24, 32, kind=kind, interleaved=interleaved, codes=codes)
    (values, scales), (right, right_scales) = ([part[:49] for part in pair] for pair in codes)
    assert (values.view(torch.uint8) == right.view(torch.uint8)).float().mean() > 0.99
    assert ((scales / right_scales - 1).abs() < 1e-6).float().mean() > 0.95


def test_blocks_of_zeros_and_of_no_numbers() -> None:
    """As where a kernel rounds them afterwards: a scale of zero, or one that is NaN."""
    outputs = project([9], 8, 16, kind="relu2", biased=False, mistake=_with_odd_sums)
    values, scales = outputs[0][0], outputs[1][0]
    assert (scales[0] == 0).all()
    assert (values[0] == 0).all()
    assert scales[1].isnan().all()
    assert values[1].isnan().all()
    assert values[2:4].isfinite().all()  # the other group has two such rows of its own


def _with_odd_sums(names: Names) -> Names:
    """The first two rows' sums are below zero, and infinite."""
    complete = names["warpgroup_mma_wait"]

    def odd(number: int, deps: tuple[object]) -> Tensor:
        sums = complete(number, deps)
        sums = sums.values if not isinstance(sums, Tensor) else sums
        sums = sums.clone()
        sums[0], sums[1] = -1, torch.inf
        return sums

    return {"warpgroup_mma_wait": odd}


def test_no_tiles_are_nothing_to_do() -> None:
    for out, _, _ in project([0, 0], 8, 16):
        assert out.isnan().all()


def test_it_is_used_where_it_was_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Config(128, 256, 128, warps=8, stages=4, warp_specialize="gluon_activate")

    def used(
        kind: str = "swiglu",
        config: Config = cut,
        inner: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        *,
        interleaved: bool = False,
        saves: bool = False,
    ) -> bool:
        activation = Activation(kind, interleaved, 1.702, 4.0)
        width = inner * (2 if activation.gated else 1)
        weight = torch.empty(2, width, 128, dtype=FLOAT8).mT
        x, h = torch.empty(64, 128, dtype=FLOAT8), torch.empty(64 * saves, width, dtype=dtype)
        return activates_in_roles(activation, x, weight, h, inner, config)

    with triton_under_cpu():
        assert not used()  # Gluon is not interpreted
        monkeypatch.setattr(_operands, "INTERPRETED", False)
        assert used()
        assert used(saves=True)
        assert used(dtype=torch.float16)
        assert not used(dtype=torch.float32)
        assert not used(config=replace(cut, warp_specialize="gluon"))
        assert not used(config=replace(cut, warp_specialize="no"))
        # a tile has the 128 columns of a scale, of gate and of up
        one_block = replace(cut, block_n=128)
        assert not used(config=one_block)
        assert not used(config=one_block, interleaved=True)
        assert used("silu", one_block)
        assert not used("gelu", one_block)
        # halves begin with a block; pairs, and columns without a gate, may end within one
        assert not used(inner=144)
        assert used(inner=144, interleaved=True)
        assert used("relu2", inner=144)
        assert not used("relu2", inner=136)
        assert not used(inner=0)
        check_it_is_used_on_hopper_alone(monkeypatch, used)


MISTAKES: dict[str, Mistake] = {
    "the other parity": lambda names: {"_slot": other_parity},
    "slots are not handed back": lambda names: {"_hand_back": lambda *arguments: None},
    "warps do not meet": lambda names: {"meet": lambda: None},
    "barriers are not shown to TMA": lambda names: {"fence_async_shared": lambda: None},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(mistake: str) -> None:
    def run(seed: int) -> None:
        for out, right, limit in project(
            [9, 16], 24, 16, stages=2, seed=seed, mistake=MISTAKES[mistake]
        ):
            check(out, right, limit)

    check_that_some_schedule_ends_in((DeadlockError, RaceError), run)
