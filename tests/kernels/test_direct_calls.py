"""Ops called in C++ from Python to kernel: when, and that nothing else can tell the difference."""

from __future__ import annotations

import importlib
import os
import resource
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from moe_kernels import _C
from tests.kernels.test_fused_experts import make_case

EXPERTS = importlib.import_module("moe_kernels.ops.fused_experts")
QUANTIZED = importlib.import_module("moe_kernels.ops.fused_experts_quantized")
ROUTER = importlib.import_module("moe_kernels.ops.topk_router")
MODULES = (EXPERTS, QUANTIZED, ROUTER)


def experts_case(**changes: Any) -> dict[str, Any]:
    inputs, _ = make_case("dropped", torch.float32, bias=True)
    return {**inputs, **changes}


def quantized_case(format: str = "int4", **changes: Any) -> dict[str, Any]:
    inputs = experts_case()
    for name, other in (("gate_up", format), ("down", "int8")):
        inputs[name] = moe_kernels.quantize_experts(inputs[name], other)
    return {**inputs, **changes}


def router_case(**changes: Any) -> dict[str, Any]:
    return {"logits": torch.randn(5, 8), "top_k": 3, **changes}


@pytest.fixture
def without_python_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the op was called by way of Python")

    for module in MODULES:
        monkeypatch.setattr(module, "_op", refuse)


@pytest.fixture
def without_direct_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that switches direct calls off until the test ends."""

    def switch_off() -> None:
        for module in MODULES:
            monkeypatch.setattr(module, "_direct", lambda *args: None)

    return switch_off


def same(first: Any, second: Any) -> bool:
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    return all(torch.equal(a, b) for a, b in pairs)


EXPERTS_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "swigluoai", "interleaved": True, "alpha": 1.5, "limit": 2.0},
    {"gate_up_bias": None, "num_rows": 1000},
    {"activation": "swiglu", "limit": 3, "num_rows": 80, "down_bias": None},
)
QUANTIZED_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"format": "fp8", "activation": "swigluoai", "interleaved": True, "alpha": 1.5, "limit": 2.0},
    {"format": "mxfp4", "limit": 3, "gate_up_bias": None},
)
ROUTER_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"score_func": "sigmoid", "num_groups": 4, "topk_groups": 2, "group_score": "top2"},
    {"softmax_before_topk": False, "candidates": 2, "return_scores": True, "route_scale": 2},
    {"correction_bias": torch.arange(8.0), "token_mask": torch.arange(5) > 2, "group_fill": 0},
    {"given_ids": torch.arange(15).view(5, 3) % 8, "renormalize": True},
)
CASES = [
    *((moe_kernels.fused_experts, experts_case, options) for options in EXPERTS_OPTIONS),
    *(
        (moe_kernels.fused_experts_quantized, quantized_case, options)
        for options in QUANTIZED_OPTIONS
    ),
    *((moe_kernels.topk_router, router_case, options) for options in ROUTER_OPTIONS),
]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_usual_calls_on_cpu(
    mode: Any, case: Any, without_python_ops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are direct, whatever the options, and give what the op gives."""
    function, make, options = case
    inputs = make(**options)
    if "x" in inputs and mode is not nullcontext:
        inputs["x"] = torch.nn.Parameter(inputs["x"])
    with mode():
        found = function(**inputs)
        monkeypatch.undo()
        for module in MODULES:
            monkeypatch.setattr(module, "_direct", lambda *args: None)
        assert same(found, function(**inputs))
        first = found[0] if isinstance(found, tuple) else found
        assert first.is_inference() == (mode is torch.inference_mode)
        assert not first.requires_grad


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class CountingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_modes_see_the_ops() -> None:
    experts, router = experts_case(), router_case()
    for mode in (Counting(), CountingFunctions()):
        with torch.inference_mode(), mode:
            moe_kernels.fused_experts(**experts)
            moe_kernels.topk_router(**router)
        for name in ("fused_experts", "topk_router"):
            assert sum(name in found for found in mode.names) == 1, mode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        moe_kernels.fused_experts(**experts)
    slots = experts["topk_ids"].numel()
    assert counter.get_total_flops() == 6 * slots * 40 * 24
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        moe_kernels.fused_experts(**experts)
        moe_kernels.topk_router(**router)
    seen = {event.name for event in profiler.events()}
    assert {"moe_kernels::fused_experts", "moe_kernels::topk_router"} <= seen


