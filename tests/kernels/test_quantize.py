"""quantize_rows, quantize_weights, permute_quantize: the definition's bits, and its promises."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels import reference
from tests.conftest import Implementation
from tests.kernels.routing import SHAPES, make_ids

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = torch.float8_e4m3fn


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the sign of NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    actual, expected = actual.cpu().double(), expected.cpu().double()
    assert torch.equal(actual.nan_to_num(-1e300), expected.nan_to_num(-1e300))
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def _rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of all magnitudes, with blocks of zeros, of the smallest numbers and of infinities."""
    x = torch.randn(rows, columns) * torch.logspace(-6, 4, rows)[:, None]
    x = x.to(dtype)
    limits = torch.finfo(dtype)
    for row, value in enumerate((0.0, -0.0, limits.smallest_normal, limits.tiny / 4, limits.max)):
        if row < rows:
            x[row, : min(columns, 150)] = value
    if rows > 8:
        x[5, columns // 2] = torch.inf
        x[6, columns // 2] = torch.nan
        x[7, : min(columns, 150)] *= limits.smallest_normal
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(37, 300, 128), (37, 256, 64), (11, 33, 32), (1, 1, 128), (0, 40, 128), (5, 0, 128)],
)
def test_rows_equal_the_definition(
    impl: Implementation,
    rows: int,
    columns: int,
    block: int,
    power_of_two: bool,
    dtype: torch.dtype,
) -> None:
    x = _rows(rows, columns, dtype)
    options = {"block": block, "power_of_two": power_of_two}
    values, scales = moe_kernels.quantize_rows(x.to(impl.device), **options)
    expected = reference.quantize_rows(x, **options)
    assert_same(values, expected[0])
    assert_same(scales, expected[1])
    for wanted in DTYPES:
        back = moe_kernels.dequantize_rows(values, scales, dtype=wanted, block=block)
        right = reference.dequantize_rows(*expected, wanted, block)
        # processors round what is below the normal numbers of bfloat16 to zero
        flushed = torch.finfo(wanted).tiny if wanted == torch.bfloat16 else 0
        torch.testing.assert_close(back.cpu(), right, rtol=0, atol=flushed, equal_nan=True)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("stored", ["plain", "transposed", "strided"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((3, 200, 140), 128),
        ((2, 128, 256), 128),
        ((2, 65, 31), 32),
        ((0, 8, 8), 128),
        ((2, 0, 8), 128),
        ((2, 8, 0), 64),
        ((1, 1, 1), 64),
    ],
)
def test_weights_equal_the_definition(
    impl: Implementation,
    shape: tuple[int, int, int],
    block: int,
    stored: str,
    transposed: bool,
) -> None:
    w = torch.randn(shape).to(torch.bfloat16)
    if shape[0] > 1 and w.numel():
        w[0, :block, :block] = 0
        w[1, -1, -1] = torch.nan
    if stored == "transposed":
        w = w.mT.contiguous().mT
    elif stored == "strided":
        w = w.repeat_interleave(2, -1)[..., ::2]
    power_of_two = block == 64
    values, scales = moe_kernels.quantize_weights(
        w.to(impl.device), block=block, power_of_two=power_of_two, transposed=transposed
    )
    expected = reference.quantize_weights(
        w, block=block, power_of_two=power_of_two, transposed=transposed
    )
    assert_same(values, expected[0])
    assert_same(scales, expected[1])
    other = moe_kernels.quantize_weights(
        w.mT.to(impl.device), block=block, power_of_two=power_of_two, transposed=not transposed
    )
    assert_same(other[0].mT.float(), values.float())
    torch.testing.assert_close(other[1].mT, scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("hidden", "dtype"), [(1, torch.float32), (40, torch.bfloat16), (257, torch.float16)]
)
@pytest.mark.parametrize("name", SHAPES)
def test_permute_quantize_is_permute_then_quantize(
    impl: Implementation, name: str, hidden: int, dtype: torch.dtype
) -> None:
    ids, experts = make_ids(name)
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    x = torch.randn(ids.shape[0], hidden).to(dtype).to(impl.device)
    for num_rows in (None, int(order.offsets[-1]), ids.numel() + 3):
        values, scales = moe_kernels.permute_quantize(x, order, num_rows=num_rows)
        rows = moe_kernels.permute(x, order, num_rows=num_rows)
        for actual, expected in zip((values, scales), moe_kernels.quantize_rows(rows), strict=True):
            assert_same(actual, expected)
        # and quantize, then permute
        before = moe_kernels.quantize_rows(x)
        after = moe_kernels.permute(before[0], order, num_rows=num_rows, scales=before[1])
        assert_same(after[0], values)
        assert torch.equal(after[1], scales)


