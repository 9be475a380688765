"""Elementary functions to the last bits, where Triton's own are approximate in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def square_root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        # exp2 of x * log2(e) would carry the rounding of that product, whose whole part n costs
        # bits; so n is taken out first, exactly: n * 0.693359375 has no rounding (Cody and Waite)
        x = tl.clamp(x, -104.0, 89.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        rest = (x - n * 0.693359375) + n * 2.12194440e-4
        result = tl.exp2(n) * tl.exp2(rest * 1.4426950408889634)
    return result


@triton.jit
def sigmoid(x):
    return divide(tl.full(x.shape, 1.0, x.dtype), 1.0 + exp(-x))


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``, accurate also where exp(x) vanishes beside 1."""
    e = exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * divide(e, tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def fast_sigmoid(x):
    # rsqrt(1 + e)**2 is 1 / (1 + e) in three instructions, where a division takes about ten and a
    # quotient of two tiles makes kernels spill
    r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return r * r


@triton.jit
def sort_key(x):
    """An integer that orders as the float does, NaN above all; the least integer stays unused."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 equals 0
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        most = tl.full(x.shape, 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        bits = x.to(tl.int32, bitcast=True)
        most = tl.full(x.shape, 0x7FFFFFFF, tl.int32)
    return tl.where(x != x, most, tl.where(bits < 0, bits ^ most, bits))


@triton.jit
def sort_value(key, dtype: tl.constexpr):
    """The float of a key that :func:`sort_key` gave."""
    most = tl.full(key.shape, 0x7FFFFFFFFFFFFFFF if dtype == tl.float64 else 0x7FFFFFFF, key.dtype)
    return tl.where(key < 0, key ^ most, key).to(dtype, bitcast=True)
