"""The float8 product whose warps have roles, for sm_90: its protocol, in a model; and its use."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_kernels.triton import _hopper_scaled, _operands
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton.scaled_grouped_gemm import without_roles
from tests.conftest import HAS_GPU, triton_under_cpu
from tests.kernels.gluon_machine import DeadlockError, RaceError
from tests.kernels.gluon_model import Descriptor, Pointer, Sums
from tests.kernels.hopper_checks import (
    BLOCK_M,
    BLOCK_N,
    Mistake,
    Names,
    check,
    check_it_is_used_on_hopper_alone,
    check_that_some_schedule_ends_in,
    described,
    launch,
    no_mistake,
    other_parity,
    parity_of_step,
    products,
    tile_map,
)

pytestmark = pytest.mark.skipif(HAS_GPU, reason="models what a GPU does")

FLOAT8 = torch.float8_e4m3fn


def multiply(
    counts: list[int],
    contracted: int,
    columns: int,
    *,
    block: int = BLOCK_N // 2,
    biased: bool = False,
    stages: int = 3,
    seed: int = 0,
    mistake: Mistake = no_mistake,
) -> tuple[Tensor, Tensor]:
    """The product of a model, and the right one; rows of no expert stay NaN.

    Args:
        counts: rows of each expert.
        block: columns, and contracted elements, that share a scale: half of a tile's, or all.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, experts = sum(counts) + 3, len(counts)
    a, w = normal(rows, contracted).to(FLOAT8), normal(experts, contracted, columns).to(FLOAT8)
    blocks_k, blocks_n = -(-contracted // block), -(-columns // block)
    # of other magnitudes, so that a scale of another row or block shows
    by_row = torch.exp(normal(blocks_k, rows)).t()
    by_column = torch.exp(normal(experts, blocks_k, blocks_n))
    bias = normal(experts, columns)
    tiles, bound = tile_map(counts)
    out = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    arguments = (
        Descriptor(a, (BLOCK_M, block)), described(w, block, BLOCK_N, True),
        Pointer(by_row.t().flatten()), Pointer(by_column.flatten()), Pointer(bias.flatten()),
        Pointer(out.view(-1)), Pointer(tiles), bound, columns, contracted, *by_row.stride(),
        *by_column.stride(), columns, 1,
    )  # fmt: skip
    launch(
        _hopper_scaled._hopper_scaled_kernel, arguments, seed, mistake, BIASED=biased,
        BLOCK=block, K=block, STAGES=stages,
    )  # fmt: skip
    wide = by_row.repeat_interleave(block, 1)[:, :contracted].double()
    both = by_column.repeat_interleave(block, 1).repeat_interleave(block, 2)
    weights = w.double() * both[:, :contracted, :columns]
    return out, products(a.double() * wide, weights, bias if biased else None, counts)


@pytest.mark.parametrize("block", [BLOCK_N // 2, BLOCK_N])
@pytest.mark.parametrize(
    ("counts", "contracted", "columns", "stages"),
    [
        ([9, 0, 16, 3], 10, 20, 3),  # ragged in all ways; halves of tiles without rows
        ([8], 4, 8, 2),  # one tile of one step: a program with none
        ([5, 30], 4, 24, 4),  # tiles of a step, fewer than slots
        ([17], 24, 9, 2),  # more steps than slots; a block of columns past the last
        ([1, 4, 2], 12, 8, 2),  # the second half never has rows
    ],
)
def test_every_schedule_gives_the_product(
    counts: list[int], contracted: int, columns: int, stages: int, block: int
) -> None:
    for seed in range(4):
        biased = seed % 2 == 1
        check(
            *multiply(
                counts, contracted, columns, block=block, biased=biased, stages=stages, seed=seed
            )
        )


def test_no_tiles_are_nothing_to_do() -> None:
    out, _ = multiply([0, 0], 8, 16)
    assert out.isnan().all()


def test_it_is_used_where_it_was_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Config(128, 256, 128, warps=8, stages=4, warp_specialize="gluon")
    operands = {
        "weight": torch.empty(2, 256, 128, dtype=FLOAT8).mT,
        "x": torch.empty(64, 128, dtype=FLOAT8),
        "out": torch.empty(64, 256, dtype=torch.bfloat16),
    }

    def used(config: Config = cut, **changes: Tensor) -> bool:
        return _operands.has_hopper_scaled(config, **operands | changes)

    with triton_under_cpu():
        assert not used()  # Gluon is not interpreted
        monkeypatch.setattr(_operands, "INTERPRETED", False)
        assert used()
        assert used(replace(cut, block_n=128))
        assert used(out=torch.empty(64, 256, dtype=torch.float16))
        assert not used(out=torch.empty(64, 256))
        assert not used(without_roles(cut))
        assert not used(replace(cut, block_k=64))
        assert not used(replace(cut, block_m=64))
        assert not used(weight=torch.empty(2, 128, 256, dtype=FLOAT8))  # stored [E, Kd, N]
        assert not used(x=torch.empty(64, 136, dtype=FLOAT8)[:, :128])
        bytes_ = {
            name: value.view(torch.uint8) for name, value in operands.items() if name != "out"
        }
        assert not used(**bytes_)
        check_it_is_used_on_hopper_alone(monkeypatch, used)


def test_plain_kernels_have_the_columns_that_share_a_scale() -> None:
    wide = Config(128, 256, 128, warps=8, stages=4, group_m=16, warp_specialize="gluon")
    plain = Config(128, 128, 128, warps=8, stages=4, group_m=16)
    assert without_roles(wide) == without_roles(plain) == plain
    assert without_roles(replace(wide, block_n=128, stages=6)) == replace(plain, stages=5)


def _waits_for_the_product_before(names: Names) -> Names:
    """Which is complete then, but not yet its own."""
    wait, before = names["warpgroup_mma_wait"], dict[int, Sums]()

    def late(number: int, deps: tuple[Sums]) -> Tensor:
        warp, (product,) = threading.get_ident(), deps
        if warp in before:
            wait(number, (before[warp],))
        before[warp] = product
        ((_, _, result),) = product.pending
        return result

    return {"warpgroup_mma_wait": late}


MISTAKES: dict[str, Mistake] = {
    "the other parity": lambda names: {"_slot": other_parity},
    "the parity of the step, not of the use": lambda names: {"_slot": parity_of_step},
    "slots are not handed back": lambda names: {"_hand_back": lambda *arguments: None},
    "slots are handed back while they are read": _waits_for_the_product_before,
    "warps do not meet": lambda names: {"meet": lambda: None},
    "barriers are not shown to TMA": lambda names: {"fence_async_shared": lambda: None},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(mistake: str) -> None:
    def run(seed: int) -> None:
        check(*multiply([9, 16], 12, 16, stages=2, seed=seed, mistake=MISTAKES[mistake]))

    check_that_some_schedule_ends_in((DeadlockError, RaceError), run)
