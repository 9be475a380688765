"""What the Triton kernels of float8 promise beyond their ops: any device, any tile, any offsets."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import moe_kernels
from moe_kernels import reference
from moe_kernels.triton import _fp8, permute, quantize, scaled_grouped_gemm
from moe_kernels.triton._configs import CONFIGS, Config
from tests.conftest import HAS_GPU, TRITON, Implementation, poisoned_memory, triton_alone
from tests.kernels.accuracy import float8_limit, frobenius_error
from tests.kernels.test_quantize import assert_same

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(params=TRITON)
def impl() -> Iterator[Implementation]:
    with poisoned_memory():
        yield from triton_alone()


@pytest.fixture
def without_float8(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take bytes and compute the format themselves, as before sm_89."""
    for module in (_fp8, quantize, scaled_grouped_gemm):
        monkeypatch.setattr(module, "has_float8", lambda device: False)
    assert permute.raw(torch.empty(1, dtype=FLOAT8)).dtype == torch.uint8


def _numbers() -> Tensor:
    """Every number of the format, the middle of each two, and what is next to that."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [middle, middle.nextafter(numbers[1:]), middle.nextafter(numbers[:-1])]
    x = torch.cat([numbers, *near])
    return torch.cat([x, -x])


@triton.jit
def _scales_kernel(largest, scales, reciprocals, EXACT: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    scale, reciprocal = quantize.block_scales(tl.load(largest + i), False, EXACT)
    tl.store(scales + i, scale)
    tl.store(reciprocals + i, reciprocal)


def test_scales_of_quotients_that_take_no_call_are_nearly_the_exact_ones(
    impl: Implementation,
) -> None:
    odd = [0.0, torch.inf, torch.nan, 1e-45, 1e-38, 2**-126 * 448, 3.4e38, 448.0]
    magnitudes = torch.cat([torch.tensor(odd), torch.logspace(-44, 38, 120)])
    bits = magnitudes.view(torch.int32).to(impl.device)
    found = [torch.full((2, 128), torch.nan, device=impl.device) for _ in range(2)]
    for exact, out in zip((True, False), found, strict=True):
        _scales_kernel[(1,)](bits, out[0], out[1], EXACT=exact, COUNT=128)
    right, close = (out.cpu() for out in found)
    torch.testing.assert_close(close, right, rtol=5e-7, atol=0.0, equal_nan=True)
    assert (close[:, 0] == 0).all()
    assert close[:, 1:3].isnan().all()
    assert close[0, 3] == 2**-126


@pytest.mark.usefixtures("without_float8")
def test_bytes_are_rounded_as_the_format_is(impl: Implementation) -> None:
    x = _numbers().view(-1, 1).repeat(1, 2)
    x[:, 0] = 448  # so that the scale is 1
    x[0, 1] = torch.nan
    values, _ = moe_kernels.quantize_rows(x.to(impl.device))
    x[0, 0] = torch.nan
    assert_same(values, x.to(FLOAT8))
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8).view(8, 32)
    scales = torch.ones(8, 1)
    back = moe_kernels.dequantize_rows(
        codes.to(impl.device), scales.to(impl.device), dtype=torch.float32, block=32
    )
    assert_same(back, codes.float())


@pytest.mark.usefixtures("without_float8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_equal_the_definition(impl: Implementation, dtype: torch.dtype) -> None:
    x = (torch.randn(37, 300) * torch.logspace(-6, 4, 37)[:, None]).to(dtype)
    x[3], x[5, 7], x[6, 8] = 0, torch.inf, torch.nan
    for options in ({}, {"power_of_two": True}, {"block": 32}):
        expected = reference.quantize_rows(x, **options)
        found = moe_kernels.quantize_rows(x.to(impl.device), **options)
        for actual, right in zip(found, expected, strict=True):
            assert_same(actual, right)
    w = torch.randn(2, 130, 65).to(dtype)
    for transposed in (True, False):
        for actual, right in zip(
            moe_kernels.quantize_weights(w.to(impl.device), transposed=transposed),
            reference.quantize_weights(w, transposed=transposed),
            strict=True,
        ):
            assert_same(actual, right)
    ids = torch.rand(37, 6).topk(2).indices
    ids[ids == 2] = -1
    order = moe_kernels.sort_by_expert(ids.to(impl.device), 6)
    rows = moe_kernels.permute_quantize(x.to(impl.device), order, num_rows=80)
    values, scales = reference.quantize_rows(x)
    copied = moe_kernels.permute(
        values.to(impl.device), order, num_rows=80, scales=scales.to(impl.device)
    )
    assert_same(copied[0], rows[0])
    torch.testing.assert_close(copied[1], rows[1], rtol=0, atol=0, equal_nan=True)


def _operands(inner: int = 392, columns: int = 264) -> tuple[tuple[Tensor, ...], Tensor]:
    """One expert has more rows than any tile, one has none, and some rows have no expert."""
    a = torch.randn(190, inner) * torch.logspace(-2, 2, 190)[:, None]
    b = torch.randn(4, inner, columns)
    offsets = torch.tensor([0, 150, 150, 151, 180], dtype=torch.int32)
    values, scales = reference.quantize_rows(a)
    weights, weight_scales = reference.quantize_weights(b)
    operands = (values, weights, scales, weight_scales)
    return operands, reference.scaled_grouped_gemm(*operands, offsets, None, torch.float64)


def _multiply(impl: Implementation, operands: tuple[Tensor, ...]) -> Tensor:
    offsets = torch.tensor([0, 150, 150, 151, 180], dtype=torch.int32)
    moved = (value.to(impl.device) for value in (*operands, offsets))
    return moe_kernels.scaled_grouped_gemm(*moved, out_dtype=torch.float32)


def _configurations() -> list[Any]:
    return [
        pytest.param(key, id=f"{key[0]}-{key[2]}", marks=[] if key[0] == 90 else pytest.mark.slow)
        for key in CONFIGS["scaled_grouped_gemm"]
    ]


@pytest.mark.parametrize("key", _configurations())
def test_every_configuration(
    impl: Implementation, key: tuple[int, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if HAS_GPU and key[0] > 10 * torch.cuda.get_device_capability()[0]:
        pytest.skip(f"the device cannot run what is meant for sm_{key[0]}")
    cut = CONFIGS["scaled_grouped_gemm"][key]
    monkeypatch.setattr(scaled_grouped_gemm, "config", lambda *_, **__: cut)
    if key[0] == 80:
        for module in (_fp8, scaled_grouped_gemm):
            monkeypatch.setattr(module, "has_float8", lambda device: False)
    operands, truth = _operands(*((391, 265) if key[2] == "unaligned" else ()))
    out = _multiply(impl, operands)
    assert frobenius_error(out, truth) < float8_limit(impl.device)


@pytest.mark.skipif(HAS_GPU, reason="there the kernel in Gluon is run")
def test_where_there_is_no_gluon_its_tiles_are_halved(
    impl: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bits as those of 128 columns, of a product and of a layer."""
    wide = Config(128, 256, 128, warps=8, stages=6, warp_specialize="gluon")
    operands, _ = _operands()
    weights = [torch.randn(3, columns, 144).bfloat16().mT for columns in (2 * 144, 144)]
    ids, topk_weights = torch.randint(0, 3, (40, 2)), torch.rand(40, 2)
    parts = torch.randn(40, 144).bfloat16(), *weights, ids, topk_weights
    layer = [value.to(impl.device) for value in parts]
    results = []
    for cut in (wide, scaled_grouped_gemm.without_roles(wide)):
        monkeypatch.setattr(scaled_grouped_gemm, "config", lambda *_, cut=cut, **__: cut)
        y = moe_kernels.fused_experts(*layer, precision="fp8_block")
        results.append((_multiply(impl, operands), y))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("offsets", [[0, 9, 4, 40], [-3, 2, 99, 7], [30, 20, 10, 0], [0, 5, 8, 99]])
