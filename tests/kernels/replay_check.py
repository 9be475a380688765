"""Whether repeated calls launch what decided ones do, where nothing is launched.

A launch is noted as its kernel, grid and arguments. Of an address only is noted which memory it
lies in, of all that the calls had, in the order in which launches first use it, and how far into
it. So two runs of the same calls are noted alike if their launches do the same to their own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.compile_only import SilentDriver
from benchmarks.launches import watched
from moe_kernels.triton import _replay

MAKERS = ("new_empty", "new_empty_strided", "new_zeros")
OTHER_MAKERS = ("empty", "empty_like", "zeros", "empty_strided")


class Notes:
    """Keeps all memory, so that no address is used twice, and names addresses."""

    def __init__(self, apart: bool) -> None:
        self.apart = apart
        self.kept: list[Tensor] = []
        self.names: dict[int, int] = {}
        self.launches: list[Any] = []

    def keeping(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            self.kept.append(made)
            return made

        return call

    def name(self, value: Any) -> Any:
        """Of a tensor or an address."""
        address = value.data_ptr() if hasattr(value, "data_ptr") else value
        if not address:
            return None
        if isinstance(value, Tensor):
            self.kept.append(value)  # perhaps a copy that a decided call made
        for tensor in self.kept:
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                first = storage.data_ptr() if self.apart else address
                return self.names.setdefault(first, len(self.names)), address - first
        raise AssertionError(f"{value} lies in no memory that is known")

    def launched(self, name: str, types: list[Any], grid: Any, args: tuple[Any, ...]) -> None:
        noted: list[Any] = []
        for kind, value in zip(types, args, strict=True):
            if kind == "constexpr":
                noted.append(None)
            elif kind.startswith("*"):
                noted.append(self.name(value))
            elif kind.startswith("tensordesc"):
                layout = vars(value) | {"base": None}
                noted.append((self.name(value.base), sorted(layout.items(), key=str)))
            else:
                noted.append(value)
        self.launches.append((name, tuple(grid), noted))


@contextmanager
def noting(apart: bool) -> Iterator[Notes]:
    notes = Notes(apart)
    import triton

    with ExitStack() as stack:
        for owner, names in ((Tensor, MAKERS), (torch, OTHER_MAKERS)):
            for name in names:
                keeping = notes.keeping(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, keeping))
        triton.runtime.driver.set_active(SilentDriver(90, notes.launched))
        yield notes


def frees_in_time(plan: Any, inputs: int) -> bool:
    """Whether memory that is allocated, and not returned, is freed after its last use."""
    launches = [step for step in plan.steps if isinstance(step, _replay.Step)]
    used = [{item[1] for item in (*step.pointers, *step.descriptors)} for step in launches]
    outputs = plan.outputs if isinstance(plan.outputs, list) else [plan.outputs]
    for number in set().union(*used):
        last = max(i for i, numbers in enumerate(used) if number in numbers)
        freed = [i for i, step in enumerate(launches) if number in step.last]
        if freed != ([] if number < inputs or number in outputs else [last]):
            return False
    return True


def layout(result: Any) -> list[Any]:
    tensors = [result] if isinstance(result, Tensor) else list(result or ())
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def check(calls: Callable[[], Any], *, apart: bool) -> dict[str, Any]:
    """Run the calls until they are repeated, and compare.

    Args:
        calls: of four runs, which must make the same calls.
        apart: small memory is not allocated together. Else it does not tell which memory an address
            lies in, and each has a name of its own.

    Returns:
        how many "launches" there were, the first one that is "different", if any, and of the calls
        of ops the number that were "repeated" in the last run, and that were not ("decided").
    """
    counts = {"repeated": 0, "decided": 0}
    follow, read = _replay._follow, _replay._read
    runs: list[Any] = []

    layouts: dict[int, Any] = {}
    make_plan = _replay._Recorder.plan
    wrong: list[str] = []

    def planned(recorder: Any, result: Any) -> Any:
        plan = make_plan(recorder, result)
        layouts[id(plan)] = plan, layout(result)
        if plan is not None and not frees_in_time(plan, recorder.inputs):
            wrong.append(f"memory is freed too early or never: {plan}")
        return plan

    def followed(plan: Any, *args: Any) -> Any:
        counts["repeated"] += 1
        result = follow(plan, *args)
        if layout(result) != layouts[id(plan)][1]:
            wrong.append(f"returned {layout(result)} instead of {layouts[id(plan)][1]}")
        return result

    def reading(args: Any) -> Any:
        counts["decided"] += 1
        found = read(args)
        notes.kept += found[0]
        return found

    with watched(90, watch=False), ExitStack() as stack:
        stack.enter_context(mock.patch.object(_replay, "_follow", followed))
        stack.enter_context(mock.patch.object(_replay._Recorder, "plan", planned))
        stack.enter_context(mock.patch.object(_replay, "_read", reading))
        if apart:
            stack.enter_context(mock.patch.object(_replay, "SMALL", -1))
        for _ in range(4):
            counts.update(repeated=0, decided=0)
            with noting(apart) as notes:
                calls()
            runs.append(notes.launches)
    different = wrong[0] if wrong else None
    for run in runs[1:]:
        if len(run) != len(runs[0]):
            different = f"{len(run)} launches instead of {len(runs[0])}"
        for first, later in zip(runs[0], run, strict=False):
            if first != later and different is None:
                different = f"{later} instead of {first}"
    return {
        "launches": len(runs[0]),
        "different": different,
        "repeated": counts["repeated"],
        "decided": counts["decided"] - counts["repeated"],
    }


def scenarios() -> dict[str, dict[str, Any]]:
    """What :func:`check` finds of calls that may or may not be repeated."""
    import triton

    import moe_kernels

    bf16 = torch.bfloat16

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=bf16)

    def experts() -> None:
        ids = torch.zeros(3, 2, dtype=torch.int32)
        with torch.no_grad():
            moe_kernels.fused_experts(
                empty(3, 64), empty(4, 64, 64), empty(4, 32, 64), ids, torch.empty(3, 2)
            )

    def gemm(a: Tensor, b: Tensor) -> None:
        moe_kernels.grouped_gemm(a, b, torch.empty(5, dtype=torch.int32))

    def overlapping() -> None:
        memory = empty(16 * 64 + 4 * 64 * 32)
        gemm(memory[: 16 * 64].view(16, 64), memory[64 : 64 + 4 * 64 * 32].view(4, 64, 32))

    def adjacent() -> None:
        memory = empty(16 * 64 + 4 * 64 * 32)
        gemm(memory[: 16 * 64].view(16, 64), memory[16 * 64 :].view(4, 64, 32))

    def zeroed() -> None:
        moe_kernels.grouped_gemm(empty(16, 64), empty(0, 64, 32), torch.zeros(1, dtype=torch.int32))

    def copied() -> None:
        given = torch.zeros(2, 3, dtype=torch.int32).t()
        moe_kernels.topk_router(torch.empty(3, 8), 2, given_ids=given)

    def hooked() -> None:
        def hook(metadata: Any) -> None:
            pass

        triton.knobs.runtime.launch_enter_hook.add(hook)
        try:
            experts()
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(hook)

    runs = {"checked": 0, "tf32": 0}

    def checked() -> None:
        runs["checked"] += 1
        asked = {"MOE_KERNELS_CHECK": str(int(runs["checked"] > 3))}
        # the checked values are arbitrary, as nothing has run
        with mock.patch.dict("os.environ", asked), suppress(ValueError):
            experts()

    def tf32() -> None:
        runs["tf32"] += 1
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if runs["tf32"] > 3 else "ieee"
        try:
            moe_kernels.grouped_gemm(
                torch.empty(16, 64), torch.empty(4, 64, 32), torch.empty(5, dtype=torch.int32)
            )
        finally:
            matmul.fp32_precision = before

    def unaligned() -> None:
        gemm(empty(16 * 64 + 1)[1:].view(16, 64), empty(4, 64, 32))
        gemm(empty(16, 64), empty(4, 64, 32))

    calls = (experts, overlapping, adjacent, zeroed, copied, hooked, checked, tf32, unaligned)
    return {call.__name__: check(call, apart=True) for call in calls}
