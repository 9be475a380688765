"""Argument checks shared by the ops: each message names the requirement and the value found."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
_PLAIN = (Tensor, nn.Parameter)


def shape(tensor: Tensor) -> list[Any]:
    return list(tensor.shape)


def describe(value: Any) -> str:
    """What a message says of an argument that should be a pair."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def check_tensor(op: str, name: str, value: Any, ndim: int, layout: str) -> None:
    """Raise unless ``value`` is a tensor with ``ndim`` dimensions, described as ``layout``, that
    has strides, is not spread over ranks and carries no forward-mode tangent."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {layout}; got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        found = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{op}: {name} must be a dense tensor {layout}; got {found}")
    if type(value) not in _PLAIN and hasattr(value, "device_mesh"):
        raise TypeError(
            f"{op}: {name} must be a plain tensor {layout}; got a {type(value).__name__}. Give "
            "this rank's part, to_local(), or all of it, full_tensor()."
        )
    if value.dim() != ndim:
        raise ValueError(f"{op}: {name} must be {layout}; got {shape(value)}")
    refuse_tangent(op, name, value)


def refuse_tangent(op: str, name: str, value: Tensor) -> None:
    """Raise for a dual number of forward-mode differentiation: ops would drop its tangent."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{op}: {name} has a tangent, and forward-mode differentiation (torch.func.jvp, "
            "torch.autograd.forward_ad) is not supported. Differentiate in reverse (backward, "
            "torch.autograd.grad), or call the function of that name in moe_kernels.reference."
        )


def check_dtype(op: str, name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        found = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be one of {names}; got {found}")


def check_same(op: str, first_name: str, first: Tensor, name: str, value: Tensor | None) -> None:
    """Raise unless ``value`` (where given) has the dtype and the device of ``first``."""
    if value is None:
        return
    if value.dtype != first.dtype:
        raise TypeError(
            f"{op}: {name} must have {first_name}'s dtype {first.dtype}; got {value.dtype}. "
            "Convert one of them, or run under torch.autocast."
        )
    check_device(op, first_name, first, name, value)


def check_device(op: str, first_name: str, first: Tensor, name: str, value: Tensor | None) -> None:
    if value is not None and value.device != first.device:
        raise ValueError(
            f"{op}: {name} must be on {first_name}'s device {first.device}; got {value.device}"
        )


def check_accumulator(op: str, name: str, buffer: Tensor) -> None:
    """Raise unless each element of ``buffer``, which is added to in place, has its own memory."""
    if buffer.numel() == 0:
        return
    dims = list(zip(buffer.stride(), buffer.shape, strict=True))
    for i, (step, size) in enumerate(dims):  # not sorted, which torch.compile cannot by symbols
        smaller = [d for d in dims[:i] if d[0] <= step] + [d for d in dims[i + 1 :] if d[0] < step]
        reach = sum(other * (count - 1) for other, count in smaller)  # beyond the first element
        if size > 1 and step <= reach:
            raise ValueError(
                f"{op}: {name} must have memory of its own for each element, which is added to; "
                f"got {shape(buffer)} with strides {list(buffer.stride())}"
            )


def check_choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}; got {value!r}")


def check_count(op: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer (perhaps symbolic) of at least 0 that an int64 holds."""
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an integer; got {value!r}")
    if torch.compiler.is_compiling():  # to branch on a number that only the run knows is an error
        # PyTorch 2.11 takes no message that names the op
        torch._check(value >= 0, lambda: "a count given to moe_kernels must be at least 0")
        return
    if value < 0:
        raise ValueError(f"{op}: {name} must be at least 0; got {value}")
    if isinstance(value, int) and value >= 2**63:
        raise ValueError(f"{op}: {name} must be below 2**63; got {value}")


def check_num_experts(op: str, value: Any) -> None:
    check_count(op, "num_experts", value)
    if value >= 2**31:
        raise ValueError(
            f"{op}: num_experts must be below 2**31, the range of int32 ids; got {value}"
        )


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {value!r}")


def check_number(op: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is a real number (perhaps symbolic) that a float holds."""
    if isinstance(value, int):
        if abs(value) > sys.float_info.max:
            raise ValueError(
                f"{op}: {name} must be in the range of a float; got an integer of "
                f"{value.bit_length()} bits"
            )
    elif not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: {name} must be a number; got {value!r}")


def without_infinity(value: float) -> float:
    """``value``; where torch.export traces, the largest double of its sign in place of an infinity,
    which an AOTInductor package does not hold. Kernels take the one for the other.
    """
    if torch.compiler.is_exporting() and isinstance(value, float) and math.isinf(value):
        return math.copysign(sys.float_info.max, value)
    return value


def check_rows(op: str, rows: Any) -> None:
    """Slots are numbered with int32: refuse more than it holds.

    Not under torch.compile, where a number may be unknown and asking for it breaks the graph.
    """
    if not torch.compiler.is_compiling() and rows >= 2**31:
        raise ValueError(
            f"{op}: T * K must be below 2**31, the range of the int32 row numbers; got {rows}. "
            "Split the tokens over several calls."
        )


def check_num_rows(op: str, value: Any) -> None:
    """Raise unless ``value`` is a number of rows that the int32 numbers of rows can be below."""
    check_count(op, "num_rows", value)
    if not torch.compiler.is_compiling() and value >= 2**31:
        raise ValueError(
            f"{op}: num_rows must be below 2**31, the range of the int32 row numbers; got {value}"
        )


def check_routing(op: str, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Raise unless x is [T, H], and ids and weights are [T, K], of dtypes that experts take."""
    check_tensor(op, "x", x, 2, "[T, H]")
    check_dtype(op, "x", x, FLOAT_DTYPES)
    check_tensor(op, "topk_ids", topk_ids, 2, "[T, K]")
    check_dtype(op, "topk_ids", topk_ids, INDEX_DTYPES)
    check_tensor(op, "topk_weights", topk_weights, 2, "[T, K]")
    check_dtype(op, "topk_weights", topk_weights, FLOAT_DTYPES)
    tokens = x.shape[0]
    if topk_ids.shape[0] != tokens:
        raise ValueError(
            f"{op}: topk_ids must be [T, K] with T = {tokens} (x.shape[0]); got {shape(topk_ids)}"
        )
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"{op}: topk_weights must be {shape(topk_ids)} as topk_ids; got {shape(topk_weights)}"
        )
