"""Quantised experts: what codes mean, and the op against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from moe_kernels import QuantizedExperts, quantize_experts, reference
from moe_kernels.ops.expert_activation import resolve_activation
from moe_kernels.reference import ACTIVATIONS, is_gated
from moe_kernels.reference.quantized_experts import FORMATS, experts_from_mxfp4
from tests.conftest import GPU, HAS_GPU, poisoned_memory
from tests.kernels.accuracy import assert_accurate, frobenius_error, torch_experts
from tests.kernels.routing import SHAPES
from tests.kernels.test_fused_experts import limit_between, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of unit-scale normal weights: the relative Frobenius error that a format may make
ERRORS = {"int8": 0.01, "fp8": 0.03, "int4": 0.09, "mxfp4": 0.125}


@pytest.fixture(params=["cpu", GPU] if HAS_GPU else ["cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with poisoned_memory():
        yield torch.device(request.param)


def quantized(inputs: dict[str, Tensor], gate_up: str, down: str) -> dict[str, Any]:
    return {
        **inputs,
        "gate_up": quantize_experts(inputs["gate_up"], gate_up),
        "down": quantize_experts(inputs["down"], down),
    }


def check(
    inputs: dict[str, Tensor],
    gate_up: str = "int4",
    down: str | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> Tensor:
    """Compare with the definition on the weights that the codes stand for; returns our result."""
    device = device or torch.device("cpu")
    case = quantized(inputs, gate_up, down or gate_up)
    y = moe_kernels.fused_experts_quantized(
        **{name: value.to(device) for name, value in case.items()}, **options
    )
    alpha, limit = resolve_activation(
        "test",
        options.get("activation", "swiglu"),
        options.get("interleaved", False),
        options.get("alpha"),
        options.get("limit"),
    )
    resolved = {**options, "alpha": alpha, "limit": limit}

    def weights(dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: case[name].dequantize(dtype) for name in ("gate_up", "down")}

    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = reference.fused_experts(**{**wide, **weights(torch.float64)}, **resolved)
    yardstick = torch_experts(**{**inputs, **weights(inputs["x"].dtype)}, **resolved)
    assert_accurate("y", y, truth, yardstick)
    return y


# --- the formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_error_and_size_of_a_format(format: str) -> None:
    weight = torch.randn(3, 256, 64)
    packed = quantize_experts(weight, format)
    assert 0.5 * ERRORS[format] < frobenius_error(packed.dequantize(), weight) < ERRORS[format]
    size = 1 + 4 / 256 if format in ("int8", "fp8") else 0.5625
    assert packed.nbytes == size * weight.numel()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inner", [1, 31, 33, 96])
@pytest.mark.parametrize("columns", [1, 16, 19])
def test_sizes_and_layouts(format: str, inner: int, columns: int) -> None:
    """A weight's neighbours beyond its column, or its group, have no part in its code."""
    weight = torch.randn(2, inner, columns, dtype=torch.float64)
    packed = quantize_experts(weight, format)
    values = packed.dequantize(torch.float64)
    assert values.shape == weight.shape
    assert frobenius_error(values, weight) < 2 * ERRORS[format]
    stored = quantize_experts(weight.mT.contiguous().mT, format)
    assert torch.equal(packed.codes, stored.codes)
    assert torch.equal(packed.scales, stored.scales)
    size = 32 if format in ("int4", "mxfp4") else inner
    for begin in range(0, inner, size):
        for column in (0, columns - 1):
            part = weight[:1, begin : begin + size, column : column + 1]
            alone = quantize_experts(part, format).dequantize(torch.float64)
            assert torch.equal(values[:1, begin : begin + size, column : column + 1], alone)
    again = quantize_experts(values, format).dequantize(torch.float64)
    torch.testing.assert_close(again, values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_where_a_code_lies(format: str) -> None:
    """As the docstring of moe_kernels.reference.quantized_experts says."""
    for k, n in ((0, 0), (37, 5), (61, 18)):
        weight = torch.zeros(1, 64, 20)
        zeros = quantize_experts(weight, format).codes
        weight[0, k, n] = 1.0
        (place,) = (quantize_experts(weight, format).codes != zeros).nonzero().tolist()
        in_group = k % 32
        high = format in ("int4", "mxfp4") and in_group % 8 >= 4
        steps = 8 if format in ("int4", "mxfp4") else 4
        assert place == [0, n // 16, k // 32, in_group // steps, n % 16, k % 4]
        byte = int(quantize_experts(weight, format).codes[tuple(place)])
        empty = int(zeros[tuple(place)])
        if format in ("int4", "mxfp4"):
            assert (byte & 15 == empty & 15) == high


def test_codes_are_the_nearest() -> None:
    weight = torch.randn(2, 64, 16, dtype=torch.float64)
    weight[:, 3:5] *= 5e-5  # subnormal in e4m3
    int8 = quantize_experts(weight, "int8")
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert ((int8.dequantize(torch.float64) - weight).abs() <= 0.5001 * scale).all()

    fp8 = quantize_experts(weight, "fp8")
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).double()
    expected = (weight / scale).float().to(torch.float8_e4m3fn).double()
    small = (weight / scale).abs() < 2**-6
    found = fp8.dequantize(torch.float64) / scale
    torch.testing.assert_close(found[~small], expected[~small], rtol=1e-6, atol=0)
    assert (found[small].abs() * 2**6).round(decimals=4).unique().tolist() == [0, 1]
    assert ((found - weight / scale)[small].abs() <= 2**-7).all()

    mxfp4 = quantize_experts(weight, "mxfp4").dequantize(torch.float64)
    grouped = weight.view(2, 2, 32, 16)
    scale = torch.exp2(torch.floor(torch.log2(grouped.abs().amax(2, keepdim=True))) - 2)
    line = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    line = torch.cat([-line, line])
    nearest = ((grouped / scale)[..., None] - line).abs().amin(-1)
    torch.testing.assert_close(((mxfp4.view_as(grouped) - grouped) / scale).abs(), nearest)

    int4 = quantize_experts(weight, "int4")
    assert frobenius_error(int4.dequantize(), weight) < ERRORS["int4"]
    integers = int4.dequantize(torch.float64).view_as(grouped) / int4.scales.double().permute(
        0, 2, 1, 3
    ).reshape(2, 2, 1, 16)
    assert torch.equal(integers, integers.round())
    assert integers.aminmax() == (-8, 7)


def test_ties_of_mxfp4_go_to_even() -> None:
    values = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0]
    packed = quantize_experts(torch.tensor(values)[None, :, None], "mxfp4")
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -4.0]
    assert packed.dequantize().flatten().tolist() == expected


