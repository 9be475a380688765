"""Triton's interpreter with bfloat16 and float8_e4m3fn that compute, and faster.

It keeps bfloat16 as uint16, and multiplies, adds and compares those bits as integers. Here operands
are widened to float32 and results rounded to nearest even, as the hardware does. Reductions of
bfloat16 tiles, ``tl.sum`` for one, remain wrong: kernels widen first. Its conversion to
float8_e4m3fn loses the carry of a mantissa that is rounded up, and takes NaN for a number. What it
computes of a mask and a condition is int32, which the loads of Triton 3.9 refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.kernels.quick_interpreter import quick_interpreter


def _round(values: Any) -> Any:
    """float32 to the bits of bfloat16."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _widen(bits: Any) -> Any:
    """The bits of bfloat16 to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def _round_float8(values: Any) -> Any:
    """float32 to the bits of float8_e4m3fn."""
    values = np.asarray(values, dtype=np.float32)
    rounded = torch.from_numpy(values.reshape(-1).copy()).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy().reshape(values.shape)


def _widen_float8(bits: Any) -> Any:
    """The bits of float8_e4m3fn to float32."""
    flat = torch.from_numpy(bits.reshape(-1).astype(np.uint8)).view(torch.float8_e4m3fn)
    return flat.float().numpy().reshape(bits.shape)


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """Mend the interpreter for a while. Has no effect on compiled kernels."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot
    cast = InterpreterBuilder.cast_impl
    convert = InterpreterBuilder.create_fp_to_fp
    binary = InterpreterBuilder.binary_op
    unary = InterpreterBuilder.unary_op
    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def narrow(handle: Any) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar == tl.float8e4nv:
            return TensorHandle(_widen_float8(handle.data), tl.float32)
        return TensorHandle(_widen(handle.data), tl.float32) if narrow(handle) else handle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), d, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if narrow(source) and target.scalar == tl.bfloat16:
            return source
        source = wide(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(_round(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        pair = {source.dtype.scalar, target.scalar}
        if pair == {tl.float8e4nv, tl.float32}:
            if target.scalar == tl.float32:
                return wide(source)
            return TensorHandle(_round_float8(source.data), tl.float8e4nv)
        if tl.bfloat16 in pair and pair <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
            return cast_impl(self, source, target)
        return convert(self, source, target, mode)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not (narrow(lhs) and narrow(rhs)):
            return binary(self, lhs, rhs, op)
        result = op(_widen(lhs.data), _widen(rhs.data))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_round(result), tl.bfloat16)

    def unary_op(self: Any, operand: Any, op: Callable[..., Any]) -> Any:
        if not narrow(operand):
            return unary(self, operand, op)
        return TensorHandle(_round(op(_widen(operand.data))), tl.bfloat16)

    def truth(mask: Any) -> Any:
        counts = isinstance(mask, TensorHandle) and mask.data.dtype != np.bool_
        return TensorHandle(mask.data != 0, tl.int1) if counts else mask

    def create_masked_load(self: Any, place: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return load(self, place, truth(mask), *rest, **named)

    def create_masked_store(
        self: Any, place: Any, values: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        return store(self, place, values, truth(mask), *rest, **named)

    mended = (
        create_dot, cast_impl, create_fp_to_fp, binary_op, unary_op, create_masked_load,
        create_masked_store,
    )  # fmt: skip
    # kernels compute on rows and columns that masks then drop, whatever they hold
    with (
        mock.patch.multiple(InterpreterBuilder, **{f.__name__: f for f in mended}),
        np.errstate(all="ignore"),
        quick_interpreter(),
    ):
        yield
