"""The C++ kernels of every instruction set this processor has: each is compiled from other code.

Everywhere else tests run on the widest one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels import _C, reference
from moe_kernels.reference import quantized_experts
from moe_kernels.reference.quantized_experts import FORMATS
from tests.conftest import Implementation
from tests.kernels.accuracy import assert_accurate, gradients
from tests.kernels.test_fused_experts import check, limit_between, make_case
from tests.kernels.test_fused_experts_quantized import check as check_quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPU = Implementation("cpu", torch.device("cpu"))


@pytest.fixture(params=_C.cpu_capabilities(), autouse=True)
def _capability(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield
    _C.set_cpu_capability(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_fused_experts(transposed: bool, dtype: torch.dtype) -> None:
    """Numbers of rows, of columns and of summands that fill no vector; one row and very many."""
    hidden, inner, counts = 83, 131, (1, 75, 0, 7, 230, 3)
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    inputs = {
        "x": torch.randn(len(ids) // 2, hidden),
        "gate_up": torch.randn(6, hidden, 2 * inner) / hidden**0.5,
        "down": torch.randn(6, inner, hidden) / inner**0.5,
        "gate_up_bias": torch.randn(6, 2 * inner),
        "down_bias": torch.randn(6, hidden),
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    inputs["topk_ids"] = ids[torch.randperm(len(ids))].view(-1, 2)
    inputs["topk_weights"] = torch.rand(inputs["topk_ids"].shape)

    def layouts(name: str, value: Tensor) -> Tensor:
        if transposed and name in ("gate_up", "down"):
            return value.mT.contiguous().mT
        return value

    upstream = torch.randn(inputs["x"].shape).to(dtype)
    options: dict[str, Any] = {"interleaved": transposed}
    if dtype == torch.float64:
        _compare_in_float64(inputs, upstream, layouts, **options)
        return
    if dtype == torch.float32:  # 16-bit roundings of so many values would meet any limit
        options["limit"] = limit_between(inputs)
    check(CPU, inputs, upstream, layouts=layouts, **options)


def _compare_in_float64(
    inputs: dict[str, Tensor],
    upstream: Tensor,
    layouts: Callable[[str, Tensor], Tensor],
    **options: Any,
) -> None:
    """The definition is no closer to the truth than we are."""

    def ours(**kwargs: Tensor) -> Tensor:
        viewed = {name: layouts(name, value) for name, value in kwargs.items()}
        return moe_kernels.fused_experts(**viewed, **options)

    actual = gradients(ours, inputs, upstream)
    truth = gradients(lambda **kw: reference.fused_experts(**kw, **options), inputs, upstream)
    for name, value in truth.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_fused_experts_quantized(tokens: int, format: str, dtype: torch.dtype) -> None:
    """One row to many more than a tile of them, and sizes that fill no vector, tile or group."""
    hidden, inner = 323, 131
    inputs = {
        "x": torch.randn(tokens, hidden),
        "gate_up": torch.randn(3, hidden, 2 * inner) / hidden**0.5,
        "down": torch.randn(3, inner, hidden) / inner**0.5,
        "gate_up_bias": torch.randn(3, 2 * inner),
        "down_bias": torch.randn(3, hidden),
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    inputs["topk_ids"] = torch.randint(-1, 3, (tokens, 2))
    inputs["topk_weights"] = torch.rand(tokens, 2)
    check_quantized(inputs, format, interleaved=tokens == 7)


@pytest.mark.parametrize("code", [0x00, 0xFF, 0x77])
@pytest.mark.parametrize("format", FORMATS)
def test_largest_products_of_integers(format: str, code: int) -> None:
    """Codes and a row's planes of integers at the ends of their ranges, all of a group alike."""
    hidden, inner = 64, 32
    quantized = {
        "gate_up": moe_kernels.quantize_experts(torch.randn(1, hidden, inner), format),
        "down": moe_kernels.quantize_experts(torch.eye(inner, hidden)[None], "int8"),
    }
    if format == "fp8" and code == 0xFF:
        code = 0x7E  # the others are no numbers
    quantized["gate_up"].codes.fill_(code)
    quantized["gate_up"].scales.fill_(1.0)
    for dtype, largest in ((torch.bfloat16, 127 * 256), (torch.float32, 127 * 65536)):
        # of planes of 8 bits the lowest, or the one above it, is -128 (float32 has three planes)
        row = torch.tensor([128.0, 128 * 256.0, -128.0, -128 * 256.0])[:, None]
        x = row.clamp(-largest, largest).expand(4, hidden).clone()
        x[:, ::32] = largest
        inputs = {
            "x": x.to(dtype),
            "topk_ids": torch.zeros(4, 1, dtype=torch.int64),
            "topk_weights": torch.ones(4, 1),
        }
        y = moe_kernels.fused_experts_quantized(**inputs, **quantized, activation="relu2")
        weights = {name: value.dequantize(torch.float64) for name, value in quantized.items()}
        wide = {**inputs, "x": inputs["x"].double(), **weights}
        truth = reference.fused_experts(**wide, activation="relu2", alpha=1.0, limit=math.inf)
        torch.testing.assert_close(y, truth.to(dtype), atol=0.0, rtol=torch.finfo(dtype).eps * 8)


