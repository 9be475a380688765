"""``python -m benchmarks launches``: what a layer asks of the host, without a GPU.

The Triton launchers run on CPU tensors under a driver that compiles and launches nothing. Counted
are the kernels that would be launched, Triton's and PyTorch's, and the time in Python of calls that
are repeated (``moe_kernels/triton/_replay.py``), which holds neither the driver's part nor the
allocator's on CUDA. A read of a device value by the host, which would wait for the GPU, is an
error.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.architectures import ARCHITECTURES

# what makes the host wait for a value of the device, or for a copy
READS = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "allclose"),
    *("unique_dim", "_unique2", "unique_consecutive", "repeat_interleave", "bincount"),
    *("lift_fresh", "_assert_async"),
)
READ_METHODS = ("tolist", "numpy", "__array__", "cpu")
# what launches nothing
FREE = (
    *("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "view", "detach"),
    *("as_strided", "slice", "select", "transpose", "permute", "expand", "alias", "t", "unsqueeze"),
    *("_unsafe_view", "_reshape_alias", "reshape", "squeeze", "split", "unbind", "narrow"),
    *("mT", "T", "unflatten", "movedim", "flatten", "diagonal", "chunk"),
)


class HostReadError(AssertionError):
    """The host would have waited for the device."""


class _Watch(TorchDispatchMode):
    """Notes PyTorch's kernels; raises where the host reads."""

    def __init__(self, launches: list[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten":
            masks = name == "index" and any(
                isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
            )
            if name in READS or masks:
                raise HostReadError(f"aten::{name} waits for the device")
            if name not in FREE:
                self.launches.append(f"aten::{name}")
        return func(*args, **(kwargs or {}))


def launcher_ops() -> list[str]:
    """The package's ops that have a Triton launcher."""
    from moe_kernels.ops._library import NAMESPACE

    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{NAMESPACE}::")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = [name.split("::")[1] for name in names if has_kernel(name, "CUDA")]
    return [op for op in ops if not op.startswith(("dispatch", "combine"))]  # between ranks


def _refuse(name: str) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise HostReadError(f"Tensor.{name} waits for the device")

    return refused


@contextmanager
def watched(arch: int, *, watch: bool = True) -> Iterator[list[str]]:
    """While open, the package's ops on CPU tensors go to the Triton launchers, and nothing runs.

    Yields the names of all kernels that would have been launched; without ``watch``, which takes
    time, of Triton's only, and reads by the host pass. Only then are calls repeated, as on a GPU.
    """
    import moe_kernels  # noqa: F401  registers the ops
    from benchmarks.compile_only import SilentDriver, compile_only
    from moe_kernels.ops._library import NAMESPACE, triton_op
    from moe_kernels.triton import _replay

    launches: list[str] = []

    def launcher(op: str) -> Callable[..., Any]:
        launch = triton_op(op).__call__
        if not watch:
            return launch

        def call(*args: Any, **kwargs: Any) -> Any:
            with _Watch(launches):  # a mode does not see into the ops that it sees
                return launch(*args, **kwargs)

        return call

    library = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is the purpose
        for op in launcher_ops():
            library.impl(op, launcher(op), "CPU", allow_override=True)
    try:
        with ExitStack() as stack:
            for op in launcher_ops():  # plans are of what is launched within
                stack.enter_context(mock.patch.object(triton_op(op), "_launcher", None))
            if not watch:
                driver = SilentDriver(arch, lambda name, *rest: launches.append(name))
                triton.runtime.driver.set_active(driver)
                stack.enter_context(mock.patch.object(_replay, "is_repeated", return_value=True))
            else:
                stack.enter_context(compile_only(arch, launches))
                for name in READ_METHODS:
                    stack.enter_context(mock.patch.object(Tensor, name, _refuse(name)))
                stack.enter_context(_Watch(launches))
            yield launches
    finally:
        library._destroy()


@dataclass
class Step:
    """Of one step of a layer.

    Attributes:
        launches: the kernels in order.
        microseconds: of this thread, in Python: the median of some calls.
    """

    name: str
    launches: list[str] = field(default_factory=list)
    microseconds: float = 0.0

    def __str__(self) -> str:
        kernels = ", ".join(
            f"{count} x {name}" if count > 1 else name
            for name, count in Counter(self.launches).items()
        )
        return (
            f"{self.name}: {len(self.launches)} launches, {self.microseconds:.0f} us in Python "
            f"({self.microseconds / max(1, len(self.launches)):.0f} a launch): {kernels}"
        )


def layer_steps(
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    *,
    arch: int = 90,
    biased: bool = False,
    calls: int = 30,
) -> list[Step]:
    """Router and experts of one layer in bf16: inference, then the two halves of training."""
    import moe_kernels

    def leaf(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16).requires_grad_()

    x, logits = leaf(tokens, hidden), torch.empty(tokens, experts).requires_grad_()
    gate_up, down = leaf(experts, 2 * inner, hidden), leaf(experts, hidden, inner)
    biases: dict[str, Any] = {}
    if biased:
        biases["gate_up_bias"] = leaf(experts, 2 * inner)
        biases["down_bias"] = leaf(experts, hidden)
    grad = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    leaves = [x, logits, gate_up, down, *biases.values()]

    def route() -> Any:
        return moe_kernels.topk_router(logits, top_k, renormalize=True)

    def layer(routed: Any) -> Tensor:
        return moe_kernels.fused_experts(
            x, gate_up.mT, down.mT, routed.topk_ids, routed.topk_weights, **biases
        )

    steps = {name: Step(name) for name in ("router", "experts", "forward", "backward")}
    times: dict[str, list[float]] = {name: [] for name in steps}

    def once(launches: list[str]) -> None:
        def step(name: str, call: Callable[[], Any]) -> Any:
            launches.clear()
            start = time.thread_time()
            found = call()
            times[name].append(1e6 * (time.thread_time() - start))
            steps[name].launches = list(launches)
            return found

        with torch.inference_mode():
            routed = step("router", route)
            step("experts", lambda: layer(routed))
        y = step("forward", lambda: layer(route()))
        step("backward", lambda: torch.autograd.grad(y, leaves, grad))

    with watched(arch, watch=False) as launches:
        for call in range(calls + 3):
            if call == 3:  # all is compiled and noted
                times = {name: [] for name in steps}
            once(launches)
    for name, step in steps.items():
        step.microseconds = statistics.median(times[name])
    with watched(arch) as launches:
        once(launches)
    return list(steps.values())


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "launches", help="kernels that a layer launches, counted without a GPU"
    )
    parser.add_argument("--shape", default="T=1", help="sizes such as T=16,E=64")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90, help="default 90")
    parser.add_argument("--biased", action="store_true", help="experts with biases")
    parser.set_defaults(command=launches_command)


def launches_command(options: argparse.Namespace) -> int:
    from benchmarks.ops._shapes import LAYERS, layer

    shape = layer(1, *LAYERS["qwen3-30b-a3b"]).replace(options.shape)
    sizes = [shape[letter] for letter in "THIEK"]
    print(f"{shape}, sm_{options.arch}, bf16; nothing was launched")
    for step in layer_steps(*sizes, arch=options.arch, biased=options.biased):
        print(step)
    return 0
