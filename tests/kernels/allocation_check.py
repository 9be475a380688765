"""Counts the allocations of calls with few tokens; run by test_decode_allocations.py.

    LD_PRELOAD=count_allocations.so python -m tests.kernels.allocation_check

Prints a line of JSON: for each case the allocations of calls, their bytes, and the same of making
tensors like the op's results. Those are y and, of fused_experts where nothing is kept for backward,
four empty ones.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import moe_kernels

TOKENS = (1, 4, 32)
Call = Callable[[], Tensor]

_counter = ctypes.CDLL(None)
_counting, _allocations, _bytes = (
    ctypes.c_long.in_dll(_counter, name) for name in ("counting", "allocations", "allocated_bytes")
)


def count(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """How often a call allocates memory, and how many bytes."""
    _allocations.value = _bytes.value = 0
    _counting.value = 1
    result = function(*args)
    _counting.value = 0
    del result
    return _allocations.value, _bytes.value


def tensors_like(results: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(result) for result in results]


def experts_call(
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    transposed: bool = False,
    bias: bool = False,
    weights_dtype: torch.dtype = torch.float32,
    experts: int = 8,
    hidden: int = 64,
    inner: int = 32,
    top_k: int = 2,
    first_id: int | None = None,
    formats: tuple[str, str] | None = None,
    **options: Any,
) -> Call:
    gate_up = torch.randn(experts, hidden, 2 * inner).to(dtype)
    down = torch.randn(experts, inner, hidden).to(dtype)
    if transposed:
        gate_up, down = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
    if bias:
        options["gate_up_bias"] = torch.randn(experts, 2 * inner).to(dtype)
        options["down_bias"] = torch.randn(experts, hidden).to(dtype)
    x = torch.randn(tokens, hidden).to(dtype)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    if first_id is not None:
        ids[0, 0] = first_id
    weights = torch.rand(tokens, top_k).to(weights_dtype)
    if formats is None:
        return lambda: moe_kernels.fused_experts(x, gate_up, down, ids, weights, **options)
    up, low = map(moe_kernels.quantize_experts, (gate_up, down), formats)
    return lambda: moe_kernels.fused_experts_quantized(x, up, low, ids, weights, **options)


def fail() -> None:
    """Raise in the middle of calls, which have memory then."""
    wrong = {"num_rows": experts_call(4, num_rows=7), "topk_ids": experts_call(4, first_id=9)}
    for argument, call in wrong.items():
        try:
            call()
        except (ValueError, IndexError) as error:
            assert argument in str(error)  # noqa: PT017
        else:
            raise AssertionError(argument)


def cases() -> Iterator[tuple[str, list[Call]]]:
    layouts, biases = (False, True), (False, True)
    dtypes = (torch.bfloat16, torch.float32)
    for dtype, transposed, bias in itertools.product(dtypes, layouts, biases):
        name = f"{dtype}{' columns' if transposed else ''}{' bias' if bias else ''}"
        options: dict[str, Any] = {"transposed": transposed, "bias": bias}
        yield name, [experts_call(tokens, dtype, **options) for tokens in TOKENS]
    others: dict[str, dict[str, Any]] = {
        "float64": {"dtype": torch.float64},
        "weights in bfloat16": {"weights_dtype": torch.bfloat16},
        "weights in float64": {"weights_dtype": torch.float64, "dtype": torch.float16},
        "pairs": {"interleaved": True, "activation": "swigluoai"},
        "many experts": {"experts": 512, "top_k": 10},
        "large": {"hidden": 2048, "inner": 768, "top_k": 8},  # products of 2 MiB
        "large float32": {"hidden": 2048, "inner": 768, "top_k": 8, "dtype": torch.float32},
        "quantized": {"formats": ("int4", "int8")},
        "quantized large": {"formats": ("mxfp4", "fp8"), "hidden": 2048, "top_k": 8, "bias": True},
    }
    for name, options in others.items():
        yield name, [experts_call(tokens, **options) for tokens in TOKENS]


def main() -> None:
    found: dict[str, list[list[int]]] = {}

    def check(name: str, calls: list[Call]) -> None:
        found[name] = []
        for call in calls:
            empty = 0 if "quantized" in name else 4
            results = [call(), *(torch.empty(0) for _ in range(empty))]
            found[name].append([*count(call), *count(tensors_like, results)])

    with torch.inference_mode():
        tensors_like([torch.empty(0)])
        for name, calls in cases():
            for _ in range(2):  # of the most tokens: the next call has all that it wants
                calls[-1]()
            check(name, calls)
        calls = [experts_call(tokens) for tokens in TOKENS]
        fail()
        check("after errors", calls)
        torch.set_num_threads(2)
        for call in calls * 100:  # until either thread has had each kind of work
            call()
        check("two threads", calls)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