def _weights_to_round(dtype: torch.dtype) -> Tensor:
    """Ordinary columns, and whatever makes a scale or a rounding special."""
    weight = torch.randn(2, 99, 67, dtype=torch.float64)
    weight[:, :, 1] = 0
    weight[:, :, 2] = -0.0
    weight[:, :, 3] = (weight[:, :, 3] * 4).round() / 4  # ties
    weight[:, ::2, 4] = -weight[:, 1::2, 4].abs().amax()  # two of the largest magnitude
    weight[:, 1::2, 4] = weight[:, 1::2, 4].abs().amax()
    for column, size in enumerate((1e-45, 1e-40, 3e-38, 1e-36, 1e-20, 1e20, 5e37), 5):
        weight[:, :, column] *= size
    weight[:, :, 12] *= 2.0 ** torch.randint(-30, 30, (2, 99))
    weight[0, 40, 13] = torch.finfo(dtype).max if dtype != torch.float64 else 3e38
    weight[0, 41, 14] = 2.0**-6 / 448 * weight[0, :, 14].abs().amax()
    weight[:, :, 15] = torch.randint(-8, 8, (2, 99))
    return weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantising_is_the_definition_bit_for_bit(format: str, dtype: torch.dtype) -> None:
    weight = _weights_to_round(dtype)
    codes, scales = quantized_experts.quantize_experts(weight, format)
    padded = torch.full((3, 200, 140), torch.nan, dtype=dtype)
    layouts = [
        weight,
        weight.mT.contiguous().mT,
        padded[:2, 2:200:2, 1:68],
        padded[1:, :99, 5:139:2],
    ]
    for layout in layouts:
        found = moe_kernels.quantize_experts(layout.copy_(weight), format)
        assert torch.equal(found.codes, codes)
        bits = torch.int32 if scales.dtype == torch.float32 else torch.int16
        assert torch.equal(found.scales.view(bits), scales.view(bits))
    one = moe_kernels.quantize_experts(weight[:1].expand(3, -1, -1), format)
    assert torch.equal(one.codes, codes[:1].expand_as(one.codes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantising_finds_what_is_not_finite(format: str, dtype: torch.dtype) -> None:
    values = [torch.inf, -torch.inf, torch.nan] + [1e39] * (dtype == torch.float64)
    for value in values:
        for expert, k, column in ((2, 0, 0), (1, 33, 17), (0, 98, 66)):
            weight = torch.randn(3, 99, 67).to(dtype)
            weight[expert, k, column] = weight[2, 50, 30] = value
            for stored in (weight, weight.mT.contiguous().mT):
                with pytest.raises(
                    ValueError, match=f"must be finite in float32; expert {expert} is not"
                ):
                    moe_kernels.quantize_experts(stored, format)


def test_quantised_sums_are_the_same_on_all() -> None:
    """Integers, summed exactly, but for the order of the last few floating operations."""
    inputs, _ = make_case("plain", torch.float32, hidden=256, inner=64)
    packed = {n: moe_kernels.quantize_experts(inputs.pop(n), "int4") for n in ("gate_up", "down")}
    ours = moe_kernels.fused_experts_quantized(**inputs, **packed, activation="reglu")
    best = _C.cpu_capability()
    _C.set_cpu_capability(_C.cpu_capabilities()[0])
    first = moe_kernels.fused_experts_quantized(**inputs, **packed, activation="reglu")
    _C.set_cpu_capability(best)
    torch.testing.assert_close(ours, first, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [0, 1, 3, 9, 1500])
def test_numbers_of_summands(inner: int, dtype: torch.dtype) -> None:
    """One column or few, few rows or many; nothing beyond a row may reach its sums."""
    counts = (1, 2, 30)
    offsets = torch.tensor([0, 1, 3, 33], dtype=torch.int32)
    other = torch.randn(35, 8).to(dtype)
    moe_kernels.grouped_gemm(
        other, torch.randn(3, 8, 5).to(dtype), offsets
    )  # leaves its sums about
    a = torch.randn(35, inner).to(dtype)
    a[33:] = torch.nan  # rows of no expert
    b = torch.randn(3, inner, 1).to(dtype)
    for matrix in (b, b.expand(3, inner, 4), torch.randn(3, 5, inner).to(dtype).mT):
        truth = reference.grouped_gemm(a[:33].double(), matrix.double(), offsets)
        rows = a[:33].split(counts)
        chain = torch.cat([part @ one for part, one in zip(rows, matrix, strict=True)])
        out = moe_kernels.grouped_gemm(a, matrix, offsets)
        if dtype == torch.float64:
            torch.testing.assert_close(out[:33], truth, rtol=1e-11, atol=1e-11)
        else:
            assert_accurate("out", out[:33], truth, chain)
        assert (out[33:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [37, 48, 530])
def test_weight_gradients_of_many_rows(columns: int, dtype: torch.dtype) -> None:
    """More than are summed at a time: results in the dtype, in that of sums, and added to one."""
    offsets = torch.tensor([0, 600, 605], dtype=torch.int32)
    a, grad = torch.randn(605, 20).to(dtype), torch.randn(605, columns).to(dtype)
    truth, narrow = (
        torch.stack([a[:600].T.to(of) @ grad[:600].to(of), a[600:].T.to(of) @ grad[600:].to(of)])
        for of in (torch.float64, dtype)
    )
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.randn(truth.shape, dtype=sums)
    wgrad = moe_kernels.grouped_gemm_wgrad
    if dtype != torch.float64:
        assert_accurate("narrow", wgrad(a, grad, offsets), truth, narrow)
    wide = wgrad(a, grad, offsets, out_dtype=sums)
    torch.testing.assert_close(wide.double(), truth, rtol=1e-5, atol=1e-4)
    added = wgrad(a, grad, offsets, out=start.clone()) - start
    torch.testing.assert_close(added.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [37, 1100])
def test_a_few_rows(columns: int, dtype: torch.dtype) -> None:
    """As many as matrices are multiplied with as they lie, and one more."""
    counts = (8, 9, 24, 25, 0, 1, 2)
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    a = torch.randn(69, 37).to(dtype)
    b = torch.randn(7, 37, columns).to(dtype)
    truth = reference.grouped_gemm(a.double(), b.double(), offsets)
    narrow = torch.cat([rows @ one for rows, one in zip(a.split(counts), b, strict=True)])
    for matrix in (b, b.mT.contiguous().mT):
        out = moe_kernels.grouped_gemm(a, matrix, offsets)
        if dtype == torch.float64:
            torch.testing.assert_close(out, truth, rtol=1e-11, atol=1e-11)
        else:
            assert_accurate("out", out, truth, narrow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Whichever are read together: the columns alone have the same bits."""
    counts = (1, 2, 3, 7, 17)
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    a, b = torch.randn(30, 101).to(dtype), torch.randn(5, 301, 101).to(dtype).mT
    whole = moe_kernels.grouped_gemm(a, b, offsets)
    for part in (slice(0, 64), slice(64, 163), slice(163, 301)):
        assert torch.equal(moe_kernels.grouped_gemm(a, b[..., part], offsets), whole[:, part])


def _among_nan(value: Tensor) -> Tensor:
    """The same, in memory that is NaN before, after and between its rows."""
    *outer, rows, columns = value.shape
    padded = value.new_full((*outer, rows + 2, columns + 9), torch.nan)
    return padded[..., 1:-1, 3:-6].copy_(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inner", "columns"), [(37, 53), (64, 32), (1250, 18)])
def test_every_number_of_rows(inner: int, columns: int, dtype: torch.dtype) -> None:
    """Few, many, and whatever is left beside whole tiles: all three products, among NaN."""
    counts = [*range(0, 50, 1 if inner < 100 else 6), 97, 194]
    experts, rows = len(counts), sum(counts)
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    a = _among_nan(torch.randn(rows, inner).to(dtype))
    b = torch.randn(experts, inner, columns).to(dtype)
    truth = reference.grouped_gemm(a.double(), b.double(), offsets)
    parts = list(zip(a.split(counts), b, strict=True))
    narrow = torch.cat([one @ matrix for one, matrix in parts])
    for matrix in (_among_nan(b), _among_nan(b.mT).mT):
        assert_accurate("out", moe_kernels.grouped_gemm(a, matrix, offsets), truth, narrow)
    grad = _among_nan(torch.randn(rows, columns).to(dtype))
    pairs = list(zip(a.split(counts), grad.split(counts), strict=True))
    wide = torch.stack([one.double().T @ other.double() for one, other in pairs])
    chain = torch.stack([one.T @ other for one, other in pairs])
    for transposed in (False, True):
        found = torch.ops.moe_kernels.grouped_gemm_wgrad(a, grad, offsets, dtype, transposed)
        assert_accurate("wgrad", found, wide, chain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [3072, 3073])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_weight_gradients_larger_than_a_cache(
    transposed: bool, columns: int, dtype: torch.dtype
) -> None:
    """Written past it, zeros of experts without rows included, where vectors are aligned or not."""
    sizes = 1408 // dtype.itemsize, columns
    offsets = torch.tensor([0, 5, 5, 8, 48], dtype=torch.int32)
    a, grad = (torch.randn(48, n).to(dtype) for n in sizes)
    # freed, and full of what must not stay
    old = torch.ops.moe_kernels.grouped_gemm_wgrad(a + torch.nan, grad, offsets, dtype, transposed)
    assert old.nbytes > 16 * 2**20
    assert old[0].isnan().all()
    del old
    out = torch.ops.moe_kernels.grouped_gemm_wgrad(a, grad, offsets, dtype, transposed)
    assert (out.stride(1) == 1) == transposed
    # columns of it alone are in the cache
    for part in (slice(0, 64), slice(1000, 1011), slice(columns - 70, columns)):
        small = torch.ops.moe_kernels.grouped_gemm_wgrad(
            a, grad[:, part].contiguous(), offsets, dtype, transposed
        )
        assert torch.equal(out[:, :, part], small)
    assert (out[1] == 0).all()


def test_more_products_than_are_kept() -> None:
    """Columns of y are computed some at a time, and are what they are alone."""
    ids = torch.randint(-1, 3, (4200, 4))
    inputs = {
        "x": torch.randn(4200, 2049),
        "gate_up": torch.randn(3, 2049, 6) / 45,
        "down": torch.randn(3, 3, 2049),
        "topk_ids": ids,
        "topk_weights": torch.rand(4200, 4),
    }
    with torch.inference_mode():
        out = moe_kernels.fused_experts(**inputs)
        few = {**inputs, "x": inputs["x"][:99], "topk_ids": ids[:99]}
        few["topk_weights"] = inputs["topk_weights"][:99]
        torch.testing.assert_close(moe_kernels.fused_experts(**few), out[:99])
        few = {name: value[-99:] if len(value) == 4200 else value for name, value in inputs.items()}
        torch.testing.assert_close(moe_kernels.fused_experts(**few), out[-99:])
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 4, (21, 3))
    order = moe_kernels.sort_by_expert(ids, 4)
    inputs = {"rows": torch.randn(63, 37).to(dtype), "weights": torch.rand(21, 3)}
    upstream = torch.randn(21, 37).to(dtype)
    ours = gradients(
        lambda rows, weights: moe_kernels.unpermute(rows, order, weights), inputs, upstream
    )
    wide = {name: value.double() for name, value in inputs.items()}
    truth = gradients(
        lambda rows, weights: reference.unpermute(rows, *order, weights), wide, upstream
    )
    for name, value in truth.items():
        assert_accurate(name, ours[name], value, value.to(ours[name].dtype))


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_router(score_func: str) -> None:
    logits = torch.randn(7, 37)
    ours = gradients(
        lambda x: (
            moe_kernels.topk_router(x, 3, score_func=score_func, renormalize=True).topk_weights
        ),
        {"x": logits},
        torch.ones(7, 3).cumsum(1),
    )
    truth, yardstick = (
        gradients(
            lambda x: reference.topk_router(x, 3, score_func=score_func, renormalize=True)[0],
            {"x": logits.to(dtype)},
            torch.ones(7, 3).cumsum(1),
        )
        for dtype in (torch.float64, torch.float32)
    )
    for name, value in truth.items():
        assert_accurate(name, ours[name], value, yardstick[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_router_chooses_as_a_stable_sort(dtype: torch.dtype) -> None:
    """Few different values, so that most are tied; all numbers of experts about a vector's."""
    special = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-30], dtype=dtype
    )
    for experts in (*range(1, 35), 64, 100, 257):
        for logits in (
            special[torch.randint(len(special), (9, experts))],
            torch.randn(9, experts).to(dtype),
        ):
            order = logits.sort(dim=1, descending=True, stable=True).indices
            for top_k in {1, min(2, experts), min(9, experts), experts}:
                ids = moe_kernels.topk_router(
                    logits, top_k, score_func="softmax", softmax_before_topk=False
                ).topk_ids
                assert torch.equal(ids.long(), order[:, :top_k])
