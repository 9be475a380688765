"""The weight gradient whose warps have roles, for sm_90: its protocol, in a model, and its use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels.triton import _hopper_wgrad, _operands, _wgrad
from moe_kernels.triton._config_tables import Config, suits_gluon
from moe_kernels.triton._operands import Source
from tests.conftest import HAS_GPU, triton_under_cpu
from tests.kernels import gluon_model
from tests.kernels.gluon_machine import DeadlockError, RaceError
from tests.kernels.gluon_model import Descriptor, Language, Pointer, RaggedDescriptor
from tests.kernels.hopper_checks import (
    PROGRAMS,
    Mistake,
    Names,
    check,
    check_that_some_schedule_ends_in,
    check_where_it_is_used,
    no_mistake,
)

pytestmark = pytest.mark.skipif(HAS_GPU, reason="models what a GPU does")

BLOCK, BLOCK_K, TOP_K = 8, 4, 3


def gradient(
    counts: list[int],
    sides: tuple[int, int],
    *,
    gathered: str = "",
    shared: bool = False,
    accumulate: bool = False,
    wide: bool = False,
    stages: int = 3,
    seed: int = 0,
    mistake: Mistake = no_mistake,
) -> list[tuple[Tensor, Tensor]]:
    """Each expert's sums of a model, with the right ones.

    Args:
        counts: rows of each expert.
        gathered: the operand whose rows are, "a" or "grad".
        wide: results are float32, as those that are accumulated; else TMA stores them.
    """
    generator = torch.Generator().manual_seed(seed)
    used, experts = sum(counts), len(counts)
    rows = used + 3
    slots = torch.randperm(rows, generator=generator).int()
    slots[used:] = 2**30  # never read
    found, operands = [], []
    for name, columns in zip(("a", "grad"), sides, strict=True):
        many = rows // TOP_K + 1 if name == gathered else rows
        # rows of a wider matrix, whose other columns are not read
        whole = torch.randn(many, columns + 8, generator=generator).bfloat16()
        whole[:, columns:] = torch.nan
        values = whole[:, :columns]
        if name == gathered:
            found.append(values[slots[:used].long() // TOP_K])
            operands.append(Pointer(whole.view(-1)))
        else:
            values[used:] = torch.nan
            found.append(values[:used])
            operands.append(RaggedDescriptor(values, (BLOCK_K, BLOCK)))
    stride = (sides[0] if gathered == "a" else sides[1]) // 8 + 1
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    dtype = torch.float32 if wide or accumulate else torch.bfloat16
    out = torch.full((experts, *sides), torch.nan, dtype=dtype)
    before = torch.randn(out.shape, generator=generator)
    if accumulate:
        out.copy_(before)
    by_tma = dtype == torch.bfloat16
    held = BLOCK // (2 if shared else 1)
    target: Any = Descriptor(out, (1, held, BLOCK // 2)) if by_tma else Pointer(out.view(-1))
    for program in range(PROGRAMS):
        names = Language(program, PROGRAMS, seed).names | {"PART": BLOCK // 2, "STAGED": BLOCK}
        names |= mistake(names)
        gluon_model.as_python(_hopper_wgrad._hopper_wgrad_kernel, names)(
            *operands, Pointer(slots), target, Pointer(offsets), used, experts, *sides, TOP_K,
            stride, sides[0] * sides[1], sides[1],
            A_GATHERED=gathered == "a", G_GATHERED=gathered == "grad",
            EVEN=all(side % BLOCK == 0 for side in sides), STAGING=by_tma, ACCUMULATE=accumulate,
            SHARED=shared, BLOCK_M=BLOCK, BLOCK_N=BLOCK, BLOCK_K=BLOCK_K, STAGES=stages,
        )  # fmt: skip
    parts = (value.double().split(counts) for value in found)
    right = [a.T @ grad for a, grad in zip(*parts, strict=True)]
    if accumulate:
        right = [value + before[e].double() for e, value in enumerate(right)]
    return list(zip(out, right, strict=True))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gathered", ["", "a", "grad"])
@pytest.mark.parametrize(
    ("counts", "sides", "stages"),
    [
        ([9, 0, 16, 3], (16, 24), 3),  # experts of three, no, four and one step
        ([0, 0, 30, 0], (8, 8), 4),  # all rows to one
        ([1] * 9, (8, 16), 2),  # tiles of a step, fewer than slots
        ([40, 0, 33], (24, 8), 2),  # more steps than slots
        ([12] * 3, (16, 16), 3),  # as many
    ],
)
def test_every_schedule_gives_the_gradient(
    counts: list[int], sides: tuple[int, int], stages: int, gathered: str, shared: bool
) -> None:
    for seed in range(3):
        options = {"accumulate": seed == 1, "wide": seed == 2}
        for out, right in gradient(
            counts, sides, gathered=gathered, shared=shared, stages=stages, seed=seed, **options
        ):
            check(out, right)


@pytest.mark.parametrize("gathered", ["", "a", "grad"])
def test_columns_that_end_within_a_tile(gathered: str) -> None:
    """Nothing is read or written past them: the next column holds NaN, the next expert's sums
    are there."""
    sides = (12, 20) if not gathered else (16, 20) if gathered == "a" else (12, 16)
    for accumulate in (False, True):
        for out, right in gradient([9, 5], sides, gathered=gathered, accumulate=accumulate):
            check(out, right)


def test_tiles_of_no_rows_are_zero_or_left_as_they_are() -> None:
    for out, _ in gradient([0, 0, 0], (8, 16), shared=True):
        assert (out == 0).all()
    for out, right in gradient([0, 0, 0], (8, 16), accumulate=True):
        assert torch.equal(out.double(), right)


def _with(names: Names, module: str, **changes: Any) -> Names:
    return {module: type(names[module])(**{**vars(names[module]), **changes})}


def _fences(names: Names, kept: int) -> Names:
    """The first ones only."""
    fences = [names["fence_async_shared"]] * kept
    return {"fence_async_shared": lambda: fences.pop()() if fences else None}


def _waits_for_nothing_stored(names: Names) -> Names:
    return _with(names, "tma", store_wait=lambda pending: None)


def _hands_back_what_it_did_not_read(names: Names) -> Names:
    arrive = names["mbarrier"].arrive
    return _with(names, "mbarrier", arrive=lambda barrier, pred=True: arrive(barrier))


def _reads_rows_of_the_next_expert(names: Names) -> Names:
    def indices(begin: Any, size: Any, row: Any) -> tuple[Any, Any, Any]:
        return 2**30, begin + size + 1, 2**30 - size - 1 + row

    return {"to_ragged_indices": indices}


# what they end in, of which operands and tiles
MISTAKES: dict[str, tuple[type[AssertionError], Mistake, dict[str, Any]]] = {
    "stores are not fenced": (RaceError, lambda names: _fences(names, 1), {}),
    "copies are not fenced": (RaceError, lambda names: _fences(names, 1), {"gathered": "a"}),
    "buffers are written before they are read": (RaceError, _waits_for_nothing_stored, {}),
    "warps do not meet": (RaceError, lambda names: {"meet": lambda: None}, {}),
    "slots are not handed back": (
        DeadlockError,
        lambda names: {"_hand_back": lambda *arguments: None},
        {},
    ),
    "tiles of no steps hand back a slot": (AssertionError, _hands_back_what_it_did_not_read, {}),
    "rows of the next expert are read": (AssertionError, _reads_rows_of_the_next_expert, {}),
    "no turns": (AssertionError, lambda names: {"_await_turn": lambda *arguments: None}, {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(mistake: str) -> None:
    error, made, options = MISTAKES[mistake]

    def run(seed: int) -> None:
        sums = gradient([9, 0, 18], (16, 16), stages=2, seed=seed, mistake=made, **options)
        for out, right in sums:
            check(out, right)

    check_that_some_schedule_ends_in(error, run)


def test_group_1_begins_halves_after_group_0() -> None:
    """So that one stores while the other multiplies."""
    begun: list[tuple[int, int]] = []

    def watch(names: Names) -> Names:
        issue = names["warpgroup_mma"]

        def watched(a: Any, *arguments: Any, **options: Any) -> Any:
            warp = a.machine.warp
            if warp.number == 0:
                begun.append((warp.role, a.machine.time))
            return issue(a, *arguments, **options)

        return {"warpgroup_mma": watched}

    for seed in range(6):
        begun.clear()
        gradient([8 * BLOCK_K], (8, 8), shared=True, stages=4, seed=seed, mistake=watch)
        roles = [role for role, _ in begun]
        assert roles.index(1) >= 2, roles  # LAG


def test_it_is_used_where_it_was_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(by: str = "gluon", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> bool:
        made = {
            "a": torch.empty(64, 128, dtype=dtype),
            "grad": torch.empty(64, 256, dtype=dtype),
            "out": torch.empty(2, 128, 256, dtype=dtype),
            "gathered": (),
            "accumulate": False,
            "cut": {},
        } | changes
        cut = {"block_m": 128, "block_n": 256, "block_k": 64, "warps": 8, "stages": 4}
        config = Config(**cut | made["cut"], warp_specialize=by)
        source = Source(torch.empty(64, dtype=torch.int32), 1)
        sources = [source if name in made["gathered"] else None for name in ("a", "grad")]
        return _operands.has_hopper_wgrad(
            config, made["a"], sources[0], made["grad"], sources[1], made["out"],
            accumulate=made["accumulate"],
        )  # fmt: skip

    def cases() -> None:
        for gathered in ("a", "grad"):
            assert used(gathered=(gathered,))
        assert not used(gathered=("a", "grad"))
        half = {"dtype": torch.bfloat16}
        assert not used(a=torch.empty(64, 130, **half)[:, 1:129])
        assert not used(grad=torch.empty(256, 64, **half).mT)
        # the stride of a single row counts, for a ragged descriptor and for threads
        assert not used(a=torch.empty(1, 124, **half))
        assert not used(a=torch.empty(1, 124, **half), gathered=("a",))
        far = {"dtype": torch.bfloat16, "device": "meta"}  # rows, of which no memory is needed
        assert used(a=torch.empty_strided((64, 128), (2**31 - 8, 1), **far), gathered=("a",))
        assert not used(a=torch.empty_strided((64, 128), (2**31, 1), **far), gathered=("a",))
        # what is stored by columns is transposed before
        assert not used(out=torch.empty(2, 256, 128, **half).mT)
        wide = torch.empty(2, 128, 256)
        assert used(out=wide)
        assert used(out=wide, accumulate=True)
        assert used(accumulate=True)
        # a multiple of 16 bytes, but not of 16 elements: stored by TMA only
        odd = {"grad": torch.empty(64, 264, **half), "out": torch.empty(2, 128, 264, **half)}
        assert used(**odd)
        assert not used(**odd, accumulate=True)
        tiles = {(128, 128): True, (64, 256): True, (256, 128): True, (256, 256): False}
        tiles |= {(256, 64): False, (32, 256): False, (64, 512): False}
        for (m, n), known in tiles.items():
            assert used(cut={"block_m": m, "block_n": n}) == known
        for changed in ({"block_k": 32}, {"stages": 1}, {"warps": 4}):
            assert not used(cut=changed)

    check_where_it_is_used(monkeypatch, used, cases)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by", ["no", "gluon"])
def test_rows_are_gathered_beforehand_unless_the_kernel_does(
    monkeypatch: pytest.MonkeyPatch, by: str, transposed: bool
) -> None:
    """Where loads by pointer are not pipelined, as in Triton 3.6."""
    given: list[Source | None] = []

    def take(
        a: Tensor, a_source: Source | None, grad: Tensor, grad_source: Source | None,
        *rest: Any, **options: Any,
    ) -> None:  # fmt: skip
        given.append(a_source or grad_source)
        assert (a if a_source is None else grad).shape[0] == 12

    x, dh = torch.randn(4, 64).bfloat16(), torch.randn(12, 128).bfloat16()
    slots = torch.randperm(12).int()
    order = (slots, slots.argsort().int().view(4, 3), torch.tensor([0, 7, 12]).int())
    out = torch.empty(2, 128, 64).mT if transposed else torch.empty(2, 64, 128)
    out = out.bfloat16()
    cut = Config(128, 256, 64, warps=8, stages=4, warp_specialize=by)
    with triton_under_cpu():
        monkeypatch.setattr(_operands, "INTERPRETED", False)
        monkeypatch.setattr("moe_kernels.triton.permute.pipelines_pointer_loads", lambda _: False)
        monkeypatch.setattr(_hopper_wgrad, "sum_products", take)
        _wgrad.gathered_weight_gradient(x, dh, order, 12, out, cut=cut)
    assert len(given) == (by == "gluon")
    assert None not in given
    if by == "no":
        rows = x[(slots // 3).long()].double()
        right = torch.stack([rows[:7].T @ dh[:7].double(), rows[7:].T @ dh[7:].double()])
        torch.testing.assert_close(out.double(), right, rtol=0.01, atol=0.05)


def test_a_group_that_holds_256_rows_has_no_buffers() -> None:
    cut = Config(256, 64, 64, warps=8, stages=4, warp_specialize="gluon")
    assert suits_gluon("grouped_gemm", cut)
    assert not suits_gluon("wgrad", cut)