def test_offsets_that_do_not_fit_stay_in_bounds(
    impl: Implementation, offsets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = torch.tensor(offsets, dtype=torch.int32, device=impl.device)
    a = torch.randn(23, 40, device=impl.device)
    b = torch.randn(3, 40, 16, device=impl.device)
    moe_kernels.fp8_grouped_gemm(a, b, bad)
    monkeypatch.setenv("MOE_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="offsets must rise from 0"):
        moe_kernels.fp8_grouped_gemm(a, b, bad)


def test_float64_is_refused(impl: Implementation) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=impl.device)
    offsets = torch.tensor([0, 3], dtype=torch.int32, device=impl.device)
    order = moe_kernels.sort_by_expert(torch.zeros(3, 1, dtype=torch.int32).to(impl.device), 1)
    operands, _ = _operands()
    for name, call in {
        "quantize_rows: x": lambda: moe_kernels.quantize_rows(x),
        "permute_quantize: x": lambda: moe_kernels.permute_quantize(x, order),
        "quantize_weights: w": lambda: moe_kernels.quantize_weights(x[None]),
        "fp8_grouped_gemm: a": lambda: moe_kernels.fp8_grouped_gemm(x, x.mT[None], offsets),
        "scaled_grouped_gemm: out_dtype": lambda: moe_kernels.scaled_grouped_gemm(
            *(value.to(impl.device) for value in operands),
            torch.zeros(5, dtype=torch.int32, device=impl.device),
            out_dtype=torch.float64,
        ),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be .* got float64"):
            call()
