"""float8_e4m3fn in kernels: as the device's own type, or as bytes where it has none.

A value is sign, 4 bits of exponent (bias 7), 3 of mantissa; exponent 0 is subnormal, the largest
magnitude 448, and all ones NaN. There are no infinities.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import architecture

LARGEST: float = 448.0


def has_float8(device: torch.device) -> bool:
    """Whether Triton knows float8_e4m3fn there; before sm_89 kernels take its bytes."""
    return architecture(device) >= 89


def raw(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: float8 as bytes where the device does not know it."""
    if tensor.element_size() != 1 or has_float8(tensor.device):
        return tensor
    return tensor.view(torch.uint8)


@triton.jit
def encode(x, BYTES: tl.constexpr):
    """float32 of magnitude at most 448 (within rounding), or NaN, to the nearest, ties to even."""
    if BYTES:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # 20 bits of mantissa go; 120 is the difference of the biases. Subnormals are multiples of
        # 2**-9, which is what adding 2**14 leaves.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
        small = shifted.to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, small, normal)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        result = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        result = x.to(tl.float8e4nv)
    return result


@triton.jit
def decode(values, BYTES: tl.constexpr):
    """To float32."""
    if BYTES:
        code = values.to(tl.int32)
        # the mantissa in its place, and the exponent less 120, which also makes subnormals right
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        result = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
        result = tl.where((code & 0x7F) == 0x7F, float("nan"), result)
    else:
        result = values.to(tl.float32)
    return result


@triton.jit
def multipliable(values, BYTES: tl.constexpr):
    """What tensor cores multiply: float8, or the same numbers in bfloat16."""
    return decode(values, True).to(tl.bfloat16) if BYTES else values
