"""What tests of kernels whose warps have roles share: experts' rows, launches, mistakes, use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.triton import _operands, _tiles
from moe_kernels.triton._activation import Activation
from tests.conftest import triton_under_cpu
from tests.kernels import gluon_model
from tests.kernels.accuracy import frobenius_error, worst_row_error
from tests.kernels.gluon_model import Descriptor, Language

Names = dict[str, Any]
Mistake = Callable[[Names], Names]  # what names of the kernel's modules mean, from what they meant

BLOCK_M, BLOCK_N = 8, 8
PROGRAMS = 2
SCHEDULES = 12  # of which one must show a mistake


class Epilogue(NamedTuple):
    """What the up-projection does with its sums.

    Attributes:
        interleaved: columns of gate and up; else they are halves.
        saves: h is kept.
    """

    kind: str
    interleaved: bool
    biased: bool
    saves: bool


# each kind of columns with a bias and without, and with h and without
EPILOGUES = (
    Epilogue("swiglu", interleaved=False, biased=False, saves=True),
    Epilogue("swiglu", interleaved=False, biased=True, saves=True),
    Epilogue("swigluoai", interleaved=False, biased=True, saves=True),
    Epilogue("swigluoai", interleaved=True, biased=True, saves=True),
    Epilogue("geglu", interleaved=False, biased=False, saves=False),
    Epilogue("geglu", interleaved=True, biased=False, saves=True),
    Epilogue("reglu", interleaved=True, biased=True, saves=False),
    Epilogue("reglu", interleaved=False, biased=True, saves=False),
    Epilogue("relu2", interleaved=False, biased=False, saves=True),
    Epilogue("silu", interleaved=False, biased=True, saves=True),
    Epilogue("silu", interleaved=False, biased=True, saves=False),
    Epilogue("swiglu", interleaved=True, biased=False, saves=False),
)


class BackwardEpilogue(NamedTuple):
    """What backward through the down-projection does with its sums.

    Attributes:
        clamps: with a limit, of the activations that have one.
        writes: dH, s * A and the parts of dS, or some of them.
    """

    kind: str
    interleaved: bool
    clamps: bool
    writes: str = "has"


# every activation, halves and pairs, with a clamp and without; and each output alone
BACKWARD_EPILOGUES = (
    BackwardEpilogue("swiglu", interleaved=False, clamps=False),
    BackwardEpilogue("swiglu", interleaved=False, clamps=True),
    BackwardEpilogue("swiglu", interleaved=True, clamps=True),
    BackwardEpilogue("swigluoai", interleaved=False, clamps=True),
    BackwardEpilogue("swigluoai", interleaved=True, clamps=True),
    BackwardEpilogue("geglu", interleaved=False, clamps=False),
    BackwardEpilogue("geglu", interleaved=True, clamps=False),
    BackwardEpilogue("reglu", interleaved=True, clamps=False, writes="h"),
    BackwardEpilogue("reglu", interleaved=False, clamps=False, writes="hs"),
    BackwardEpilogue("relu2", interleaved=False, clamps=False),
    BackwardEpilogue("gelu", interleaved=False, clamps=False),
    BackwardEpilogue("silu", interleaved=False, clamps=False, writes="a"),
    BackwardEpilogue("silu", interleaved=False, clamps=False, writes="s"),
)


def other_parity(step: int, stages: int) -> tuple[int, int]:
    return step % stages, (step // stages + 1) & 1


def parity_of_step(step: int, stages: int) -> tuple[int, int]:
    return step % stages, step & 1


def no_mistake(names: Names) -> Names:
    return {}


def tile_map(counts: list[int]) -> tuple[Tensor, int]:
    """The tiles of experts with so many rows, with room for two more; and its bound."""
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    tiles = [
        (e, first, end)
        for e, (start, end) in enumerate(pairwise(offsets))
        for first in range(start, end, BLOCK_M)
    ]
    columns = [[tile[i] for tile in tiles] + [-1, -1] for i in range(3)]
    values = [len(tiles), *columns[0], *columns[1], *columns[2]]
    return torch.tensor(values, dtype=torch.int32), len(tiles) + 2


def described(w: Tensor, block_k: int, block_n: int, transposed: bool) -> Descriptor:
    """``w [E, Kd, N]``, stored [E, N, Kd] if transposed."""
    if transposed:
        return Descriptor(w.mT.contiguous(), (1, block_n, block_k))
    return Descriptor(w, (1, block_k, block_n))


def _walk_among_tiles(names: Names) -> Callable[..., Any]:
    """``walk``, of a tile that there is: a GPU divides by how many there are, towards zero."""
    walk = gluon_model.as_python(_tiles.walk, names)

    def checked(number: Any, row_tiles: Any, column_tiles: Any, group_m: int) -> Any:
        assert 0 <= number < row_tiles * column_tiles, "a tile that there is not"
        return walk(number, row_tiles, column_tiles, group_m)

    return checked


def launch(
    kernel: Any, arguments: Sequence[Any], seed: int, mistake: Mistake, **constants: Any
) -> None:
    """Run every program, on a model of its own."""
    for program in range(PROGRAMS):
        names = Language(program, PROGRAMS, seed).names
        names["walk"] = _walk_among_tiles(names)
        names |= mistake(names)
        function = gluon_model.as_python(kernel, names)
        cut = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "GROUP_M": 2}
        function(*arguments, **cut | constants)


def products(rows: Tensor, w: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """In float64; those of rows of no expert are NaN."""
    right = rows.new_full((len(rows), w.shape[2]), torch.nan, dtype=torch.float64)
    start = 0
    for e, count in enumerate(counts):
        end = start + count
        shift = 0 if bias is None else bias[e].double()
        right[start:end] = rows[start:end].double() @ w[e].double() + shift
        start = end
    return right


def backward(
    grad: Tensor,
    down: Tensor,
    h: Tensor,
    scale: Tensor,
    activation: Activation,
    counts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, s * A and dS in float64, of rows of dO; those of rows of no expert are NaN.

    Args:
        down: [E, I, H].
        scale: s, of rows.
    """
    upstream = products(grad, down.mT, None, counts)
    wide, s = h.double().requires_grad_(), scale.double()[:, None]
    options = (activation.kind, None, activation.interleaved, activation.alpha, activation.limit)
    with torch.enable_grad():
        a = reference.expert_activation(wide, *options)
        (dh,) = torch.autograd.grad(a, wide, upstream.nan_to_num(0.0) * s)
    a, unused = a.detach(), upstream.isnan().any(1)[:, None]
    nothing = torch.full((), torch.nan, dtype=torch.float64, device=h.device)
    return (
        torch.where(unused, nothing, dh),
        torch.where(unused, nothing, a * s),
        (upstream * a).sum(1, keepdim=True),
    )


