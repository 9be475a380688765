"""Which calls without gradients go past checks and dispatcher, where nothing is launched."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._device import DeviceContext
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from benchmarks.launches import watched

T, H, INNER, E, K = 3, 64, 32, 4, 2


class Subclass(Tensor):
    """Whose results are of its kind, too."""


def _experts(x: Tensor, **options: Any) -> Tensor:
    gate_up = torch.empty(E, H, 2 * INNER, dtype=torch.bfloat16)
    down = torch.empty(E, INNER, H, dtype=torch.bfloat16)
    ids = torch.zeros(T, K, dtype=torch.int32)
    return moe_kernels.fused_experts(x, gate_up, down, ids, torch.empty(T, K), **options)


def _x() -> Tensor:
    return torch.empty(T, H, dtype=torch.bfloat16)


def _route(logits: Tensor | None = None, top_k: Any = K, **options: Any) -> Any:
    return moe_kernels.topk_router(
        torch.empty(T, E) if logits is None else logits, top_k, **options
    )


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__
    return ""


def found() -> dict[str, Any]:
    """By name of a way to call: how often arguments were checked; or the error; or who heard."""
    experts = importlib.import_module("moe_kernels.ops.fused_experts")
    router = importlib.import_module("moe_kernels.ops.topk_router")
    counts = {"experts": 0, "router": 0}

    def counting(name: str, check: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            counts[name] += 1
            check(*args)

        return call

    def checks(
        name: str,
        call: Callable[[], Any],
        within: AbstractContextManager[Any] | None = None,
    ) -> int:
        counts[name] = 0
        with within or nullcontext():
            call()
        return counts[name]

    with ExitStack() as stack:
        stack.enter_context(watched(90, watch=False))
        for module, name, check in (
            (experts, "experts", "check_layer"),
            (router, "router", "_check"),
        ):
            # as of a tensor on CUDA
            stack.enter_context(mock.patch.object(module, "_direct", return_value=None))
            counted = counting(name, getattr(module, check))
            stack.enter_context(mock.patch.object(module, check, counted))
        stack.enter_context(torch.no_grad())
        x = _x()
        result: dict[str, Any] = {
            "first calls": [checks("experts", lambda: _experts(x)) for _ in range(4)],
            "router": [checks("router", _route) for _ in range(4)],
            "fewer rows": [checks("experts", lambda: _experts(x, num_rows=4)) for _ in range(4)],
        }
        with FlopCounterMode(display=False) as flops:
            result["a mode"] = [checks("experts", lambda: _experts(x)), flops.get_total_flops()]
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            profiled = checks("experts", lambda: _experts(x))
        heard = [event.key == "moe_kernels::fused_experts" for event in recorded.key_averages()]
        result["a profiler"] = [profiled, sum(heard)]

        with DeviceContext(torch.device("cpu")):
            result["a mode of functions"] = checks("experts", lambda: _experts(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will not be there for ever
            traced = checks("experts", lambda: torch.jit.trace(_experts, x, check_trace=False))
        result["a trace"] = traced

        bf16, wide, kind = torch.bfloat16, torch.empty(T, H), _x().as_subclass(Subclass)
        trained, negative = _x().requires_grad_(), torch._neg_view(_x())
        result |= {
            "autocast": checks("experts", lambda: _experts(wide), torch.autocast("cpu", bf16)),
            "gradients": checks("experts", lambda: _experts(trained), torch.enable_grad()),
            "a negative view": checks("experts", lambda: _experts(negative)),
            "a subclass": [checks("experts", lambda: _experts(kind)) for _ in range(4)],
            "again": checks("experts", lambda: _experts(x)),
            "sparse": _error(lambda: _route(torch.eye(T, E).to_sparse())),
            "nested": _error(lambda: _experts(torch.nested.nested_tensor([_x()]))),
            "a flag of 1": _error(lambda: _route(softmax_before_topk=1)),
            "2.0 of experts": _error(lambda: _route(top_k=2.0)),
            "no tensor": _error(lambda: _route(top_k=[2])),
            "an array": _error(lambda: _experts([[1.0]])),  # type: ignore[arg-type]
        }
    return result
