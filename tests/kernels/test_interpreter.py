"""The mended interpreter computes bfloat16 and float8 as PyTorch does; the plain one does not."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.conftest import HAS_GPU
from tests.kernels.interpreter import mended_interpreter

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
