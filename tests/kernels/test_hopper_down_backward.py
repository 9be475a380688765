"""Backward through the down-projection where warps have roles: its protocol in a model, its use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels.triton import _hopper_down_backward, _operands
from moe_kernels.triton._activation import Activation
from moe_kernels.triton._config_tables import Config
from tests.conftest import HAS_GPU
from tests.kernels.gluon_machine import WARPS, DeadlockError, RaceError
from tests.kernels.gluon_model import Descriptor, Pointer
from tests.kernels.hopper_checks import (
    BACKWARD_EPILOGUES,
    BLOCK_M,
    BLOCK_N,
    BackwardEpilogue,
    Mistake,
    Names,
    backward,
    check,
    check_that_some_schedule_ends_in,
    check_where_it_is_used,
    described,
    launch,
    no_mistake,
    tile_map,
)

pytestmark = pytest.mark.skipif(HAS_GPU, reason="models what a GPU does")

BLOCK_K, SIDE, UNIT, TOP_K = 4, 4, 2, 3


def through_down(
    counts: list[int],
    contracted: int,
    columns: int,
    *,
    epilogue: BackwardEpilogue = BACKWARD_EPILOGUES[0],
    gathered: bool = False,
    shared: bool = False,
    transposed: bool = False,
    side: int = SIDE,
    stages: int = 3,
    seed: int = 0,
    overwrites: bool = False,
    mistake: Mistake = no_mistake,
) -> list[tuple[Tensor, Tensor]]:
    """What a model writes, each with the right values; rows of no expert stay NaN.

    Args:
        counts: rows of each expert.
        columns: of the activation.
        gathered: rows of dO come from those of fewer tokens.
        side: of a part.
        overwrites: dH is written over h, whose rows of no expert stay.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, experts = sum(counts) + 3, len(counts)
    kind, interleaved, clamps, writes = epilogue
    activation = Activation(kind, interleaved, 1.702, 0.5 if clamps else math.inf)
    width = columns * (2 if activation.gated else 1)
    # rows of a wider matrix, whose other columns are not read
    tokens = rows // TOP_K + 1 if gathered else rows
    grad = torch.randn(tokens, contracted + 8, generator=generator).bfloat16()
    grad[:, contracted:] = torch.nan
    slots = torch.randperm(rows, generator=generator).int()
    down = torch.randn(experts, columns, contracted, generator=generator).bfloat16()
    h = torch.randn(rows, width, generator=generator).bfloat16()
    scale = torch.rand(rows, generator=generator)
    rows_of_grad = grad[(slots // TOP_K).long() if gathered else slice(None), :contracted]
    slots[sum(counts) :] = 2**30  # never read
    tiles, bound = tile_map(counts)
    parts = -(-columns // BLOCK_N)
    a = h.new_full((rows, columns), torch.nan)
    dh = h.clone() if overwrites else torch.full_like(h, torch.nan)
    partials = torch.full((parts, rows), torch.nan)
    planes = 2 if activation.gated and not interleaved else 1
    box = (1, side, 2 * side if activation.gated and interleaved else side)
    seen = (dh if overwrites else h).unflatten(1, (planes, width // planes)).movedim(1, 0)
    constants = activation.constants(h)
    del constants["PRECISE"]
    of_grad = Descriptor(grad[:, :contracted], (BLOCK_M, BLOCK_K))
    arguments = (
        Pointer(grad.view(-1)) if gathered else of_grad, Pointer(slots) if gathered else None,
        described(down.mT.contiguous(), BLOCK_K, BLOCK_N, transposed), Descriptor(seen, box),
        Pointer(scale), Pointer(dh.view(-1)), Pointer(a.view(-1)), Pointer(partials.view(-1)),
        Pointer(tiles), bound, rows, contracted // UNIT, columns, columns, width, TOP_K,
        (contracted + 8) // UNIT, 1.702, activation.limit,
    )  # fmt: skip
    launch(
        _hopper_down_backward._hopper_down_backward_kernel, arguments, seed,
        lambda names: {"SIDE": side, "UNIT": UNIT} | mistake(names), GATHERED=gathered,
        EVEN_K=contracted % BLOCK_K == 0, SHARED=shared, TRANSPOSED=transposed,
        NEEDS_H="h" in writes, NEEDS_A="a" in writes, NEEDS_S="s" in writes, BLOCK_K=BLOCK_K,
        STAGES=stages, **constants,
    )  # fmt: skip
    if overwrites:
        assert torch.equal(dh[sum(counts) :], h[sum(counts) :])
        dh[sum(counts) :] = torch.nan
    right = backward(rows_of_grad, down, h, scale, activation, counts)
    sums = partials.sum(0)
    # dS is the difference of large numbers in some rows, so they are compared as one
    used = slice(0, sum(counts))
    assert sums[used.stop :].isnan().all()
    found = {"h": dh, "a": a, "s": sums[None, used]}
    wanted = {"h": right[0], "a": right[1], "s": right[2][used].T}
    for name in found.keys() - set(writes):
        assert found[name].isnan().all()
    return [(found[name], wanted[name]) for name in writes]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("counts", "contracted", "columns", "stages"),
    [
        ([9, 0, 16, 3], 10, 20, 3),  # ragged in all ways; 15 tiles of three steps
        ([8], 4, 8, 2),  # one tile of one step: a program and a group with none
        ([0, 30, 0], 4, 24, 4),  # all rows to one expert; tiles of a step
        ([17], 24, 8, 2),  # more steps than slots
    ],
)
def test_every_schedule_gives_the_gradients(
    counts: list[int], contracted: int, columns: int, stages: int, shared: bool, gathered: bool
) -> None:
    for seed in range(3):
        epilogue = BackwardEpilogue("swiglu", interleaved=seed == 1, clamps=seed == 2)
        for out, right in through_down(
            counts, contracted, columns, epilogue=epilogue, gathered=gathered, shared=shared,
            transposed=seed % 2 == 0, stages=stages, seed=seed,
        ):  # fmt: skip
            check(out, right)


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("epilogue", BACKWARD_EPILOGUES)
def test_every_epilogue_is_computed(epilogue: BackwardEpilogue, overwrites: bool) -> None:
    """Of parts that are many or one of a tile."""
    for side in (SIDE, BLOCK_N):
        for out, right in through_down(
            [9, 4], 12, 12, epilogue=epilogue, gathered=side == SIDE, side=side,
            overwrites=overwrites and "h" in epilogue.writes,
        ):  # fmt: skip
            check(out, right)


def test_no_tiles_are_nothing_to_do() -> None:
    for out, _ in through_down([0, 0], 8, 8):
        assert out.isnan().all()


def _wait_for_no_part(names: Names) -> Names:
    """Parts of h are taken to be there."""
    return {"_use": lambda turns, part, parts: (part % 2, 1)}


def _never_fences(names: Names) -> Names:
    """But to show barriers."""
    fences = [names["fence_async_shared"]]
    return {"fence_async_shared": lambda: fences.pop()() if fences else None}


def _gathers_unfenced(names: Names) -> Names:
    """Barriers are shown, and parts fenced, but not what was gathered."""
    fence, meet, arrive = names["fence_async_shared"], names["meet"], names["mbarrier"].arrive

    def give_back(empty: Any) -> None:
        fence()
        meet()
        arrive(empty)

    return _never_fences(names) | {"_give_back": give_back}


def _arrives_at_once(names: Names) -> Names:
    """The threads that gather, before their copies are there."""

    def arrive_now(barrier: Any, *, increment_count: bool) -> None:
        barrier.change(32 * _hopper_down_backward.GATHERERS.value // WARPS, 0)

    changed = {**vars(names["async_copy"]), "mbarrier_arrive": arrive_now}
    return {"async_copy": type(names["async_copy"])(**changed)}


def _counts_four_warps(names: Names) -> Names:
    """``full`` counts the arrivals of four warps that gather, as in the up-projection."""
    barriers = vars(names["mbarrier"])
    init = barriers["init"]

    def init_for_four(barrier: Any, count: int) -> None:
        init(barrier, 2 * count - 1 if count > 2 else count)

    return {"mbarrier": type(names["mbarrier"])(**barriers | {"init": init_for_four})}


# what they end in
MISTAKES: dict[str, tuple[Any, Mistake]] = {
    "parts are not waited for": ((RaceError, DeadlockError), _wait_for_no_part),
    "parts are overwritten without a fence": (RaceError, _never_fences),
    "warps do not meet": ((RaceError, DeadlockError), lambda names: {"meet": lambda: None}),
    "parts are not handed back": (DeadlockError, lambda names: {"_give_back": lambda empty: None}),
}
GATHERING_MISTAKES: dict[str, tuple[Any, Mistake]] = {
    "copies are not fenced from tensor cores": (RaceError, _gathers_unfenced),
    "threads arrive before their copies are there": (RaceError, _arrives_at_once),
    "more threads are waited for than gather": (DeadlockError, _counts_four_warps),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mistake", [*MISTAKES, *GATHERING_MISTAKES])
def test_the_model_finds_mistakes(mistake: str, shared: bool) -> None:
    gathered = mistake in GATHERING_MISTAKES
    error, made = (GATHERING_MISTAKES if gathered else MISTAKES)[mistake]

    def run(seed: int) -> None:
        through_down(
            [9, 16], 12, 16, gathered=gathered, shared=shared, stages=2, seed=seed, mistake=made
        )

    check_that_some_schedule_ends_in(error, run)


def test_it_is_used_where_it_was_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(by: str = "gluon", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> bool:
        made = {
            "grad": torch.empty(64, 256, dtype=dtype),
            "down": torch.empty(2, 256, 128, dtype=dtype).mT,
            "h": torch.empty(64, 256, dtype=dtype),
            "cut": {},
        } | changes
        cut = {"block_m": 128, "block_n": 128, "block_k": 64, "warps": 8, "stages": 4}
        config = Config(**cut | made["cut"], warp_specialize=by)
        return _operands.has_hopper_down_backward(config, made["grad"], made["down"], made["h"])

    def cases() -> None:
        assert not used(grad=torch.empty(64, 256))
        assert used(down=torch.empty(2, 128, 256, dtype=torch.bfloat16))  # stored by rows
        assert not used(down=torch.empty(2, 256, 256, dtype=torch.bfloat16)[..., ::2].mT)
        assert not used(down=torch.empty(2, 256, 136, dtype=torch.bfloat16).mT)
        assert not used(down=torch.empty(2, 252, 128, dtype=torch.bfloat16).mT)
        assert not used(h=torch.empty(64 * 256 + 1, dtype=torch.bfloat16)[1:].view(64, 256))
        tiles = {(64, 256): True, (128, 256): True, (256, 128): True, (256, 64): False}
        tiles |= {(32, 128): False, (64, 32): False, (256, 256): False}
        for (m, n), known in tiles.items():
            assert used(cut={"block_m": m, "block_n": n}) == known
        for changed in ({"block_k": 128}, {"stages": 1}, {"warps": 4}):
            assert not used(cut=changed)

    check_where_it_is_used(monkeypatch, used, cases)


def test_it_gathers_where_it_was_asked_to_and_can() -> None:
    def gathers(
        by: str = "gluon_gather", grad: Tensor | None = None, pairs: bool = False,
        columns: int = 128, limit: float = 7.0,
    ) -> bool:  # fmt: skip
        cut = Config(128, columns, 64, warps=8, stages=3, warp_specialize=by)
        grad = torch.empty(64, 256, dtype=torch.bfloat16) if grad is None else grad
        return _operands.gathers_grad(cut, grad, pairs, limit)

    assert gathers()
    assert not gathers("gluon")
    assert not gathers("no")
    assert not gathers(pairs=True)  # for want of registers
    assert not gathers(columns=256)
    assert gathers(columns=256, limit=math.inf)
    whole = torch.empty(64 * 256 + 1, dtype=torch.bfloat16)
    assert not gathers(grad=whole[1:].view(64, 256))
    assert not gathers(grad=whole[:256].expand(64, 256))  # of y.sum()
    assert not gathers(grad=torch.empty(2, 2**31 + 8, device="meta", dtype=torch.bfloat16))