def test_rounding_is_to_nearest_and_within_the_format(impl: Implementation) -> None:
    """Every number of the format, the middle of each two, and what is next to that."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [middle, middle.nextafter(numbers[1:]), middle.nextafter(numbers[:-1])]
    x = torch.cat([numbers, *near])
    x = torch.cat([x, -x]).view(-1, 1).repeat(1, 2)
    x[:, 0] = 448  # so that the scale is 1
    values, scales = moe_kernels.quantize_rows(x.to(impl.device))
    assert (scales == 1).all()
    assert_same(values, x.to(FLOAT8))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_the_definition_promises(impl: Implementation, power_of_two: bool) -> None:
    x = _rows(64, 300, torch.float32)
    found = moe_kernels.quantize_rows(x.to(impl.device), power_of_two=power_of_two)
    values, scales = (value.cpu() for value in found)
    blocks = torch.nn.functional.pad(x, (0, 84)).view(64, 3, 128)
    odd = ~blocks.isfinite().all(2)
    assert odd.sum() == 2
    assert torch.equal(scales.isnan(), odd)
    each = scales.repeat_interleave(128, 1)[:, :300]
    assert torch.equal(values.float().isnan(), each.isnan())
    assert torch.equal(scales == 0, (blocks == 0).all(2))
    kept = scales[~odd]
    assert ((kept == 0) | (kept >= 2.0**-126)).all()
    if power_of_two:
        assert (torch.frexp(kept[kept > 0])[0] == 0.5).all()
    # half a step of a normal number, or half the smallest step of the block
    error = (reference.dequantize_rows(values, scales, torch.float64) - x.double()).abs()
    bound = torch.maximum(x.abs().double() * 2.0**-4, each.double() * 2.0**-10) * (1 + 1e-6)
    assert (error <= bound)[~each.isnan()].all()
    # a matrix with equal columns of blocks has the scales of its rows' largest
    w = torch.randn(1, 256, 130)
    _, w_scales = reference.quantize_weights(w)
    assert torch.equal(w_scales[0, 1, 1], w[0, 128:, 128:].abs().max() / 448)


def test_views_give_the_same_bits(impl: Implementation) -> None:
    base = torch.randn(130, 37).to(impl.device)
    for x in (base.t(), base[::2, ::3], base[:1].expand(9, 37), base[:, :1].expand(130, 200)):
        for actual, expected in zip(
            moe_kernels.quantize_rows(x), moe_kernels.quantize_rows(x.contiguous()), strict=True
        ):
            assert_same(actual, expected)
    values, scales = moe_kernels.quantize_rows(base)
    wide = values.repeat_interleave(2, 1)[:, ::2], scales.repeat_interleave(2, 0)[::2]
    assert_same(moe_kernels.dequantize_rows(*wide), moe_kernels.dequantize_rows(values, scales))


def test_float64_is_rounded_once_on_the_cpu() -> None:
    x = torch.randn(9, 140, dtype=torch.float64)
    x[0, 0], x[1, 0] = 1e300, 1e-300
    for actual, expected in zip(
        moe_kernels.quantize_rows(x), reference.quantize_rows(x), strict=True
    ):
        assert_same(actual, expected)
    assert moe_kernels.quantize_rows(x)[1][0, 0].isnan()  # past float32


def test_rounding_has_no_gradient(impl: Implementation) -> None:
    ids, experts = make_ids("plain")
    order = moe_kernels.sort_by_expert(ids.to(impl.device), experts)
    x = torch.randn(ids.shape[0], 8, device=impl.device, requires_grad=True)
    w = torch.randn(2, 8, 8, device=impl.device, requires_grad=True)
    for name, out in (
        ("quantize_rows", moe_kernels.quantize_rows(x)),
        ("permute_quantize", moe_kernels.permute_quantize(x, order)),
        ("quantize_weights", moe_kernels.quantize_weights(w)),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: rounding to float8 has no gradient"):
            out[1].sum().backward()
    values = moe_kernels.quantize_rows(x)[0]
    with pytest.raises(RuntimeError, match="permute: x is float8_e4m3fn and requires a gradient"):
        moe_kernels.permute(values, order)
    with torch.no_grad():
        assert not moe_kernels.quantize_rows(x)[0].requires_grad


def test_refuses_what_does_not_fit() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(
        TypeError, match=r"dtype must be torch\.float8_e4m3fn; got torch\.float8_e5"
    ):
        moe_kernels.quantize_rows(x, dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"block must be one of 32, 64, 128 .* got 100"):
        moe_kernels.quantize_rows(x, block=100)
    with pytest.raises(TypeError, match="x must be one of bfloat16, float16, float32, float64"):
        moe_kernels.quantize_rows(x.to(FLOAT8))
    with pytest.raises(ValueError, match=r"w must be \[E, Kd, N\]; got \[4, 8\]"):
        moe_kernels.quantize_weights(x)
    values, scales = moe_kernels.quantize_rows(x)
    with pytest.raises(ValueError, match=r"scales must be .* = \[4, 1\] .* got \[3, 1\]"):
        moe_kernels.dequantize_rows(values, scales[:3])
    with pytest.raises(TypeError, match="values must be one of float8_e4m3fn; got float32"):
        moe_kernels.dequantize_rows(x, scales)
    with pytest.raises(TypeError, match="scales must be one of float32; got float64"):
        moe_kernels.dequantize_rows(values, scales.double())
    ids, experts = make_ids("plain")
    order = moe_kernels.sort_by_expert(ids, experts)
    x = torch.randn(ids.shape[0], 8)
    values, scales = moe_kernels.quantize_rows(x)
    with pytest.raises(ValueError, match=r"scales must be .* with T = 37 .* got \[5, 1\]"):
        moe_kernels.permute(values, order, scales=scales[:5])
    with pytest.raises(
        TypeError, match="x, with scales, must be one of float8_e4m3fn; got float32"
    ):
        moe_kernels.permute(x, order, scales=scales)
    with pytest.raises(ValueError, match="with T = 5"):
        moe_kernels.permute_quantize(x[:5], order)


def test_quantised_experts_are_loaded_as_weights(tmp_path: Path) -> None:
    """As state dicts are, without ``weights_only=False``, which would run what a file says."""
    packed = moe_kernels.quantize_experts(torch.randn(3, 40, 24))
    torch.save({"down": packed}, tmp_path / "experts.pt")
    loaded = torch.load(tmp_path / "experts.pt", weights_only=True)["down"]
    assert torch.equal(loaded.dequantize(), packed.dequantize())
    assert loaded.shape == packed.shape