def check(out: Tensor, right: Tensor, limit: float = 4e-3) -> None:
    """``limit``: of the error of all, by default that of rounding to bfloat16 and some."""
    assert torch.equal(out.isnan(), right.isnan())
    kept = ~right.isnan()
    assert frobenius_error(out[kept], right[kept]) < limit
    # a row that is wrong is lost among many; a row's largest values are a few times the usual ones
    rows = ~right.isnan().any(1)
    assert worst_row_error(out[rows], right[rows]) < max(0.05, 2 * limit)


def check_that_some_schedule_ends_in(
    error: type[AssertionError] | tuple[type[AssertionError], ...], run: Callable[[int], None]
) -> None:
    """``run``: with that seed."""
    others = []
    for seed in range(SCHEDULES):
        try:
            run(seed)
        except error:
            return
        except AssertionError as other:
            others.append(type(other).__name__)
    raise AssertionError(f"no schedule shows it; {others}")


def check_it_is_used_on_hopper_alone(
    monkeypatch: pytest.MonkeyPatch, used: Callable[[], bool]
) -> None:
    """And with the releases of Triton that are known."""
    for arch in (80, 100):
        with monkeypatch.context() as patch:
            patch.setattr(_operands, "architecture", lambda device, arch=arch: arch)
            assert not used()
    for version, known in {(3, 5): False, (3, 6): True, (3, 9): True, (3, 10): False}.items():
        monkeypatch.setattr(_operands, "TRITON_VERSION", version)
        assert used() == known


def check_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
    used: Callable[..., bool],
    cases: Callable[[], None],
) -> None:
    """Whether the kernel is ``used``, by default in a call that it is made for.

    Args:
        used: takes who gives warps their roles, and the dtype.
        cases: more that is checked where a kernel may be used.
    """
    with triton_under_cpu():
        assert not used()  # Gluon is not interpreted
        monkeypatch.setattr(_operands, "INTERPRETED", False)
        assert used()
        assert used(dtype=torch.float16)
        assert not used("no")
        assert not used("triton")
        assert not used(dtype=torch.float32)
        cases()
        check_it_is_used_on_hopper_alone(monkeypatch, used)