def test_mxfp4_of_a_checkpoint() -> None:
    blocks = torch.randint(0, 256, (2, 19, 3, 16), dtype=torch.uint8)
    scales = torch.randint(0, 255, (2, 19, 3), dtype=torch.uint8)
    scales[0, :2, 0] = torch.tensor([0, 254])
    packed = moe_kernels.experts_from_mxfp4(blocks, scales)
    assert packed.shape == (2, 96, 19)
    line = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    line = torch.cat([line, -line])
    values = torch.stack([line[(blocks & 15).long()], line[(blocks >> 4).long()]], -1).flatten(3)
    expected = (values * torch.exp2(scales.double() - 127)[..., None]).flatten(2).mT
    assert torch.equal(packed.dequantize(torch.float64), expected)
    wider = torch.zeros(2, 19, 3, 32, dtype=torch.uint8)
    wider[..., ::2] = blocks
    for stored in ((blocks, scales), (wider[..., ::2], scales.mT.contiguous().mT)):
        found = moe_kernels.experts_from_mxfp4(*stored)
        codes, powers = experts_from_mxfp4(*stored)
        assert torch.equal(found.codes, codes)
        assert torch.equal(found.scales.view(torch.int16), powers.view(torch.int16))
    middle = moe_kernels.experts_from_mxfp4(blocks, scales // 8 + 112)
    again = quantize_experts(middle.dequantize(), "mxfp4")
    assert torch.equal(again.dequantize(), middle.dequantize())
    for changes, message in (
        ((blocks[..., :8], scales), r"blocks must be \[E, N, G, 16\]"),
        ((blocks, scales[:, :1]), r"scales must be \[2, 19, 3\]"),
        ((blocks, torch.full_like(scales, 255)), "got 255, which is NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_kernels.experts_from_mxfp4(*changes)
    with pytest.raises(TypeError, match=r"scales must be a tensor \[E, N, G\]; got list"):
        moe_kernels.experts_from_mxfp4(blocks, scales.tolist())
    with pytest.raises(ValueError, match="scales must be on blocks's device cpu; got meta"):
        moe_kernels.experts_from_mxfp4(blocks, scales.to("meta"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_weights(format: str, size: float) -> None:
    weight = size * torch.randn(1, 40, 3)
    values = quantize_experts(weight, format).dequantize()
    assert values.isfinite().all()
    assert (values - weight).norm() <= 2 * ERRORS[format] * weight.norm()


def test_quantize_refuses_what_does_not_fit() -> None:
    weight = torch.randn(2, 8, 4)
    with pytest.raises(ValueError, match="format must be one of int8, fp8, int4, mxfp4; got 'q4'"):
        quantize_experts(weight, "q4")
    with pytest.raises(ValueError, match=r"weight must be \[E, Kd, N\]; got \[8, 4\]"):
        quantize_experts(weight[0])
    with pytest.raises(ValueError, match="must not be empty"):
        quantize_experts(weight[:, :0])
    with pytest.raises(TypeError, match="weight must be one of bfloat16"):
        quantize_experts(weight.int())
    weight[1, 3, 2] = torch.inf
    with pytest.raises(ValueError, match="weight must be finite in float32; expert 1"):
        quantize_experts(weight)
    with pytest.raises(ValueError, match="weight must be finite in float32; expert 0"):
        quantize_experts(torch.full((1, 8, 4), 1e39, dtype=torch.float64))


# --- the op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("routing", SHAPES)
def test_routings(device: torch.device, routing: str, format: str, dtype: torch.dtype) -> None:
    inputs, _ = make_case(routing, dtype, bias=routing in ("plain", "dropped"))
    check(inputs, format, device=device)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_activations(device: torch.device, interleaved: bool, activation: str, format: str) -> None:
    if interleaved and not is_gated(activation):
        return  # refused, as by fused_experts
    inputs, _ = make_case("dropped", torch.bfloat16, activation=activation, bias=True)
    options: dict[str, Any] = {"activation": activation, "interleaved": interleaved}
    if activation in ("swiglu", "swigluoai"):
        options["limit"] = limit_between(inputs)
    check(inputs, format, device=device, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [1, 33, 72])
@pytest.mark.parametrize("inner", [1, 17, 64, 160])
@pytest.mark.parametrize("interleaved", [False, True])
def test_sizes_without_alignment(
    device: torch.device, interleaved: bool, inner: int, hidden: int, dtype: torch.dtype
) -> None:
    inputs, _ = make_case("plain", dtype, hidden=hidden, inner=inner, bias=True)
    check(inputs, "int4", "int8", device=device, interleaved=interleaved)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [20, 300])
def test_one_expert_with_everything(
    device: torch.device, tokens: int, format: str, dtype: torch.dtype
) -> None:
    """More rows an expert than a tile and than a block of rows has; float64 writes codes out."""
    inputs, _ = make_case("plain", dtype, hidden=70, inner=45, bias=True)
    inputs["x"] = torch.randn(tokens, 70).to(dtype)
    inputs["topk_ids"] = torch.full((tokens, 1), 2)
    inputs["topk_weights"] = torch.rand(tokens, 1)
    if dtype != torch.float64:
        check(inputs, format, device=device)
        return
    case = quantized(inputs, format, format)
    y = moe_kernels.fused_experts_quantized(**{k: v.to(device) for k, v in case.items()})
    weights = {name: case[name].dequantize(dtype) for name in ("gate_up", "down")}
    truth = reference.fused_experts(**{**inputs, **weights})
    torch.testing.assert_close(y.cpu(), truth, rtol=1e-11, atol=1e-11)


def test_very_many_tokens_are_worked_on_in_parts(device: torch.device) -> None:
    inputs, _ = make_case("plain", torch.bfloat16, hidden=8, inner=4, bias=True)
    inputs["x"] = torch.randn(33_000, 8).bfloat16()
    inputs["topk_ids"] = torch.randint(-1, 8, (33_000, 1))
    inputs["topk_weights"] = torch.rand(33_000, 1)
    check(inputs, "int4", device=device)


@pytest.mark.parametrize("gate_up", FORMATS)
@pytest.mark.parametrize("down", FORMATS)
def test_two_formats(device: torch.device, gate_up: str, down: str) -> None:
    inputs, _ = make_case("plain", torch.bfloat16)
    check(inputs, gate_up, down, device=device)


@pytest.mark.parametrize("format", FORMATS)
def test_strided_inputs(device: torch.device, format: str) -> None:
    inputs, _ = make_case("plain", torch.bfloat16, bias=True)
    expected = check(inputs, format, device=device)
    case = {k: v.to(device) for k, v in quantized(inputs, format, format).items()}
    for name in ("x", "topk_weights", "gate_up_bias", "down_bias"):
        case[name] = case[name].t().contiguous().t()
    case["topk_ids"] = case["topk_ids"].long().repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(moe_kernels.fused_experts_quantized(**case), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_magnitudes_of_rows(format: str, dtype: torch.dtype) -> None:
    """Groups of a row, and rows, that differ by orders of magnitude; zeros among them."""
    inputs, _ = make_case("plain", dtype, hidden=128)
    scales = torch.tensor([1e-3, 30.0, 0.0, 1.0]).repeat_interleave(32)
    rows = torch.logspace(-2, 1, len(inputs["x"]))[:, None]
    inputs["x"] = (inputs["x"].float() * scales * rows).to(dtype)
    check(inputs, format)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [3, 90])
def test_values_that_are_not_finite_stay_so(tokens: int, format: str, value: float) -> None:
    inputs, _ = make_case("plain", torch.bfloat16)
    inputs["x"] = torch.randn(tokens, 40).bfloat16()
    inputs["topk_ids"] = torch.randint(0, 2, (tokens, 2))
    inputs["topk_weights"] = torch.rand(tokens, 2)
    case = quantized(inputs, format, format)
    expected = moe_kernels.fused_experts_quantized(**case)
    case["x"] = inputs["x"].clone()
    case["x"][1, 5] = value
    y = moe_kernels.fused_experts_quantized(**case)
    assert not y[1].isfinite().any()
    others = [i for i in range(tokens) if i != 1]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [40, 208, 330])
def test_few_tokens_read_matrices_in_other_ways_and_give_the_same_bits(
    columns: int, format: str, dtype: torch.dtype
) -> None:
    """One or two rows meet several tiles at once, where there are as many."""
    inputs, _ = make_case("plain", dtype, hidden=columns, inner=columns - 4, bias=True)
    inputs["topk_ids"] = torch.full((9, 1), 1)
    inputs["topk_weights"] = torch.rand(9, 1)
    inputs["x"] = torch.randn(9, columns).to(dtype)
    together = check(inputs, format)
    case = quantized(inputs, format, format)
    for tokens in (slice(0, 1), slice(3, 5), slice(5, 8)):
        few = {**case, **{n: case[n][tokens] for n in ("x", "topk_ids", "topk_weights")}}
        assert torch.equal(moe_kernels.fused_experts_quantized(**few), together[tokens])


def test_same_bits_every_time() -> None:
    inputs, _ = make_case("plain", torch.bfloat16, hidden=200, inner=300)
    case = quantized(inputs, "int4", "int4")
    first = moe_kernels.fused_experts_quantized(**case)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(moe_kernels.fused_experts_quantized(**case), first)
    finally:
        torch.set_num_threads(threads)


# --- contract -----------------------------------------------------------------------------------


def _args(format: str, device: torch.device) -> tuple[Any, ...]:
    inputs, _ = make_case("dropped", torch.bfloat16, bias=True)
    case = {k: v.to(device) for k, v in quantized(inputs, format, format).items()}
    gate_up, down = case["gate_up"], case["down"]
    return (
        case["x"],
        gate_up.codes,
        gate_up.scales,
        down.codes,
        down.scales,
        case["topk_ids"],
        case["topk_weights"],
        case["gate_up_bias"],
        case["down_bias"],
        format,
        format,
        24,
        "swiglu",
        True,
        1.702,
        2.0,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(device: torch.device, format: str) -> None:
    op = torch.ops.moe_kernels.fused_experts_quantized.default
    torch.library.opcheck(op, _args(format, device))


@pytest.mark.parametrize("format", FORMATS)
def test_the_definition_behind_the_op(format: str) -> None:
    """What answers on devices without a kernel."""
    args = _args(format, torch.device("cpu"))
    expected = moe_kernels.reference.fused_experts_quantized(*args)
    y = torch.ops.moe_kernels.fused_experts_quantized(*args)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    of_no_expert = [*args[:5], args[5] + 4, *args[6:]]
    with pytest.raises(IndexError, match=r"fused_experts_quantized: topk_ids must be in \[-1, 6\]"):
        moe_kernels.reference.fused_experts_quantized(*of_no_expert)


def test_refuses_codes_that_do_not_fit_in_the_kernel() -> None:
    args = list(_args("int4", torch.device("cpu")))
    op = torch.ops.moe_kernels.fused_experts_quantized
    for index, value, message in (
        (1, args[1][:, 1:], r"gate_up must be uint8 \[6, 3, 2, 4, 16, 4\]; got"),
        (4, args[4].float(), "down_scales must be BFloat16"),
        (9, "int8", r"gate_up must be uint8 \[6, 3, 2, 8, 16, 4\]"),
        (10, "q8", 'format must be one of int8, fp8, int4, mxfp4; got "q8"'),
        (11, 40, "gate_up must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*args[:index], value, *args[index + 1 :])


def test_compiles_whole(device: torch.device) -> None:
    inputs, _ = make_case("plain", torch.bfloat16, bias=True)
    case = {k: v.to(device) for k, v in quantized(inputs, "int4", "mxfp4").items()}
    gate_up, down = case.pop("gate_up"), case.pop("down")

    def layer(**kwargs: Tensor) -> Tensor:
        return moe_kernels.fused_experts_quantized(gate_up=gate_up, down=down, **kwargs) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (37, 11, 2):
            part = {
                k: v[:tokens] if k in ("x", "topk_ids", "topk_weights") else v
                for k, v in case.items()
            }
            torch.testing.assert_close(compiled(**part), layer(**part), rtol=0, atol=0)


def test_backward_is_refused(device: torch.device) -> None:
    inputs, _ = make_case("plain", torch.float32, bias=True)
    case = {k: v.to(device) for k, v in quantized(inputs, "int8", "int8").items()}
    case["x"].requires_grad_()
    y = moe_kernels.fused_experts_quantized(**case)
    with pytest.raises(RuntimeError, match=r"no backward; .*inference_mode\(\).*dequantize"):
        y.sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(moe_kernels.fused_experts_quantized(**case), y)


def test_flops_are_counted(device: torch.device) -> None:
    inputs, _ = make_case("plain", torch.float32)
    case = {k: v.to(device) for k, v in quantized(inputs, "int8", "int8").items()}
    with FlopCounterMode(display=False) as counter:
        moe_kernels.fused_experts_quantized(**case)
    assert counter.get_total_flops() == 6 * 37 * 3 * 40 * 24


def test_meta_and_autocast(device: torch.device) -> None:
    inputs, _ = make_case("plain", torch.float32, bias=True)
    case = {k: v.to(device) for k, v in quantized(inputs, "int4", "int4").items()}
    meta = {k: v.to("meta") for k, v in case.items()}
    y = moe_kernels.fused_experts_quantized(**meta)
    assert y.is_meta
    assert y.shape == inputs["x"].shape
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert moe_kernels.fused_experts_quantized(**case).dtype == torch.bfloat16


def test_refuses_what_does_not_fit() -> None:
    inputs, _ = make_case("plain", torch.float32, bias=True)
    case = quantized(inputs, "int4", "int4")

    def wrong(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            moe_kernels.fused_experts_quantized(**{**case, **changes})

    x, down = case["x"], case["down"]
    wrong(
        TypeError, r"gate_up must be QuantizedExperts \[E, H, 2\*I\].*", gate_up=inputs["gate_up"]
    )
    wrong(ValueError, r"gate_up must be \[E, H, 2\*I\] with H = 39", x=x[:, 1:])
    wrong(ValueError, r"down must be \[E, I, H\] = \[8, 24, 40\]", down=case["gate_up"])
    wrong(ValueError, r"down must be .* \[8, 48, 40\]", activation="silu")
    wrong(TypeError, "down_bias must have x's dtype", down_bias=inputs["down_bias"].double())
    wrong(ValueError, r"gate_up_bias must be \[8, 48\]", gate_up_bias=inputs["down_bias"])
    wrong(IndexError, "fused_experts_quantized", topk_ids=inputs["topk_ids"] + 8)
    wrong(ValueError, "topk_weights must be", topk_weights=inputs["topk_weights"][:, :1])
    other = QuantizedExperts(down.codes[1:], down.scales, "int4", down.shape)
    wrong(
        ValueError,
        r"down.codes must be \[8, 3, 1, 4, 16, 4\] for int4 of \[8, 24, 40\]",
        down=other,
    )
    other = QuantizedExperts(down.codes, down.scales.to("meta"), "int4", down.shape)
    wrong(ValueError, "down.scales must be on down.codes's device cpu; got meta", down=other)
    with pytest.raises(TypeError, match=r"gate_up must be a tensor .*; got QuantizedExperts"):
        moe_kernels.fused_experts(**{**inputs, "gate_up": case["gate_up"]})
