"""The up-projection whose warps have roles, for sm_90: its protocol, in a model, and its use."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.triton import _activation, _hopper_up, _operands
from moe_kernels.triton._config_tables import Config
from tests.conftest import HAS_GPU, triton_under_cpu
from tests.kernels import gluon_machine, hopper_runs
from tests.kernels.gluon_machine import DeadlockError, RaceError
from tests.kernels.gluon_model import Pointer
from tests.kernels.hopper_checks import (
    BACKWARD_EPILOGUES,
    BLOCK_N,
    EPILOGUES,
    Epilogue,
    Mistake,
    Names,
    check,
    check_that_some_schedule_ends_in,
    check_where_it_is_used,
    described,
    launch,
    no_mistake,
    products,
    tile_map,
)
from tests.kernels.hopper_scaled_runs import ScaledUp

pytestmark = pytest.mark.skipif(HAS_GPU, reason="models what a GPU does")

BLOCK_K, TOP_K = 16, 3


def project(
    counts: list[int],
    contracted: int,
    columns: int,
    *,
    kind: str = "swiglu",
    interleaved: bool = False,
    shared: bool = False,
    transposed: bool = True,
    biased: bool = False,
    saves: bool = True,
    stages: int = 3,
    part: int = BLOCK_N,
    seed: int = 0,
    mistake: Mistake = no_mistake,
) -> list[tuple[Tensor, Tensor]]:
    """The activation and h of a model, each with the right one; rows of no expert stay NaN.

    Args:
        counts: rows of each expert.
        columns: of the activation.
        part: of a tile's columns that are computed at once.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, experts = sum(counts) + 3, len(counts)
    gated = kind in _activation.GATED
    width = columns * (2 if gated else 1)
    tokens = rows // TOP_K + 1
    # rows of a wider matrix, whose other columns are not read
    x = torch.randn(tokens, contracted + 8, generator=generator).bfloat16()
    x[:, contracted:] = torch.nan
    w = torch.randn(experts, contracted, width, generator=generator).bfloat16()
    bias = torch.randn(experts, width, generator=generator)
    slots = torch.randperm(rows, generator=generator).int()
    slots[sum(counts) :] = 2**30  # never read
    tiles, bound = tile_map(counts)
    h = torch.full((rows if saves else 0, width), torch.nan, dtype=torch.bfloat16)
    a = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    activation = _activation.Activation(kind, interleaved, 1.702, 0.5)
    constants = activation.constants(x)
    del constants["PRECISE"]
    box = BLOCK_N * (2 if gated and interleaved else 1)
    arguments = (
        Pointer(x.view(-1)), Pointer(slots),
        described(w, BLOCK_K, box, transposed), Pointer(bias.flatten()), Pointer(h.view(-1)),
        Pointer(a.view(-1)), Pointer(tiles), bound, contracted // 8, columns, width, TOP_K,
        (contracted + 8) // 8, 1.702, 0.5, width, 1,
    )  # fmt: skip
    launch(
        _hopper_up._hopper_up_kernel, arguments, seed,
        lambda names: {"PART": part} | mistake(names), SHARED=shared,
        TRANSPOSED=transposed, BIASED=biased, SAVE_H=saves, EVEN_K=contracted % BLOCK_K == 0,
        BLOCK_K=BLOCK_K, STAGES=stages, **constants,
    )  # fmt: skip
    gathered = x[(slots.clamp(max=rows - 1) // TOP_K).long(), :contracted]
    right = products(gathered, w, bias if biased else None, counts)
    activated = reference.expert_activation(right, kind, None, interleaved, 1.702, 0.5)
    return [(a, activated)] + ([(h, right)] if saves else [])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("counts", "contracted", "columns", "stages"),
    [
        ([9, 0, 16, 3], 40, 20, 3),  # ragged in all ways; 15 tiles of three steps
        ([0, 0, 8], 16, 8, 2),  # one tile of one step: a program and a group with none
        ([0, 30, 0], 8, 24, 4),  # all rows to one expert; tiles of less than a step
        ([17], 96, 8, 2),  # more steps than slots
    ],
)
def test_every_schedule_gives_the_projection(
    counts: list[int], contracted: int, columns: int, stages: int, shared: bool
) -> None:
    for seed in range(3):
        options: dict[str, Any] = {
            "transposed": seed % 2 == 0,
            "biased": seed % 2 == 1,
            "interleaved": seed == 2,
            "saves": seed < 2,
        }
        found = project(
            counts, contracted, columns, shared=shared, stages=stages, seed=seed, **options
        )
        for out, right in found:
            check(out, right)


@pytest.mark.parametrize("epilogue", [*EPILOGUES, Epilogue("gelu", False, True, True)])
def test_every_epilogue_is_computed(epilogue: Epilogue) -> None:
    """A tile's columns at once, and in two parts."""
    for part in (BLOCK_N, BLOCK_N // 2):
        for out, right in project(
            [9, 4], 24, 12, transposed=False, part=part, **epilogue._asdict()
        ):
            check(out, right)


def test_cases_for_a_gpu_are_those_of_the_kernels_in_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    with triton_under_cpu():
        monkeypatch.setattr(_operands, "INTERPRETED", False)
        for case in chain.from_iterable(hopper_runs.GROUPS.values()):
            assert hopper_runs.call(case, [1, 2], device).selected(), case
    cases = hopper_runs.GROUPS["up_turns"] + hopper_runs.GROUPS["up_turns_64"]
    cases += hopper_runs.GROUPS["up_shared"]
    assert {case.epilogue for case in cases if isinstance(case, hopper_runs.Case)} == set(EPILOGUES)
    scaled = [hopper_runs.GROUPS[f"scaled_up_{part}"] for part in range(4)]
    assert {case.epilogue for case in chain(*scaled) if isinstance(case, ScaledUp)} == set(
        EPILOGUES
    )
    down = [hopper_runs.GROUPS[f"down_{tile}"] for tile in hopper_runs.DOWN_TILES]
    assert {case.epilogue for case in chain(*down) if isinstance(case, hopper_runs.Case)} == set(
        BACKWARD_EPILOGUES
    )


@pytest.mark.parametrize(
    ("group", "routing"),
    [
        *(("up_shared", "all to one"), ("gemm_turns", "ragged")),
        *(("down_turns", "ragged"), ("wgrad_sums", "ragged"), ("scaled_shared", "ragged")),
        ("scaled_up_2", "all to one"),
    ],
)
def test_cases_for_a_gpu_are_right_of_the_plain_kernels(group: str, routing: str) -> None:
    device, case = torch.device("cpu"), hopper_runs.GROUPS[group][0]
    with triton_under_cpu():
        counts = hopper_runs.routings(case, device)[routing]
        hopper_runs.run(case, counts, device)
        made = hopper_runs.call(case, counts, device)
        made.poison()
        with pytest.raises(AssertionError):
            made.check()


def test_no_tiles_are_nothing_to_do() -> None:
    for out, _ in project([0, 0], 16, 8):
        assert out.isnan().all()


def _only_shows_barriers(names: Names) -> Names:
    """The first fence, and none of those that multiply."""
    fences = [names["fence_async_shared"]]
    return {"fence_async_shared": lambda: fences.pop()() if fences else None}


def _arrives_at_once(names: Names) -> Names:
    """The threads that gather, before their copies are there."""

    def arrive_now(barrier: Any, *, increment_count: bool) -> None:
        barrier.change(32 * 4 // gluon_machine.WARPS, 0)

    changed = {**vars(names["async_copy"]), "mbarrier_arrive": arrive_now}
    return {"async_copy": type(names["async_copy"])(**changed)}


def _fences_before_it_waits(names: Names) -> Names:
    wait, fence = names["mbarrier"].wait, names["fence_async_shared"]
    fences = [fence]

    def fenced_wait(barrier: Any, parity: Any) -> None:
        fence()
        wait(barrier, parity)

    changed = {**vars(names["mbarrier"]), "wait": fenced_wait}
    return {
        "mbarrier": type(names["mbarrier"])(**changed),
        "fence_async_shared": lambda: fences.pop()() if fences else None,
    }


def _of_one_thread(names: Names) -> Names:
    """``full`` counts the arrival of one of the threads that gather."""
    barriers = vars(names["mbarrier"])
    init = barriers["init"]
    changed = {**barriers, "init": lambda barrier, count: init(barrier, min(count, 2))}
    return {"mbarrier": type(names["mbarrier"])(**changed)}


# what they end in
MISTAKES: dict[str, tuple[type[AssertionError], Mistake]] = {
    "copies are not fenced from tensor cores": (RaceError, _only_shows_barriers),
    "copies are fenced before they are there": (RaceError, _fences_before_it_waits),
    "threads arrive before their copies are there": (RaceError, _arrives_at_once),
    "one thread counts for all": (AssertionError, _of_one_thread),
    "slots are not handed back": (
        DeadlockError,
        lambda names: {"_hand_back": lambda *arguments: None},
    ),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(mistake: str, shared: bool) -> None:
    error, made = MISTAKES[mistake]

    def run(seed: int) -> None:
        project([9, 16], 48, 16, shared=shared, stages=2, seed=seed, mistake=made)

    check_that_some_schedule_ends_in(error, run)


def test_it_is_used_where_it_was_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(by: str = "gluon", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> bool:
        made = {
            "x": torch.empty(64, 128, dtype=dtype),
            "w": torch.empty(2, 256, 128, dtype=dtype).mT,
            "out": torch.empty(64, 128, dtype=dtype),
            "cut": {},
            "kind": "swiglu",
        } | changes
        cut = {"block_m": 128, "block_n": 64, "block_k": 64, "warps": 8, "stages": 4}
        config = Config(**cut | made["cut"], warp_specialize=by)
        return _operands.has_hopper_up(config, made["w"], made["x"], made["out"], made["kind"])

    def cases() -> None:
        assert not used(x=torch.empty(64, 130, dtype=torch.bfloat16)[:, 1:129])
        assert not used(x=torch.empty(128, 64, dtype=torch.bfloat16).mT)
        # rows of 124 elements, which start at multiples of 16 bytes: in a wider matrix, and one
        x, w = torch.empty(64, 136, dtype=torch.bfloat16), torch.empty(2, 256, 136).bfloat16()
        assert not used(x=x[:, :124], w=w[..., :124].mT)
        assert used(x=x[:, :120], w=w[..., :120].mT)
        w = torch.empty(2, 124, 256, dtype=torch.bfloat16)
        assert not used(x=torch.empty(1, 124, dtype=torch.bfloat16), w=w)
        far = {"dtype": torch.bfloat16, "device": "meta"}  # rows, of which no memory is needed
        assert used(x=torch.empty_strided((64, 128), (2**31 - 8, 1), **far))
        assert not used(x=torch.empty_strided((64, 128), (2**31, 1), **far))
        assert not used(w=torch.empty(2, 128, 512, dtype=torch.bfloat16)[..., ::2])
        assert used(w=torch.empty(2, 128, 256, dtype=torch.bfloat16))  # stored by rows
        assert used(kind="relu2")
        assert not used(kind="gelu")
        # a multiple of 16 bytes, but not of 16 elements
        w = torch.empty(2, 272, 128, dtype=torch.bfloat16).mT
        assert not used(w=w, out=torch.empty(64, 136, dtype=torch.bfloat16))
        tiles = {(64, 128): True, (128, 128): True, (128, 256): False, (256, 64): False}
        tiles |= {(32, 128): False, (64, 32): False}
        for (m, n), known in tiles.items():
            assert used(cut={"block_m": m, "block_n": n}) == known
        for changed in ({"block_k": 128}, {"stages": 1}, {"warps": 4}):
            assert not used(cut=changed)

    check_where_it_is_used(monkeypatch, used, cases)
