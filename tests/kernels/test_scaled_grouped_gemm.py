"""scaled_grouped_gemm and fp8_grouped_gemm: values, gradients, layouts, ragged groups, padding."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from moe_kernels import reference
from tests.conftest import Implementation
from tests.kernels.accuracy import (
    assert_accurate,
    float8_limit,
    frobenius_error,
    gradients,
    worst_row_error,
)

FLOAT8 = torch.float8_e4m3fn
GROUPS = {
    "ragged": [0, 5, 5, 38, 39, 70],
    "one": [0, 23],
    "all_to_last": [0, 0, 0, 0, 61],
    "none": [0, 0, 0],
}
SIZES = [(256, 128), (300, 200), (129, 33), (40, 264), (1, 1)]
PADDING = 7  # rows after the last group


def _case(groups: str, inner: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """Rows and experts of different magnitudes; float32."""
    ends = GROUPS[groups]
    rows, experts = ends[-1] + PADDING, len(ends) - 1
    inputs = {
        "a": torch.randn(rows, inner) * torch.logspace(-3, 2, rows)[torch.randperm(rows), None],
        "b": torch.randn(experts, inner, columns) * torch.logspace(-1, 1, experts)[:, None, None],
        "bias": torch.randn(experts, columns),
    }
    return inputs, torch.tensor(ends, dtype=torch.int32)


def _quantized(inputs: dict[str, Tensor], transposed: bool = True) -> tuple[Tensor, ...]:
    """a, b, scales_a, scales_b, by the definition."""
    values, scales = reference.quantize_rows(inputs["a"])
    weights, weight_scales = reference.quantize_weights(inputs["b"], transposed=transposed)
    return values, weights, scales, weight_scales


def _roundtrip(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Plain PyTorch, block after block: rounded to float8 and back to x's dtype."""
    out = torch.empty_like(x)
    for i in range(0, x.shape[-2], block[0]):
        for j in range(0, x.shape[-1], block[1]):
            piece = x[..., i : i + block[0], j : j + block[1]].float()
            scale = (piece.abs().amax((-2, -1), keepdim=True) / 448).clamp_min(1e-30)
            back = (piece / scale).to(FLOAT8).float() * scale
            out[..., i : i + block[0], j : j + block[1]] = back.to(x.dtype)
    return out