def _direct(inputs: dict[str, Any]) -> Any:
    names = ("x", "gate_up", "down", "topk_ids", "topk_weights", "gate_up_bias", "down_bias")
    values = [inputs[name] for name in names]
    return _C.fused_experts(*values, "swiglu", False, 1.702, float("inf"), None)


def test_what_is_not_usual_is_left_to_python() -> None:
    inputs = experts_case()
    assert isinstance(_direct(inputs), Tensor)
    for name, value in inputs.items():
        others = [value.to("meta"), value.as_subclass(Subclass), value.tolist(), value[None]]
        if value.is_floating_point():
            conjugate = torch.complex(value, value).conj().imag
            assert conjugate.is_neg()
            others += [value.clone().requires_grad_(), conjugate, value.to(torch.float8_e5m2)]
        for other in others:
            assert _direct({**inputs, name: other}) is None, (name, type(other))
        if value.is_floating_point():
            with torch.no_grad():
                assert _direct({**inputs, name: value.clone().requires_grad_()}) is not None
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(value, torch.ones_like(value))
                assert _direct({**inputs, name: dual}) is None
    for mode in (
        torch.autocast("cpu", torch.bfloat16),
        torch.device("cpu"),
        Counting(),
        CountingFunctions(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        with mode:
            assert _direct(inputs) is None
    seen: list[Any] = []

    def look(x: Tensor) -> Tensor:
        seen.extend((_direct(inputs), _direct({**inputs, "x": x})))
        return x

    torch.func.vmap(look)(inputs["x"][None])
    torch.jit.trace(look, inputs["x"], check_trace=False)
    torch.func.functionalize(look)(inputs["x"])
    assert seen == [None] * 6
    assert _C.fused_experts() is None
    assert _C.fused_experts(*range(12)) is None
    assert _C.topk_router() is None
    assert _C.fused_experts_quantized() is None


def _error(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[type, str]:
    with pytest.raises(Exception, match=r".") as caught:
        function(**inputs)
    return caught.type, str(caught.value)


def wrong_experts() -> list[dict[str, Any]]:
    inputs = experts_case()
    ids = inputs["topk_ids"].clone()
    ids[3, 1] = 99
    cases = [{"topk_ids": ids}, {"num_rows": 1}, {"num_rows": -1}, {"num_rows": 2.0}]
    cases += [{"activation": "relu6"}, {"alpha": 1.0}, {"limit": 0.0}]
    cases += [{"topk_ids": ids.float()}, {"topk_ids": ids.short()}, {"topk_ids": ids[:, :1]}]
    for name, value in inputs.items():
        cases += [{name: value[..., :-1]}, {name: value[:-1]}, {name: value[0]}, {name: 3}]
        if value.is_floating_point():
            cases += [{name: value.to(torch.complex64)}, {name: value.to("meta")}]
            if name != "topk_weights":
                cases.append({name: value.double()})
    cases += [{"down": inputs["down"][:, :-1]}, {"gate_up": inputs["gate_up"][..., :-2]}]
    return [{**inputs, **changes} for changes in cases]


def wrong_quantized() -> list[dict[str, Any]]:
    inputs = quantized_case()
    up, ids = inputs["gate_up"], inputs["topk_ids"].clone()
    ids[3, 1] = 99
    parts: list[dict[str, Any]] = [
        {"codes": up.codes[:-1]},
        {"codes": up.codes.to("meta")},
        {"scales": up.scales[..., :-1]},
        {"scales": up.scales.float()},
        {"format": "int8"},
        {"format": "int5"},
        {"shape": (up.shape[0], up.shape[1] - 1, up.shape[2])},
        {"shape": (up.shape[0], up.shape[1], up.shape[2] - 2)},
    ]
    changes = [{"gate_up": replace(up, **part)} for part in parts]
    down = inputs["down"]
    for size in (-1, 2**62, 2**63 - 1, 2**64):  # twice of it, or its groups, are past 64 bits
        changes.append({"down": replace(down, shape=(down.shape[0], size, down.shape[2]))})
    changes += [{"down": up}, {"gate_up": up.dequantize()}, {"topk_ids": ids}]
    changes += [{"x": inputs["x"][:, 1:]}, {"down_bias": inputs["down_bias"].double()}]
    return [{**inputs, **change} for change in changes]


def wrong_routers() -> list[dict[str, Any]]:
    bad = torch.full((5, 3), 8)
    return [
        router_case(**changes)
        for changes in (
            {"top_k": 0},
            {"top_k": 9},
            {"top_k": 2.0},
            {"candidates": 6},
            {"candidates": -1},
            {"logits": torch.randn(8)},
            {"logits": torch.ones(5, 8, dtype=torch.int32)},
            {"score_func": "tanh"},
            {"group_score": "mean"},
            {"num_groups": 3},
            {"num_groups": 0},
            {"num_groups": 4, "topk_groups": 5},
            {"num_groups": 4, "topk_groups": 0},
            {"num_groups": 4, "topk_groups": 1},
            {"group_fill": 1.0},
            {"route_scale": float("inf")},
            {"route_scale": float("nan")},
            {"correction_bias": torch.randn(7)},
            {"correction_bias": torch.arange(8)},
            {"token_mask": torch.ones(5)},
            {"token_mask": torch.ones(4, dtype=torch.bool)},
            {"given_ids": bad},
            {"given_ids": bad.float()},
            {"given_ids": bad[:, :2]},
            {"given_ids": bad[:4]},
        )
    ]


@pytest.mark.parametrize(
    ("function", "cases"),
    [
        (moe_kernels.fused_experts, wrong_experts),
        (moe_kernels.fused_experts_quantized, wrong_quantized),
        (moe_kernels.topk_router, wrong_routers),
    ],
)
def test_errors_are_those_of_python(
    function: Callable[..., Any],
    cases: Callable[[], list[dict[str, Any]]],
    without_direct_calls: Callable[[], None],
) -> None:
    wrong = cases()
    with torch.inference_mode():
        found = [_error(function, inputs) for inputs in wrong]
        without_direct_calls()
        assert found == [_error(function, inputs) for inputs in wrong]


def test_shapes_of_quantised_experts_may_be_lists(without_direct_calls: Callable[[], None]) -> None:
    """As one has them from JSON."""
    inputs = quantized_case()
    lists = {
        name: replace(inputs[name], shape=list(inputs[name].shape)) for name in ("gate_up", "down")
    }
    with torch.inference_mode():
        right = moe_kernels.fused_experts_quantized(**inputs)
        assert same(moe_kernels.fused_experts_quantized(**{**inputs, **lists}), right)
        without_direct_calls()
        assert same(moe_kernels.fused_experts_quantized(**{**inputs, **lists}), right)


def test_compiles_whole_in_inference_mode() -> None:
    inputs, router = experts_case(), router_case()

    def layer(**kwargs: Tensor) -> tuple[Tensor, Tensor]:
        return moe_kernels.fused_experts(**kwargs), moe_kernels.topk_router(**router).topk_ids

    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert same(compiled(**inputs), layer(**inputs))


def test_nothing_is_kept() -> None:
    """Neither arguments nor results, with and without a value returned."""
    inputs = experts_case()
    bad = {**inputs, "x": inputs["x"][0]}
    with torch.inference_mode():
        counts = [sys.getrefcount(value) for value in inputs.values()]
        for _ in range(3):
            result, router = _direct(inputs), moe_kernels.topk_router(**router_case())
            assert _direct(bad) is None
            assert sys.getrefcount(result) == 2
            assert all(sys.getrefcount(value) == 2 + 1 for value in router)
        assert [sys.getrefcount(value) for value in inputs.values()] == counts


def test_a_call_holds_its_arguments() -> None:
    """Without the interpreter's lock, another thread may swap what their Python objects hold."""
    inputs = {"x": torch.randn(2048, 512), "gate_up": torch.randn(4, 512, 1024)}
    inputs |= {"down": torch.randn(4, 512, 512), "topk_ids": torch.randint(4, (2048, 2))}
    inputs |= {"topk_weights": torch.rand(2048, 2), "gate_up_bias": None, "down_bias": None}
    most = 1
    for _ in range(20):  # a thread may have ended before it is looked at
        thread = threading.Thread(target=_direct, args=(inputs,))
        thread.start()
        while thread.is_alive():
            most = max(most, inputs["topk_ids"]._use_count())
        if most > 1:
            return
    raise AssertionError("no reference was seen but that of Python")


def test_no_memory_is_the_error_of_python(without_direct_calls: Callable[[], None]) -> None:
    """In a fork, whose memory is limited to less than a router of so many experts needs."""
    logits = torch.zeros(1, 1 << 25)

    def error() -> type | None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (350 << 20), unlimited[1]))
        try:
            moe_kernels.topk_router(logits, 1)
        except Exception as error:
            return type(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        return None

    child = os.fork()
    if child == 0:
        found = error()
        without_direct_calls()
        # of PyTorch's own calls it is a RuntimeError from 2.15 on
        right = found is MemoryError and error() in (MemoryError, RuntimeError)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
