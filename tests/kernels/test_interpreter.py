"""The mended interpreter computes bfloat16 as PyTorch does, and the plain one does not."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.conftest import HAS_GPU
from tests.kernels.interpreter import bfloat16_interpreter

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
    with bfloat16_interpreter() if mended else nullcontext():
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
