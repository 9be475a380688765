"""The up-projection in float8 that rounds its activation: as if that were done afterwards."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.triton import (
    _scaled_up,
    expert_activation,
    fused_experts_fp8,
    quantize,
    scaled_grouped_gemm,
)
from moe_kernels.triton._activation import Activation
from moe_kernels.triton._tiles import build_tile_map
from tests.conftest import HAS_GPU, poisoned_memory
from tests.kernels.accuracy import frobenius_error
from tests.kernels.interpreter import mended_interpreter

pytestmark = pytest.mark.skipif(
    HAS_GPU and torch.cuda.get_device_capability() < (9, 0), reason="the kernel is for sm_90 on"
)
FLOAT8 = torch.float8_e4m3fn
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# activation, interleaved, I, dtype of h
CASES = [
    ("swiglu", False, 256, BF16),
    ("swiglu", True, 200, FP32),  # the last tile has one block of h and a part of another
    ("swigluoai", True, 24, BF16),  # or a part of one
    ("swigluoai", False, 128, FP32),
    ("geglu", False, 128, FP16),
    ("reglu", True, 128, BF16),
    ("relu2", False, 130, BF16),
    ("silu", False, 16, BF16),
    ("gelu", False, 128, FP16),
]


def operands(kind: str, inner: int, hidden: int = 208) -> tuple[Tensor, ...]:
    """Rows of three experts, of which one has none, and rows of no expert; values, then scales."""
    x = torch.randn(37, hidden) * torch.logspace(-2, 2, 37)[:, None]
    x[1], x[2, 3], x[3, 150], x[4], x[5, :128] = 0, torch.inf, torch.nan, 1e-42, 0
    width = 2 * inner if reference.is_gated(kind) else inner
    w = torch.randn(3, hidden, width) / hidden**0.5
    w[2, :, :1] = 0
    pairs = zip(reference.quantize_rows(x), reference.quantize_weights(w), strict=True)
    values, scales = ([tensor.to(DEVICE) for tensor in pair] for pair in pairs)
    return (*values, *scales, (torch.randn(3, width) * 3).to(DEVICE))


def assert_bits(found: Tensor, right: Tensor) -> None:
    """Bit for bit in the interpreter; a GPU's compiler fuses other products with other sums."""
    if HAS_GPU:
        finite = right.float().isfinite()
        assert torch.equal(found.float().isfinite(), finite)
        assert frobenius_error(found.float()[finite], right.double()[finite]) < 1e-2
    else:
        number = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[right.element_size()]
        odd = right.float().isnan()
        assert torch.equal(found.float().isnan(), odd)
        assert torch.equal(found.view(number)[~odd], right.view(number)[~odd])


@pytest.mark.parametrize(("kind", "interleaved", "inner", "dtype"), CASES)
def test_equals_rounding_afterwards(
    kind: str, interleaved: bool, inner: int, dtype: torch.dtype
) -> None:
    values, weights, scales, weight_scales, bias = operands(kind, inner)
    bias = bias.to(dtype)
    offsets = torch.tensor([0, 18, 18, 33], dtype=torch.int32, device=DEVICE)
    act = Activation(kind, interleaved, 1.702, 4.0)
    with poisoned_memory(), contextlib.nullcontext() if HAS_GPU else mended_interpreter():
        given = (values, weights, scales, weight_scales, offsets, bias, dtype)
        h = scaled_grouped_gemm.scaled_grouped_gemm(*given)
        a = expert_activation.expert_activation(h, kind, None, interleaved, 1.702, 4.0)
        right = quantize.quantize_rows(a, FLOAT8, 128, False)
        cut = scaled_grouped_gemm.scaled_config(weights, 37, aligned=True)
        assert cut.block_n == 128
        tiles = build_tile_map(offsets, 37, cut.block_m)
        pairs = (values, scales), (weights, weight_scales)
        # rows and blocks past the last are another's
        room = torch.full((40, inner), 7.0, device=DEVICE).to(FLOAT8)
        scale_room = torch.full((scales.shape[1] + 4, 37), 7.0, device=DEVICE)
        blocks = right[1].shape[1]
        for saves in (True, False):
            found = room[:37], scale_room[:blocks].t()
            kept = h.new_empty(41 if saves else 0, h.shape[1])
            _scaled_up.project_up(*pairs, bias, offsets, kept, found, act, tiles, cut)
            assert_bits(found[0][:33], right[0][:33])
            assert_bits(found[1][:33].contiguous(), right[1][:33].contiguous())
            assert (room[33:].float() == 7).all()
            assert (scale_room[blocks:] == 7).all()
            if saves:
                assert_bits(kept[:33], h[:33])
                assert (kept[33:] == 0).all()


def test_what_would_spill_is_rounded_afterwards() -> None:
    """A number of columns that is no multiple of 16; float32."""
    _, weights, *_ = operands("gelu", 144)
    for kind, interleaved in (("gelu", False), ("swiglu", True)):
        act = Activation(kind, interleaved, 1.702, 4.0)
        for inner, dtype, fused in ((144, BF16, True), (136, BF16, False), (144, FP32, False)):
            cut = scaled_grouped_gemm.scaled_config(weights, 37, aligned=True)
            h = torch.empty(0, 2 * inner, dtype=dtype, device=DEVICE)
            assert _scaled_up.activates_in_product(act, h, inner, cut) is fused


@pytest.mark.parametrize(
    ("inner", "dtype", "fused"),
    [(128, BF16, True), (128, FP32, False), (72, BF16, False), (200, FP16, False)],
)
def test_what_does_not_fit_a_tile_is_rounded_afterwards(
    inner: int, dtype: torch.dtype, fused: bool
) -> None:
    """With the same h and float8 either way, and none of h where it is not asked for."""
    values, weights, scales, weight_scales, bias = operands("swiglu", inner, hidden=160)
    offsets = torch.tensor([0, 18, 18, 33], dtype=torch.int32, device=DEVICE)
    act = Activation("swiglu", False, 1.702, float("inf"))
    with poisoned_memory(), contextlib.nullcontext() if HAS_GPU else mended_interpreter():
        cut = scaled_grouped_gemm.scaled_config(weights, 37, aligned=True)
        tiles = build_tile_map(offsets, 37, cut.block_m)
        h = values.new_empty(41, 2 * inner, dtype=dtype)
        assert _scaled_up.activates_in_product(act, h, inner, cut) is fused
        pairs, results = ((values, scales), (weights, weight_scales)), []
        for kept in (h, h[:0]):
            results.append(fused_experts_fp8._empty_scaled(h, 37, inner))
            fused_experts_fp8._project_up(*pairs, bias, offsets, kept, results[-1], act, tiles, cut)
        for first, second in zip(*results, strict=True):
            assert_bits(second[:33].contiguous(), first[:33].contiguous())
        assert (h[33:] == 0).all()
        expected = reference.quantize_rows(reference.expert_activation(h[:33].cpu(), "swiglu"))
        odd = expected[1].isnan().any(1)
        found = reference.dequantize_rows(*(value[:33].cpu() for value in results[0]))
        right = reference.dequantize_rows(*expected)
        assert torch.equal(found.isnan().any(1), odd)
        assert frobenius_error(found[~odd], right[~odd]) < 1e-2
