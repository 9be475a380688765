"""Runs one op: every shape, dtype and direction, all providers in turns."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import ABSOLUTE, Accuracy, judge
from benchmarks.limits import Limits, measure_limits
from benchmarks.memory import PeakMemory
from benchmarks.providers import PROVIDERS
from benchmarks.registry import (
    DTYPES,
    Case,
    Cost,
    Implementation,
    Op,
    Output,
    Provider,
    Shape,
    Truth,
    Unsupported,
)
from benchmarks.timing import Call, Clock, Samples, make_clock, take_turns
from moe_kernels import use_large_pages

Row = dict[str, Any]
NOTHING = {"forward": Cost(0.0, 0.0), "backward": Cost(0.0, 0.0)}
SLOW_MS = 10000.0  # a first call on a CPU longer than this is not repeated just to be warm
CaseKey = tuple[str, str, str]  # shape, dtype, routing
Done = frozenset[tuple[CaseKey, str]]  # cases and directions


class DeviceLostError(RuntimeError):
    """A provider left the device in a state in which nothing can run in this process any more."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a CPU PyTorch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def unwatched(case: CaseKey, provider: str | None) -> None:
    """Nobody wants to know what is tried."""


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        shapes: by set name or sizes; none means the op's default sets.
        dtypes, directions: none means the op's defaults.
        providers: by name; none means all that can run.
        only_routings: none means those of the op for each shape.
        seconds: of timing for each shape, dtype and mode (inference or training).
        max_rounds: of timing at most.
        large_pages: whether weights in CPU memory lie on large pages.
        threads: of PyTorch in each process of an op on ranks; none means that they share the cores.
        timeout: seconds that a rank waits for the others in an exchange.
        done: cases and directions that are not computed again.
        crashed: why providers are not tried, since they ended the process before.
        watch: is told which provider is tried on which case, and None when it is over.
    """

    device: torch.device
    shapes: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    directions: Sequence[str] = ()
    providers: Sequence[str] = ()
    only_routings: Sequence[str] = ()
    seconds: float = 20.0
    max_rounds: int = 50
    seed: int = 0
    large_pages: bool = False
    threads: int | None = None
    timeout: float = 120.0
    done: Done = frozenset()
    crashed: Mapping[str, str] = field(default_factory=dict)
    watch: Callable[[CaseKey, str | None], None] = unwatched

    def routings(self, op: Op, shape: Shape) -> tuple[str, ...]:
        return tuple(self.only_routings if op.routed else ()) or op.routings(shape)


@dataclass
class Contender:
    """One provider on one case: what it said when tried, and then its times."""

    call: Call | None = None
    during: Callable[[], AbstractContextManager[object]] = nullcontext
    note: str = ""
    unsupported: bool = False  # the note says that it does not compute such a case
    accuracy: Accuracy = field(default_factory=Accuracy)
    first: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    samples: Samples = field(default_factory=Samples)


def available(op: Op, device: str, wanted: Sequence[str] = ()) -> dict[str, str]:
    """Of the providers of ``op`` (those ``wanted``, or all) why each cannot run, or ""."""
    names = [
        n
        for n, p in PROVIDERS.items()
        if op.name in p.builders and (n in wanted or not (wanted or p.by_name))
    ]
    return {name: PROVIDERS[name].unavailable(device) for name in names}


def run_op(op: Op, settings: Settings) -> Iterator[tuple[list[Row], str, Limits]]:
    """Measure ``op``: for each dtype, shape and mode rows, the dtype, and the machine's limits.

    A mode's rows come before the next mode is begun, which may take the process with it.
    """
    device = settings.device
    clock = make_clock(device)
    usable = [n for n, why in available(op, device.type, settings.providers).items() if not why]
    directions = settings.directions or op.directions[device.type]
    for dtype in settings.dtypes or op.dtypes[device.type]:
        shapes = op.shapes(device.type, settings.shapes)
        for shape, routing in [(s, r) for s in shapes for r in settings.routings(op, s)]:
            key = (str(shape), dtype, routing)
            left = [d for d in directions if (key, d) not in settings.done]
            if not left:
                continue
            limits = measure_limits(clock, device, DTYPES[dtype])
            free(device)  # gigabytes, which processes beside this one may need
            common = {"op": op.name, "shape": str(shape), "sizes": dict(shape.sizes)}
            common |= {"dtype": dtype, "routing": routing}
            rows: list[Row] = []
            try:
                case = op.make_case(shape, DTYPES[dtype], device, routing, settings.seed)
                if settings.large_pages:
                    case = on_large_pages(case)
                case = replace(case, product=limits.product)
                cost = op.cost(case)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # a smaller GPU: other shapes go on
                note = f"its inputs do not fit: {error}".split("\n")[0]
                nobody = {name: Contender(note=note) for name in usable}
                for direction in left:
                    rows += make_rows(common, direction, nobody, NOTHING, None)
                yield rows, dtype, limits
                free(device)
                continue
            for training in (False, True):
                wanted = [d for d in left if (d != "forward") is training]
                if not wanted or (training and not case.differentiable):
                    continue
                rows = []
                contenders = _compete(op, case, clock, settings, usable, training, key)
                yardstick = contenders[op.plain].accuracy if op.plain in contenders else None
                bound = ABSOLUTE[DTYPES[dtype]] if op.bound is None else op.bound
                for direction in wanted:
                    rows += make_rows(common, direction, contenders, cost, yardstick, bound)
                del contenders, yardstick  # with what they hold of the memory
                free(device)
                yield rows, dtype, limits
            del case
            free(device)


def on_large_pages(case: Case) -> Case:
    for weight in case.weights.values():
        use_large_pages(weight)
    return replace(case, large_pages=True)


def _compete(
    op: Op,
    case: Case,
    clock: Clock,
    settings: Settings,
    names: Sequence[str],
    training: bool,
    key: CaseKey,
) -> dict[str, Contender]:
    """Try every provider once, then time those that work in turns."""
    try:
        truth = op.truth(case, 0, training)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        note = f"the right answer does not fit: {error}".split("\n")[0]
        return {name: Contender(note=note) for name in names}
    contenders = {}
    for name in names:
        if name in settings.crashed:
            contenders[name] = Contender(note=settings.crashed[name])
            continue
        settings.watch(key, name)
        contenders[name] = _try(op, PROVIDERS[name], case, clock, truth, training)
    del truth

    def turn(name: str) -> AbstractContextManager[object]:
        settings.watch(key, name)
        return contenders[name].during()

    calls = {name: contender.call for name, contender in contenders.items() if contender.call}
    samples = take_turns(
        clock,
        calls,
        {name: contenders[name].first for name in calls},
        seconds=settings.seconds,
        max_rounds=settings.max_rounds,
        turn=turn,
        failed=lambda name: check_device(case.device, name),
    )
    settings.watch(key, None)
    for name, taken in samples.items():
        contenders[name].samples = taken
        contenders[name].note = f"does not run: {taken.failure}" if taken.failure else ""
    clear_gradients(case)
    return contenders


def _try(
    op: Op,
    provider: Provider,
    case: Case,
    clock: Clock,
    truth: Mapping[str, Truth],
    training: bool,
) -> Contender:
    """Build and call a provider on the first inputs: warm-up, accuracy and peak memory."""
    contender = Contender()
    try:
        implementation = provider.builders[op.name](case)
        call = timed_call(case, implementation, training)
        with implementation.during():
            for _ in range(2):
                with PeakMemory(case.device) as memory:
                    outputs = call(clock, 0)
                contender.first = clock.laps()
                if case.device.type == "cuda":  # the first compiles and tunes, and is no measure
                    contender.peak_bytes = memory.bytes
                    continue
                if memory.bytes is not None:
                    contender.peak_bytes = max(contender.peak_bytes or 0, memory.bytes)
                if sum(contender.first) > SLOW_MS:
                    break
        if not provider.limit:
            found = named_results(op, case, implementation, outputs, training)
            contender.accuracy = judge(found, truth)
        contender.call, contender.during = call, implementation.during
    except Unsupported as reason:
        contender.note, contender.unsupported = str(reason), True
        clock.reset()
    except Exception as error:  # another project's failure is a row of the table, not the end of it
        contender.note = f"does not run: {type(error).__name__}: {error}".split("\n")[0]
        clock.reset()
        check_device(case.device, provider.name)
        free(case.device)
    clear_gradients(case)
    return contender


def timed_call(
    case: Case, implementation: Implementation, training: bool
) -> Callable[[Clock, int], Output]:
    def forward(clock: Clock, number: int) -> Output:
        inputs = case.inputs[number % len(case.inputs)]
        with torch.inference_mode():
            clock.mark()
            outputs = implementation.run(inputs)
            clock.mark()
        return outputs

    def forward_backward(clock: Clock, number: int) -> Output:
        clear_gradients(case, implementation)
        inputs = case.inputs[number % len(case.inputs)]
        clock.mark()
        outputs = implementation.run(inputs)
        clock.mark()
        implementation.backward(outputs, inputs)
        clock.mark()
        return outputs

    return forward_backward if training else forward


def named_results(
    op: Op, case: Case, implementation: Implementation, outputs: Output, training: bool
) -> dict[str, Tensor]:
    several = (outputs,) if isinstance(outputs, Tensor) else outputs
    results = dict(zip(op.outputs, several, strict=True))
    if not training:
        return results
    for name, leaf in case.leaves(0).items():
        own, convert = implementation.own_weights.get(name, ((leaf,), None))
        grads = [tensor.grad for tensor in own if tensor.grad is not None]
        if len(grads) < len(own):
            raise RuntimeError(f"no gradient of {name}")
        results[name] = convert(*grads) if convert else grads[0]
    return results


def clear_gradients(case: Case, implementation: Implementation | None = None) -> None:
    leaves = [leaf for i in range(len(case.inputs)) for leaf in case.leaves(i).values()]
    for own, _ in implementation.own_weights.values() if implementation else ():
        leaves += own
    for leaf in leaves:
        leaf.grad = None


def check_device(device: torch.device, provider: str) -> None:
    """Raise DeviceLostError if the device does not work any more, after a failure of a provider."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        text = str(error).split("\n")[0]
        raise DeviceLostError(f"{provider} left the GPU unusable: {text}") from error