def _products(a: Tensor, b: Tensor, groups: str) -> Tensor:
    """a @ b, group by group; zero after the last."""
    parts = [a[start:end] @ b[e] for e, (start, end) in enumerate(pairwise(GROUPS[groups]))]
    used = GROUPS[groups][-1]
    return torch.cat([*parts, a.new_zeros(a.shape[0] - used, b.shape[2])])


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("transposed", torch.bfloat16), ("plain", torch.float32), ("strided", torch.float16)],
)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_product_of_the_dequantised(
    impl: Implementation, sizes: tuple[int, int], groups: str, layout: str, dtype: torch.dtype
) -> None:
    inputs, offsets = _case(groups, *sizes)
    a, b, scales_a, scales_b = _quantized(inputs, transposed=layout == "transposed")
    bias = inputs["bias"].to(dtype) if layout != "strided" else None
    truth = reference.scaled_grouped_gemm(a, b, scales_a, scales_b, offsets, bias, torch.float64)
    used = GROUPS[groups][-1]
    a[used:] = torch.nan
    scales_a[used:] = torch.nan
    if layout == "strided":
        a, b = a.repeat_interleave(2, -1)[:, ::2], b.repeat_interleave(2, -1)[..., ::2]
        scales_a = scales_a.contiguous()
        scales_b = scales_b.repeat_interleave(2, -1)[..., ::2]
    tensors = (value.to(impl.device) for value in (a, b, scales_a, scales_b, offsets))
    out = moe_kernels.scaled_grouped_gemm(
        *tensors, bias=None if bias is None else bias.to(impl.device), out_dtype=dtype
    )
    if dtype == torch.float32:
        assert frobenius_error(out, truth) < float8_limit(impl.device)
        assert worst_row_error(out, truth) < 5 * float8_limit(impl.device)
    if dtype != torch.float32 or impl.device.type == "cpu":
        assert_accurate("out", out, truth, truth.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "save_float8"),
    [
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, True),
    ],
)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("sizes", SIZES)
def test_is_as_close_as_plain_pytorch(
    impl: Implementation,
    sizes: tuple[int, int],
    groups: str,
    dtype: torch.dtype,
    save_float8: bool,
    record_property: Any,
) -> None:
    """To the product of the unrounded operands, and its gradients."""
    inputs, offsets = _case(groups, *sizes)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    used = GROUPS[groups][-1]
    upstream = torch.randn(used + PADDING, sizes[1]).to(dtype)
    poisoned = {**inputs, "a": inputs["a"].clone()}
    poisoned["a"][used:] = torch.nan
    poisoned_upstream = upstream.clone()
    poisoned_upstream[used:] = torch.nan

    def ours(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return moe_kernels.fp8_grouped_gemm(
            a, b, offsets.to(a.device), bias=bias, save_float8=save_float8
        )

    actual = gradients(
        ours,
        {name: value.to(impl.device) for name, value in poisoned.items()},
        poisoned_upstream.to(impl.device),
    )
    wide = {name: value.double() for name, value in inputs.items()}
    truth = gradients(
        lambda a, b, bias: reference.grouped_gemm(a, b, offsets, bias), wide, upstream
    )
    a, b = _roundtrip(inputs["a"], (1, 128)), _roundtrip(inputs["b"], (128, 128))
    bias_rows = torch.repeat_interleave(inputs["bias"], offsets.diff(), dim=0)
    out = _products(a, b, groups)
    out[:used] += bias_rows
    plain = gradients(
        lambda a, b, bias: reference.grouped_gemm(a, b, offsets, bias),
        {**inputs, "a": a if save_float8 else inputs["a"], "b": b},
        upstream,
    )
    yardstick = {
        "out": out,
        "a": _products(_roundtrip(upstream, (1, 128)), b.mT, groups),
        "b": plain["b"],
        "bias": plain["bias"],
    }
    for name, value in truth.items():
        record_property(f"error of {name}", frobenius_error(actual[name], value))
        assert_accurate(name, actual[name], value, yardstick[name])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("save_float8", [True, False])
def test_gradients_are_those_documented(
    impl: Implementation, save_float8: bool, power_of_two: bool
) -> None:
    """Against float64 of the values that backward says it multiplies, which leaves no rounding."""
    inputs, offsets = _case("ragged", 300, 200)
    upstream = torch.randn(inputs["a"].shape[0], 200)
    found = gradients(
        lambda a, b, bias: moe_kernels.fp8_grouped_gemm(
            a,
            b,
            offsets.to(a.device),
            bias=bias,
            save_float8=save_float8,
            power_of_two=power_of_two,
        ),
        {name: value.to(impl.device) for name, value in inputs.items()},
        upstream.to(impl.device),
    )

    def rows(x: Tensor) -> Tensor:
        pair = reference.quantize_rows(x, power_of_two=power_of_two)
        return reference.dequantize_rows(*pair, torch.float64)

    b = reference.dequantize_weights(
        *reference.quantize_weights(inputs["b"], power_of_two=power_of_two), torch.float64
    )
    a = rows(inputs["a"])
    kept = a if save_float8 else inputs["a"].double()
    wide = upstream.double()
    expected = {
        "out": reference.grouped_gemm(a, b, offsets, inputs["bias"].double()),
        "a": reference.grouped_gemm(rows(upstream), b.mT, offsets),
        "b": torch.stack([kept[i:j].mT @ wide[i:j] for i, j in pairwise(GROUPS["ragged"])]),
        "bias": torch.stack([wide[i:j].sum(0) for i, j in pairwise(GROUPS["ragged"])]),
    }
    for name, value in expected.items():
        limit = float8_limit(impl.device) if name in ("out", "a") else 1e-6
        assert frobenius_error(found[name], value) < limit, name


def test_equals_its_parts(impl: Implementation) -> None:
    inputs, offsets = _case("ragged", 300, 200)
    a, b, bias = (inputs[name].bfloat16().to(impl.device) for name in ("a", "b", "bias"))
    offsets = offsets.to(impl.device)
    whole = moe_kernels.fp8_grouped_gemm(a, b, offsets, bias=bias, out_dtype=torch.float32)
    values, scales = moe_kernels.quantize_rows(a)
    weights, weight_scales = moe_kernels.quantize_weights(b)
    parts = moe_kernels.scaled_grouped_gemm(
        values, weights, scales, weight_scales, offsets, bias=bias, out_dtype=torch.float32
    )
    assert torch.equal(whole, parts)


def test_repeats_bit_for_bit_and_does_not_mix_rows(impl: Implementation) -> None:
    """A row's result depends on no other row, nor on what is in other experts."""
    inputs, offsets = _case("ragged", 300, 200)
    quantized = tuple(value.to(impl.device) for value in _quantized(inputs))
    first = moe_kernels.scaled_grouped_gemm(*quantized, offsets.to(impl.device))
    assert torch.equal(first, moe_kernels.scaled_grouped_gemm(*quantized, offsets.to(impl.device)))
    a, b, scales_a, scales_b = quantized
    scales_a[7], b[3] = torch.nan, torch.nan
    out = moe_kernels.scaled_grouped_gemm(a, b, scales_a, scales_b, offsets.to(impl.device))
    odd = torch.zeros(out.shape[0], dtype=torch.bool)
    odd[7] = odd[38] = True
    assert torch.equal(out.isnan().all(1).cpu(), odd)
    assert torch.equal(out[~odd], first[~odd])


def test_leaves_its_operands_alone(impl: Implementation) -> None:
    inputs, offsets = _case("ragged", 300, 200)
    operands = [value.to(impl.device) for value in (*_quantized(inputs), offsets)]
    before = [value.clone() for value in operands]
    out = moe_kernels.scaled_grouped_gemm(*operands)
    back = moe_kernels.dequantize_rows(operands[0], operands[2])
    for value, kept in zip(operands, before, strict=True):
        assert torch.equal(value.double(), kept.double())
        assert out.data_ptr() != value.data_ptr() != back.data_ptr()


@pytest.mark.parametrize(("rows", "inner", "columns"), [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
def test_empty_sizes(impl: Implementation, rows: int, inner: int, columns: int) -> None:
    a = torch.randn(rows, inner, device=impl.device, requires_grad=True)
    b = torch.randn(2, inner, columns, device=impl.device, requires_grad=True)
    bias = torch.randn(2, columns, device=impl.device, requires_grad=True)
    offsets = torch.tensor([0, rows // 2, rows], dtype=torch.int32, device=impl.device)
    out = moe_kernels.fp8_grouped_gemm(a, b, offsets, bias=bias)
    assert torch.equal(out, reference.grouped_gemm(a, b, offsets, bias))
    out.sum().backward()
    for leaf in (a, b):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert bias.grad is not None
    counts = offsets.diff()[:, None].expand(2, columns)
    assert torch.equal(bias.grad, counts.float())
    none = torch.zeros(1, dtype=torch.int32, device=impl.device)
    zero = moe_kernels.fp8_grouped_gemm(a.detach(), b[:0].detach(), none)
    assert torch.equal(zero, torch.zeros(rows, columns, device=impl.device))


def test_float64_on_the_cpu() -> None:
    inputs, offsets = _case("ragged", 300, 200)
    quantized = _quantized(inputs)
    bias = inputs["bias"].double()
    out = moe_kernels.scaled_grouped_gemm(*quantized, offsets, bias=bias, out_dtype=torch.float64)
    truth = reference.scaled_grouped_gemm(*quantized, offsets, bias, torch.float64)
    assert frobenius_error(out, truth) < 1e-14
    a, b = inputs["a"].double().requires_grad_(), inputs["b"].double().requires_grad_()
    whole = moe_kernels.fp8_grouped_gemm(a, b, offsets, bias=bias)
    assert frobenius_error(whole.detach(), truth) < 1e-14
    whole.sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float64


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradient_has_the_strides_of_the_weight(
    impl: Implementation, transposed: bool
) -> None:
    offsets = torch.tensor([0, 3, 9], dtype=torch.int32, device=impl.device)
    a = torch.randn(9, 8, device=impl.device)
    shape = (2, 5, 8) if transposed else (2, 8, 5)
    stored = torch.randn(shape, device=impl.device, requires_grad=True)
    b = stored.mT if transposed else stored
    (grad,) = torch.autograd.grad(moe_kernels.fp8_grouped_gemm(a, b, offsets).sum(), stored)
    assert grad.stride() == stored.stride()


def _leaves(impl: Implementation) -> tuple[dict[str, Tensor], Tensor]:
    inputs, offsets = _case("ragged", 300, 200)
    leaves = {
        name: value.bfloat16().to(impl.device).requires_grad_() for name, value in inputs.items()
    }
    return leaves, offsets.to(impl.device)


@pytest.mark.parametrize("save_float8", [True, False])
def test_split_backward_equals_one(impl: Implementation, save_float8: bool) -> None:
    leaves, offsets = _leaves(impl)
    out = moe_kernels.fp8_grouped_gemm(**leaves, offsets=offsets, save_float8=save_float8)
    upstream = torch.randn_like(out)
    whole = torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)
    product = 2 * 77 * 300 * 200
    for names, products in ((["a"], 1), (["b"], 1), (["bias"], 0), (["a", "b"], 2)):
        with FlopCounterMode(display=False) as counter:
            grads = torch.autograd.grad(
                out, [leaves[n] for n in names], upstream, retain_graph=True
            )
        assert counter.get_total_flops() == products * product, names
        for name, grad in zip(names, grads, strict=True):
            assert torch.equal(grad, whole[list(leaves).index(name)]), name


@pytest.mark.parametrize("frozen", ["a", "b", "bias"])
def test_frozen_inputs_get_no_gradient(impl: Implementation, frozen: str) -> None:
    leaves, offsets = _leaves(impl)
    leaves[frozen] = leaves[frozen].detach()
    moe_kernels.fp8_grouped_gemm(**leaves, offsets=offsets).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}


def test_saves_what_is_documented(impl: Implementation) -> None:
    leaves, offsets = _leaves(impl)
    rows, inner = leaves["a"].shape
    shared = {leaves["b"].data_ptr(), offsets.data_ptr()}

    def saved(**changes: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            sizes[value.data_ptr()] = value.numel() * value.element_size()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            moe_kernels.fp8_grouped_gemm(**{**leaves, "offsets": offsets, **changes})
        return sum(size for pointer, size in sizes.items() if pointer not in shared)

    assert saved() == rows * (inner + 4 * 3)
    assert saved(save_float8=False) == rows * inner * 2
    assert saved(b=leaves["b"].detach()) == 0
    with torch.no_grad():
        assert saved() == 0


def test_autocast_follows_linear(impl: Implementation) -> None:
    inputs, offsets = _case("ragged", 40, 24)
    leaves = {name: value.to(impl.device).requires_grad_() for name, value in inputs.items()}
    leaves["a"] = leaves["a"].detach().bfloat16().requires_grad_()
    offsets = offsets.to(impl.device)
    with torch.autocast(impl.device.type, dtype=torch.bfloat16):
        out = moe_kernels.fp8_grouped_gemm(**leaves, offsets=offsets)
        # what is quantised already stays as it is
        values, scales = moe_kernels.quantize_rows(leaves["a"].detach())
        weights, weight_scales = moe_kernels.quantize_weights(leaves["b"].detach().bfloat16())
        parts = moe_kernels.scaled_grouped_gemm(
            values, weights, scales, weight_scales, offsets, bias=leaves["bias"].detach().bfloat16()
        )
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, parts)
    out.float().sum().backward()
    assert leaves["b"].grad is not None
    assert leaves["b"].grad.dtype == torch.float32


def test_no_gradient_of_what_is_quantised_and_no_second_one(impl: Implementation) -> None:
    leaves, offsets = _leaves(impl)
    with torch.no_grad():
        values, scales = moe_kernels.quantize_rows(leaves["a"])
        weights, weight_scales = moe_kernels.quantize_weights(leaves["b"])
    out = moe_kernels.scaled_grouped_gemm(
        values, weights, scales.requires_grad_(), weight_scales, offsets
    )
    with pytest.raises(RuntimeError, match="scaled_grouped_gemm: float8 operands have no gradient"):
        out.sum().backward()
    out = moe_kernels.fp8_grouped_gemm(**leaves, offsets=offsets)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["a"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"have no gradient|double backward is not supported"):
        grad.sum().backward()


def test_refuses_what_does_not_fit() -> None:
    inputs, offsets = _case("ragged", 8, 6)
    a, b, scales_a, scales_b = _quantized(inputs)
    gemm, train = moe_kernels.scaled_grouped_gemm, moe_kernels.fp8_grouped_gemm
    with pytest.raises(TypeError, match="a must be one of float8_e4m3fn; got float32"):
        gemm(inputs["a"], b, scales_a, scales_b, offsets)
    with pytest.raises(TypeError, match="b must be one of float8_e4m3fn; got float32"):
        gemm(a, inputs["b"], scales_a, scales_b, offsets)
    with pytest.raises(ValueError, match=r"scales_a must be .* = \[77, 1\] .* got \[76, 1\]"):
        gemm(a, b, scales_a[:-1], scales_b, offsets)
    with pytest.raises(ValueError, match=r"scales_b must be .* = \[5, 1, 1\] .* got \[5, 1, 2\]"):
        gemm(a, b, scales_a, scales_b.expand(5, 1, 2), offsets)
    with pytest.raises(TypeError, match="scales_b must be one of float32; got bfloat16"):
        gemm(a, b, scales_a, scales_b.bfloat16(), offsets)
    with pytest.raises(TypeError, match=r"out_dtype must be a float dtype; got torch\.float8"):
        gemm(a, b, scales_a, scales_b, offsets, out_dtype=FLOAT8)
    with pytest.raises(TypeError, match="bias must be one of"):
        gemm(a, b, scales_a, scales_b, offsets, bias=inputs["bias"].to(FLOAT8))
    for call in (
        lambda b, offsets, bias: gemm(a, b.to(FLOAT8), scales_a, scales_b, offsets, bias=bias),
        lambda b, offsets, bias: train(inputs["a"], b, offsets, bias=bias),
    ):
        with pytest.raises(ValueError, match=r"Kd = 8 \(a.shape\[1\]\); got \[5, 9, 6\]"):
            call(torch.randn(5, 9, 6), offsets, None)
        with pytest.raises(ValueError, match=r"bias must be \[E, N\] = \[5, 6\]; got \[5, 5\]"):
            call(inputs["b"], offsets, inputs["bias"][:, :5])
        with pytest.raises(TypeError, match="offsets must be one of int32"):
            call(inputs["b"], offsets.long(), None)
        for bad in ([0, 5, 4, 38, 39, 70], [1, 5, 5, 38, 39, 70], [0, 5, 5, 38, 39, 78]):
            with pytest.raises(ValueError, match="offsets must rise from 0"):
                call(inputs["b"], torch.tensor(bad, dtype=torch.int32), None)
    with pytest.raises(TypeError, match="bias must have a's dtype"):
        train(inputs["a"], inputs["b"], offsets, bias=inputs["bias"].double())
    with pytest.raises(TypeError, match="a must be one of bfloat16, float16, float32, float64"):
        train(a, b, offsets)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="b must be one of bfloat16, float16, float32, float64"),
    ):
        train(inputs["a"], b, offsets)
