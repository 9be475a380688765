"""Which calls without gradients go past checks and dispatcher, where nothing is launched."""

from __future__ import annotations

import gc
import importlib
import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile
from torch.utils._device import DeviceContext
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from benchmarks.launches import watched

T, H, INNER, E, K = 3, 64, 32, 4, 2


class Subclass(Tensor):
    """Whose results are of its kind, too."""


class Wrong:
    """No number."""


def _experts(x: Tensor, ids: Tensor | None = None, **options: Any) -> Tensor:
    gate_up = torch.empty(E, H, 2 * INNER, dtype=torch.bfloat16)
    down = torch.empty(E, INNER, H, dtype=torch.bfloat16)
    ids = torch.zeros(T, K, dtype=torch.int32) if ids is None else ids
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


def _never(*args: Any) -> None:
    """In place of the CPU's direct call, as of tensors on CUDA."""


class Counting:
    """Counts the checks of calls while it is open."""

    def __init__(self) -> None:
        self.count = 0
        self._stack = ExitStack()

    def __enter__(self) -> Counting:
        for module, check in (("fused_experts", "check_layer"), ("topk_router", "_check")):
            module = importlib.import_module(f"moe_kernels.ops.{module}")
            counted = self._counting(getattr(module, check))
            self._stack.enter_context(mock.patch.object(module, "_direct", _never))
            self._stack.enter_context(mock.patch.object(module, check, counted))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _counting(self, check: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            self.count += 1
            check(*args)

        return call

    def checks(
        self, call: Callable[[], Any], within: AbstractContextManager[Any] | None = None
    ) -> int:
        before = self.count
        with within or nullcontext():
            call()
        return self.count - before


def _heard(checks: Callable[..., int], x: Tensor) -> dict[str, Any]:
    """Those who are to hear of each op, and what they heard."""
    with FlopCounterMode(display=False) as flops:
        counted = checks(lambda: _experts(x))
    found: dict[str, Any] = {"a mode": [counted, flops.get_total_flops()]}
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    for name, config in (("a profiler", None), ("a profiler of all threads", everywhere)):
        with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as recorded:
            checked = checks(lambda: _experts(x))
        names = [event.key for event in recorded.key_averages()]
        found[name] = [checked, names.count("moe_kernels::fused_experts")]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        observer = ExecutionTraceObserver().register_callback(str(path))
        observer.start()
        checked = checks(lambda: _experts(x))
        observer.stop()
        observer.unregister_callback()
        found["an observer"] = [checked, path.read_text().count('"moe_kernels::fused_experts"')]
    with DeviceContext(torch.device("cpu")):
        found["a mode of functions"] = checks(lambda: _experts(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will not be there for ever
        found["a trace"] = checks(lambda: torch.jit.trace(_experts, x, check_trace=False))
    return found


def _other_tensors(checks: Callable[..., int], x: Tensor) -> dict[str, Any]:
    wide, kind = torch.empty(T, H), _x().as_subclass(Subclass)
    trained, negative = _x().requires_grad_(), torch._neg_view(_x())
    zero = torch._efficientzerotensor(T, H, dtype=torch.bfloat16)
    functional = torch._to_functional_tensor(_x())
    return {
        "autocast": checks(lambda: _experts(wide), torch.autocast("cpu", torch.bfloat16)),
        "gradients": checks(lambda: _experts(trained), torch.enable_grad()),
        "a negative view": checks(lambda: _experts(negative)),
        "a zero tensor": checks(lambda: _experts(zero)),
        "a functional tensor": checks(lambda: _experts(functional)),
        "a subclass": [checks(lambda: _experts(kind)) for _ in range(4)],
        "a fake mode": checks(lambda: _experts(x), FakeTensorMode(allow_non_fake_inputs=True)),
        "meta": tuple(_route(torch.empty(T, E, device="meta")).topk_ids.shape),
    }


def _errors() -> dict[str, str]:
    """Of what equals, or is near, a call that is known."""
    ids = torch.nested.nested_tensor([torch.zeros(K, dtype=torch.int32)] * T)
    return {
        "sparse": _error(lambda: _route(torch.eye(T, E).to_sparse())),
        "nested": _error(lambda: _experts(torch.nested.nested_tensor([_x()]))),
        "nested ids": _error(lambda: _experts(_x(), ids=ids)),
        "a flag of 1": _error(lambda: _route(softmax_before_topk=1)),
        "2.0 of experts": _error(lambda: _route(top_k=2.0)),
        "no tensor": _error(lambda: _route(top_k=[2])),
        "an array": _error(lambda: _experts([[1.0]])),  # type: ignore[arg-type]
        "too many rows": _error(lambda: _experts(_x(), num_rows=2**63)),
    }


def _unchecked() -> str:
    """The error of a call like others that were made past the public function."""
    mask = torch.ones(1, dtype=torch.bool)
    options = ("softmax", True, False, None, 1, 1, "max", -math.inf, 1.0, mask, None, False)
    for _ in range(4):
        torch.ops.moe_kernels.topk_router(torch.empty(T, E), K, *options)
    return _error(lambda: _route(token_mask=mask))


def _is_kept() -> bool:
    """Whether a wrong argument lives on."""
    wrong = Wrong()
    seen = weakref.ref(wrong)
    _error(partial(_route, top_k=wrong))
    del wrong
    gc.collect()
    return seen() is not None


def found() -> dict[str, Any]:
    """By name of a way to call: how often arguments were checked; or the error; or who heard."""
    with watched(90, watch=False), Counting() as counting, torch.no_grad():
        checks, x = counting.checks, _x()
        result: dict[str, Any] = {
            "first calls": [checks(lambda: _experts(x)) for _ in range(4)],
            "router": [checks(_route) for _ in range(4)],
            "fewer rows": [checks(lambda: _experts(x, num_rows=4)) for _ in range(4)],
            "another sign of zero": [
                *(checks(lambda: _route(route_scale=0.0)) for _ in range(4)),
                checks(lambda: _route(route_scale=-0.0)),
            ],
            **_heard(checks, x),
            **_other_tensors(checks, x),
            "again": checks(lambda: _experts(x)),
            "unchecked": _unchecked(),
            "kept": _is_kept(),
        }
        with torch.inference_mode():
            result["inference"] = [checks(lambda: _experts(_x())) for _ in range(2)]
        return result | _errors()
