"""The mended interpreter computes bfloat16 and float8 as PyTorch does; the plain one does not.

What makes it quicker changes no bits.
"""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from tests.conftest import HAS_GPU
from tests.kernels.interpreter import mended_interpreter
from tests.kernels.quick_interpreter import quick_interpreter

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled where there is a GPU")


def _run(mended: bool, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, out, dot, rounded, N: tl.constexpr):
        index = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        x, y = tl.load(a + index), tl.load(b + index)
        tl.store(out + index, x * y + x)
        tl.store(dot + index, tl.dot(x, y))
        tl.store(rounded + index, (x.to(tl.float32) * 1.001).to(tl.bfloat16))

    n = a.shape[0]
    results = {
        "arithmetic": torch.full_like(a, torch.nan),
        "dot": torch.full((n, n), torch.nan),
        "rounding": torch.full_like(a, torch.nan),
    }
    with mended_interpreter() if mended else nullcontext():
        kernel[(1,)](a, b, *results.values(), N=n)
    return results


@pytest.mark.parametrize("name", ["arithmetic", "dot", "rounding"])
def test_bfloat16(name: str) -> None:
    a, b = torch.randn(2, 16, 16).bfloat16()
    a[0, 0] = torch.nan
    expected = {
        "arithmetic": a * b + a,
        "dot": a.float() @ b.float(),
        "rounding": (a.float() * 1.001).bfloat16(),
    }[name]
    mended = _run(True, a, b)[name]
    torch.testing.assert_close(mended, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    if name != "rounding":
        # once this fails, Triton's own interpreter is right and the mending can go
        plain = _run(False, a, b)[name]
        assert not torch.allclose(plain.float(), expected.float(), equal_nan=True, rtol=0.1)


def test_float8() -> None:
    """Every number of float8_e4m3fn, the middle of each two, and what is next to that."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, rounded, back, dot, N: tl.constexpr):
        i = tl.arange(0, N)
        values = tl.load(x + i).to(tl.float8e4nv)
        tl.store(rounded + i, values)
        tl.store(back + i, values.to(tl.float32))
        tile = tl.load(rounded + tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :])
        cell = dot + tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(cell, tl.dot(tile, tl.trans(tile)))

    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [middle, middle.nextafter(numbers[1:]), middle.nextafter(numbers[:-1])]
    x = torch.cat([numbers, *near, torch.tensor([torch.nan])])
    x = torch.cat([x, -x])
    x = torch.cat([x, x.new_zeros(1024 - x.numel())])
    expected = x.to(torch.float8_e4m3fn)
    tile = expected.float().view(32, 32)

    def run(mended: bool) -> tuple[Tensor, Tensor, Tensor]:
        rounded = torch.zeros(1024, dtype=torch.float8_e4m3fn)
        back, dot = torch.zeros(1024), torch.zeros(32, 32)
        with mended_interpreter() if mended else nullcontext():
            kernel[(1,)](x, rounded, back, dot, N=1024)
        return rounded.float(), back, dot

    rounded, back, dot = run(True)
    torch.testing.assert_close(rounded, expected.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, rounded, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dot, tile @ tile.mT, equal_nan=True)
    # once this fails, Triton's own interpreter is right and the mending can go
    assert not torch.allclose(run(False)[0], expected.float(), rtol=0, equal_nan=True)


def test_quicker_changes_no_bits() -> None:
    """Operands of every shape, types that change, sorts, and products beyond 32 bits."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, out, N: tl.constexpr):
        p = tl.program_id(0)
        i, j = tl.arange(0, 16), tl.arange(0, N)
        inside = (i < 13)[:, None] & (j < N - 3)[None, :]
        tile = tl.load(x + (p * 16 + i)[:, None] * N + j[None, :], mask=inside, other=1)
        row = tl.sum(tile, 0)[None, :]
        tile = tl.where(tile > row, tile * tl.max(tile) - 2, (row / 3).to(tl.float16))
        bits = (tile.to(tl.int32, bitcast=True) * 77777)[:, :, None] ^ tl.arange(0, 2)[
            None, None, :
        ]
        whole = tl.sort(tl.reshape(bits, (2 * 16 * N,)))
        order = tl.sort(tl.reshape(bits, (32, N)), descending=True)
        where = out + p * 4 * 16 * N + tl.arange(0, 2 * 16 * N)
        tl.store(where, whole + tl.cumsum(whole, 0))
        tl.store(where + 2 * 16 * N, tl.reshape(order, (2 * 16 * N,)))

    def run(context: AbstractContextManager[None]) -> Tensor:
        out = torch.zeros(2, 4, 16, 8, dtype=torch.int32)
        with context:
            kernel[(2,)](x, out, N=8)
        return out

    x = torch.randn(2, 16, 8)
    quick = run(quick_interpreter())
    assert torch.equal(quick, run(nullcontext()))
    assert quick.unique().numel() > 500


def test_quicker_refuses_the_same() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out):
        tl.store(out + tl.arange(0, 8), tl.arange(0, 8)[:, None] + tl.zeros((4, 8), tl.int32))

    messages = []
    for context in (quick_interpreter(), nullcontext()):
        with pytest.raises(Exception, match="incompatible dimensions") as raised, context:
            kernel[(1,)](torch.zeros(8, dtype=torch.int32))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