def make_rows(
    common: Row,
    direction: str,
    contenders: Mapping[str, Contender],
    cost: Mapping[str, Cost],
    yardstick: Accuracy | None,
    bound: float = math.inf,
) -> list[Row]:
    """One row a provider. A wrong result leaves a row without a time.

    ``bound``: on the error, where there is no yardstick.
    """
    parts = direction.split("+")
    work = sum((cost[part] for part in parts), Cost(0.0, 0.0))
    rows = []
    for name, contender in contenders.items():
        times = contender.samples.of(direction) if contender.samples.stages else []
        void = contender.accuracy.verdict(yardstick, bound)
        counted = bool(times) and not void
        ms = statistics.median(times) if counted else None
        rows.append(
            {
                **common,
                "direction": direction,
                "provider": name,
                "ms": ms,
                "ms_min": min(times) if counted else None,
                "rounds": len(times),
                "tflops": work.flops / ms / 1e9 if ms and work.flops else None,
                "gbs": work.bytes / ms / 1e6 if ms else None,
                "flops": work.flops,
                "bytes": work.bytes,
                "peak_bytes": contender.peak_bytes,
                "error": contender.accuracy.error if contender.accuracy.errors else None,
                "void": void,
                "note": contender.note,
                "unsupported": contender.unsupported,
            }
        )
    return rows


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
