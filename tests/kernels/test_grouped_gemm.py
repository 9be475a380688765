"""grouped_gemm and its gradients: layouts, ragged groups, accumulation, poisoned padding."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels import reference
from moe_kernels.reference.grouped_gemm import grouped_gemm_wgrad as wgrad_definition
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate, gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = {
    "ragged": [0, 5, 5, 38, 39, 70],
    "one": [0, 23],
    "all_to_last": [0, 0, 0, 0, 61],
    "none": [0, 0, 0],
}
PADDING = 7  # rows after the last group


def _case(
    groups: str, inner: int, columns: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    offsets = torch.tensor(GROUPS[groups], dtype=torch.int32)
    rows, experts = GROUPS[groups][-1] + PADDING, len(GROUPS[groups]) - 1
    inputs = {
        "a": torch.randn(rows, inner).to(dtype),
        "b": torch.randn(experts, inner, columns).to(dtype),
        "bias": torch.randn(experts, columns).to(dtype),
    }
    return inputs, offsets


def _poison(value: Tensor, used: int) -> Tensor:
    value = value.clone()
    value[used:] = float("nan")
    return value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("sizes", [(64, 48), (33, 17), (1, 1)])
def test_equals_definition(
    impl: Implementation, sizes: tuple[int, int], groups: str, layout: str, dtype: torch.dtype
) -> None:
    inputs, offsets = _case(groups, *sizes, dtype)
    used = GROUPS[groups][-1]

    def view(b: Tensor) -> Tensor:
        if layout == "transposed":
            return b.mT.contiguous().mT
        if layout == "strided":
            return b.repeat_interleave(2, -1)[..., ::2]
        return b

    def ours(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        bias = bias.repeat_interleave(2, -1)[:, ::2] if layout == "strided" else bias
        return moe_kernels.grouped_gemm(a, view(b), offsets.to(a.device), bias=bias)

    def definition(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return reference.grouped_gemm(a, b, offsets, bias)

    def chain(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        parts = [
            a[start:end] @ b[e] + bias[e] for e, (start, end) in enumerate(pairwise(GROUPS[groups]))
        ]
        return torch.cat([*parts, a.new_zeros(PADDING, b.shape[2])])

    upstream = torch.randn(used + PADDING, sizes[1]).to(dtype)
    poisoned = {**inputs, "a": _poison(inputs["a"], used)}
    actual = gradients(
        ours,
        {key: value.to(impl.device) for key, value in poisoned.items()},
        _poison(upstream, used).to(impl.device),
    )
    truth = gradients(definition, {k: v.double() for k, v in inputs.items()}, upstream)
    yardstick = gradients(chain, inputs, upstream)
    for name, value in truth.items():
        assert_accurate(name, actual[name], value, yardstick[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_has_the_strides_of_the_weight(
    impl: Implementation, dtype: torch.dtype
) -> None:
    offsets = torch.tensor([0, 3, 9], dtype=torch.int32, device=impl.device)
    a = torch.randn(9, 8, dtype=dtype).to(impl.device)
    stored = torch.randn(2, 5, 8, dtype=dtype).to(impl.device).requires_grad_()
    out = moe_kernels.grouped_gemm(a, stored.mT, offsets)
    (grad,) = torch.autograd.grad(out.sum(), stored)
    assert grad.stride() == stored.stride()


def test_out_dtype_keeps_the_sums(impl: Implementation) -> None:
    inputs, offsets = _case("ragged", 64, 48, torch.bfloat16)
    out = moe_kernels.grouped_gemm(
        inputs["a"].to(impl.device),
        inputs["b"].to(impl.device),
        offsets.to(impl.device),
        out_dtype=torch.float32,
    )
    truth = reference.grouped_gemm(inputs["a"].double(), inputs["b"].double(), offsets)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu().double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_wgrad_accumulates_into_a_buffer(
    impl: Implementation, dtype: torch.dtype, transposed: bool
) -> None:
    inputs, offsets = _case("ragged", 24, 40, dtype)
    used = GROUPS["ragged"][-1]
    a, grad = inputs["a"], torch.randn(used + PADDING, 40).to(dtype)
    start = torch.randn(5, 40, 24).mT if transposed else torch.randn(5, 24, 40)
    out = start.clone().to(impl.device)
    result = moe_kernels.grouped_gemm_wgrad(
        _poison(a, used).to(impl.device),
        _poison(grad, used).to(impl.device),
        offsets.to(impl.device),
        out=out,
    )
    assert result is out
    assert out.stride() == start.stride()
    added = wgrad_definition(a.double(), grad.double(), offsets, torch.float64, False)
    expected = start.double() + added
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wgrad_past_the_caches_keeps_nan_and_infinities(dtype: torch.dtype) -> None:
    # Large results are written past the caches, where rounding is code of its own.
    counts = torch.tensor([1, 5, 8, 20, 21])
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    a, grad = torch.randn(55, 1100).to(dtype), torch.randn(55, 2048).to(dtype)
    infinity, nan = float("inf"), float("nan")
    for start, count in zip(offsets.tolist(), counts.tolist(), strict=False):
        a[start, 3], a[start + count - 1, 70], grad[start, 5] = infinity, nan, -infinity
    a[:, 9], grad[:, 40] = 0.0, -0.0
    if dtype == torch.bfloat16:  # every quiet NaN there is
        patterns = torch.tensor([*range(0x7FC0, 0x8000), *range(-64, 0)], dtype=torch.int16)
        grad[8, 100:228] = patterns.view(torch.bfloat16)
    found = moe_kernels.grouped_gemm_wgrad(a, grad, offsets)
    assert found.numel() * found.element_size() > 16 << 20
    expected = wgrad_definition(a.double(), grad.double(), offsets, torch.float64, False)
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found.double(), expected, equal_nan=True, **close)


def test_autograd_knows_that_a_buffer_was_added_to(impl: Implementation) -> None:
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32, device=impl.device)
    a, grad = torch.randn(5, 4, device=impl.device), torch.randn(5, 3, device=impl.device)
    buffer = torch.zeros(2, 4, 3, device=impl.device)
    x = torch.randn(2, 4, 3, device=impl.device, requires_grad=True)
    y = x * buffer  # saves it for the gradient of x
    moe_kernels.grouped_gemm_wgrad(a, grad, offsets, out=buffer)
    assert buffer._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(ValueError, match="out must not require a gradient"):
        moe_kernels.grouped_gemm_wgrad(a, grad, offsets, out=x)
    with torch.no_grad():
        moe_kernels.grouped_gemm_wgrad(a, grad, offsets, out=x)
    with torch.inference_mode():  # where tensors have no versions
        new = torch.zeros(2, 4, 3, device=impl.device)
        moe_kernels.grouped_gemm_wgrad(a, grad, offsets, out=new)
    assert torch.equal(new, buffer)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_no_rows(impl: Implementation, transposed: bool) -> None:
    offsets = torch.zeros(3, dtype=torch.int32, device=impl.device)
    a, grad = torch.empty(0, 5, device=impl.device), torch.empty(0, 7, device=impl.device)
    ops = torch.ops.moe_kernels
    new = ops.grouped_gemm_wgrad(a, grad, offsets, torch.float32, transposed)
    assert torch.equal(new, torch.zeros_like(new))
    out = torch.ones_like(new)
    assert torch.equal(
        moe_kernels.grouped_gemm_wgrad(a, grad, offsets, out=out), torch.ones_like(new)
    )
    bias = ops.grouped_gemm_dbias(grad, offsets, torch.float32)
    assert torch.equal(bias, torch.zeros_like(bias))


def test_refuses_what_does_not_fit() -> None:
    inputs, offsets = _case("ragged", 8, 6, torch.float32)
    a, b, bias = inputs["a"], inputs["b"], inputs["bias"]
    gemm = moe_kernels.grouped_gemm
    with pytest.raises(ValueError, match=r"Kd = 8 \(a.shape\[1\]\); got \[5, 9, 6\]"):
        gemm(a, torch.randn(5, 9, 6), offsets)
    with pytest.raises(ValueError, match="E = 5"):
        gemm(a, b[:4], offsets)
    with pytest.raises(ValueError, match="bias must be"):
        gemm(a, b, offsets, bias=bias[:, :5])
    with pytest.raises(TypeError, match="b must have a's dtype"):
        gemm(a, b.double(), offsets)
    with pytest.raises(TypeError, match="offsets must be one of int32"):
        gemm(a, b, offsets.long())
    for bad in ([0, 5, 4, 38, 39, 70], [1, 5, 5, 38, 39, 70], [0, 5, 5, 38, 39, 78]):
        with pytest.raises(ValueError, match="offsets must rise from 0"):
            gemm(a, b, torch.tensor(bad, dtype=torch.int32))
    rows = torch.randn(77, 8)
    expanded = torch.zeros(1, 8, 8).expand(5, 8, 8)
    with pytest.raises(ValueError, match="out must have memory of its own for each element"):
        moe_kernels.grouped_gemm_wgrad(rows, rows, offsets, out=expanded)
    with pytest.raises(TypeError, match="out_dtype must be a float dtype"):
        moe_kernels.grouped_gemm_wgrad(rows, rows, offsets, out_dtype=torch.int8)
