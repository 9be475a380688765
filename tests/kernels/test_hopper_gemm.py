"""The product whose warps have roles, for sm_90: its protocol, in a model; and when it is used."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels.triton import _hopper_gemm, _operands
from moe_kernels.triton._config_tables import Config
from tests.conftest import HAS_GPU, triton_under_cpu
from tests.kernels import gluon_model
from tests.kernels.accuracy import frobenius_error
from tests.kernels.gluon_model import DeadlockError, Descriptor, Language, Pointer, RaceError

pytestmark = pytest.mark.skipif(HAS_GPU, reason="models what a GPU does")

Names = dict[str, Any]

BLOCK_M, BLOCK_N, BLOCK_K = 8, 8, 4
PROGRAMS = 2


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
    mistake: Callable[[Names], Names] = lambda names: {},
) -> tuple[Tensor, Tensor]:
    """The product of a model, and the right one; rows of no expert stay NaN.

    Args:
        counts: rows of each expert.
        mistake: names of the kernel's module that mean something else, from what they mean.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, experts = sum(counts) + 3, len(counts)
    a = torch.randn(rows, contracted, generator=generator).bfloat16()
    b = torch.randn(experts, contracted, columns, generator=generator).bfloat16()
    bias = torch.randn(experts, columns, generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    tiles = torch.tensor(tile_map(offsets.tolist()), dtype=torch.int32)
    bound = (tiles.numel() - 1) // 3
    out = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    if transposed:
        w = Descriptor(b.mT.contiguous(), (1, BLOCK_N, BLOCK_K))
    else:
        w = Descriptor(b, (1, BLOCK_K, BLOCK_N))
    for program in range(PROGRAMS):
        names = Language(program, PROGRAMS, seed).names
        names |= mistake(names)
        kernel = gluon_model.as_python(_hopper_gemm._hopper_gemm_kernel, names)
        kernel(
            Descriptor(a, (BLOCK_M, BLOCK_K)), w, Pointer(bias.flatten()), Pointer(out.view(-1)),
            Pointer(tiles), bound, columns, contracted, columns, 1, SHARED=shared,
            TRANSPOSED=transposed, BIASED=biased, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K, GROUP_M=2, STAGES=stages,
        )  # fmt: skip
    right = torch.full((rows, columns), torch.nan, dtype=torch.float64)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        right[start:end] = a[start:end].double() @ b[e].double() + biased * bias[e].double()
    return out, right


def tile_map(offsets: list[int]) -> list[int]:
    tiles = [
        (e, first, end)
        for e, (start, end) in enumerate(pairwise(offsets))
        for first in range(start, end, BLOCK_M)
    ]
    # with room for two more
    columns = [[tile[i] for tile in tiles] + [-1, -1] for i in range(3)]
    return [len(tiles), *columns[0], *columns[1], *columns[2]]


def check(out: Tensor, right: Tensor) -> None:
    assert torch.equal(out.isnan(), right.isnan())
    kept = ~right.isnan()
    assert frobenius_error(out[kept], right[kept]) < 4e-3


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

    with triton_under_cpu():
        assert not used()  # Gluon is not interpreted
        monkeypatch.setattr(_operands, "INTERPRETED", False)
        assert used()
        assert used(dtype=torch.float16)
        assert not used("no")
        assert not used("triton")
        assert not used(dtype=torch.float32)
        assert not used(out=torch.empty(64, 256))
        assert not used(a=torch.empty(64, 130, dtype=torch.bfloat16)[:, 1:129])
        assert not used(b=torch.empty(2, 128, 512, dtype=torch.bfloat16)[..., ::2])
        assert not used(block_k=32)
        for arch in (80, 100):
            with monkeypatch.context() as patch:
                patch.setattr(_operands, "architecture", lambda device, arch=arch: arch)
                assert not used()
        for version, known in {(3, 5): False, (3, 6): True, (3, 7): True, (3, 8): False}.items():
            monkeypatch.setattr(_operands, "TRITON_VERSION", version)
            assert used() == known


def _other_parity(step: int, stages: int) -> tuple[int, int]:
    return step % stages, (step // stages + 1) & 1


def _parity_of_step(step: int, stages: int) -> tuple[int, int]:
    return step % stages, step & 1


def _waits_for_one_product_less(names: Names) -> Names:
    wait = names["warpgroup_mma_wait"]
    return {"warpgroup_mma_wait": lambda number, deps: wait(2 if number else 0, deps)}


MISTAKES: dict[str, Callable[[Names], Names]] = {
    "the other parity": lambda names: {"_slot": _other_parity},
    "the parity of the step, not of the use": lambda names: {"_slot": _parity_of_step},
    "slots are not handed back": lambda names: {"_hand_back": lambda *arguments: None},
    "slots are handed back while they are read": _waits_for_one_product_less,
    "warps do not meet": lambda names: {"meet": lambda: None},
    "barriers are not shown to TMA": lambda names: {"fence_async_shared": lambda: None},
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(mistake: str, shared: bool) -> None:
    found = []
    for seed in range(12):
        try:
            out, right = multiply(
                [9, 16], 12, 16, shared=shared, stages=2, seed=seed, mistake=MISTAKES[mistake]
            )
            check(out, right)
        except AssertionError as error:
            found.append(type(error).__name__)
            if isinstance(error, (DeadlockError, RaceError)):
                return
    raise AssertionError(f"no schedule shows it; {found}")


def test_a_ring_of_one_slot_never_ends() -> None:
    """Which is why no table may ask for it: its slot is handed back after the next step."""
    with pytest.raises(DeadlockError):
        multiply([8], 8, 8, stages=1)
