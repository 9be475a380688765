"""The product whose warps have roles, for sm_90: its protocol, in a model; and when it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels.triton import _hopper_gemm, _operands
from moe_kernels.triton._config_tables import Config
from tests.conftest import HAS_GPU
from tests.kernels.gluon_machine import DeadlockError, RaceError
from tests.kernels.gluon_model import Descriptor, Pointer
from tests.kernels.hopper_checks import (
    BLOCK_M,
    BLOCK_N,
    Mistake,
    Names,
    check,
    check_that_some_schedule_ends_in,
    check_where_it_is_used,
    described,
    launch,
    no_mistake,
    other_parity,
    parity_of_step,
    products,
    tile_map,
)

pytestmark = pytest.mark.skipif(HAS_GPU, reason="models what a GPU does")

BLOCK_K = 4


def multiply(
    counts: list[int],
    contracted: int,
    columns: int,
    *,
    shared: bool = False,
    transposed: bool = False,
    biased: bool = False,
    stages: int = 3,
    seed: int = 0,
    mistake: Mistake = no_mistake,
) -> tuple[Tensor, Tensor]:
    """The product of a model, and the right one; rows of no expert stay NaN.

    Args:
        counts: rows of each expert.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, experts = sum(counts) + 3, len(counts)
    a = torch.randn(rows, contracted, generator=generator).bfloat16()
    b = torch.randn(experts, contracted, columns, generator=generator).bfloat16()
    bias = torch.randn(experts, columns, generator=generator)
    tiles, bound = tile_map(counts)
    out = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    arguments = (
        Descriptor(a, (BLOCK_M, BLOCK_K)), described(b, BLOCK_K, BLOCK_N, transposed),
        Pointer(bias.flatten()), Pointer(out.view(-1)), Pointer(tiles), bound, columns, contracted,
        columns, 1,
    )  # fmt: skip
    launch(
        _hopper_gemm._hopper_gemm_kernel, arguments, seed, mistake, SHARED=shared,
        TRANSPOSED=transposed, BIASED=biased, BLOCK_K=BLOCK_K, STAGES=stages,
    )  # fmt: skip
    return out, products(a, b, bias if biased else None, counts)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("counts", "contracted", "columns", "stages"),
    [
        ([9, 0, 16, 3], 10, 20, 3),  # ragged in all ways; 15 tiles of three steps
        ([8], 4, 8, 2),  # one tile of one step: a program and a group with none
        ([5, 30], 4, 24, 4),  # tiles of a step, fewer than slots
        ([17], 24, 8, 2),  # more steps than slots
    ],
)
def test_every_schedule_gives_the_product(
    counts: list[int], contracted: int, columns: int, stages: int, shared: bool
) -> None:
    for seed in range(3):
        options: dict[str, Any] = {"transposed": seed % 2 == 0, "biased": seed % 2 == 1}
        found = multiply(
            counts, contracted, columns, shared=shared, stages=stages, seed=seed, **options
        )
        check(*found)


@pytest.mark.parametrize("shared", [False, True])
def test_no_tiles_are_nothing_to_do(shared: bool) -> None:
    out, _ = multiply([0, 0], 8, 16, shared=shared)
    assert out.isnan().all()


def test_it_is_used_where_it_was_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(by: str = "gluon", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> bool:
        made = {
            "a": torch.empty(64, 128, dtype=dtype),
            "b": torch.empty(2, 256, 128, dtype=dtype).mT,
            "out": torch.empty(64, 256, dtype=dtype),
            "block_k": 64,
        } | changes
        cut = Config(128, 128, made["block_k"], warps=8, stages=4, warp_specialize=by)
        rows = _operands.row_operand(made["a"], None, 128, 64)
        weight = _operands.weight_operand(made["b"], 64, 128)
        return _operands.has_hopper_gemm(cut, weight, rows, made["out"])

    def cases() -> None:
        assert not used(out=torch.empty(64, 256))
        assert not used(a=torch.empty(64, 130, dtype=torch.bfloat16)[:, 1:129])
        assert not used(b=torch.empty(2, 128, 512, dtype=torch.bfloat16)[..., ::2])
        assert not used(block_k=32)

    check_where_it_is_used(monkeypatch, used, cases)


def _waits_for_one_product_less(names: Names) -> Names:
    wait = names["warpgroup_mma_wait"]
    return {"warpgroup_mma_wait": lambda number, deps: wait(2 if number else 0, deps)}


MISTAKES: dict[str, Mistake] = {
    "the other parity": lambda names: {"_slot": other_parity},
    "the parity of the step, not of the use": lambda names: {"_slot": parity_of_step},
    "slots are not handed back": lambda names: {"_hand_back": lambda *arguments: None},
    "slots are handed back while they are read": _waits_for_one_product_less,
    "warps do not meet": lambda names: {"meet": lambda: None},
    "barriers are not shown to TMA": lambda names: {"fence_async_shared": lambda: None},
}


def _waits_as_for_the_first_tile(names: Names) -> Names:
    wait = names["mbarrier"].wait
    return {"_await_turn": lambda turn, turns, group: wait(turn.index(group), 1 - group)}


# where groups take turns
MISTAKES_IN_TURNS: dict[str, Mistake] = {
    "no turns": lambda names: {"_await_turn": lambda *arguments: None},
    "the first tile's turn": _waits_as_for_the_first_tile,
}


def _run(shared: bool, mistake: Mistake, seed: int) -> None:
    check(*multiply([9, 16], 12, 16, shared=shared, stages=2, seed=seed, mistake=mistake))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(mistake: str, shared: bool) -> None:
    check_that_some_schedule_ends_in(
        (DeadlockError, RaceError), lambda seed: _run(shared, MISTAKES[mistake], seed)
    )


@pytest.mark.parametrize("mistake", MISTAKES_IN_TURNS)
def test_the_model_finds_mistakes_in_turns(mistake: str) -> None:
    check_that_some_schedule_ends_in(
        (DeadlockError, RaceError), lambda seed: _run(False, MISTAKES_IN_TURNS[mistake], seed)
    )


def test_a_ring_of_one_slot_never_ends() -> None:
    """Which is why no table may ask for it: its slot is handed back after the next step."""
    with pytest.raises(DeadlockError):
        multiply([8], 8, 8, stages=1)
