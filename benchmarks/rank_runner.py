"""Runs an op that several processes compute together: what each of them does.

All ranks call every provider in the same order. Before each turn they meet and tell each other what
has failed, so that a provider that fails on one rank is left out on all. A turn takes as long as it
takes the slowest rank.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.accuracy import Accuracy, judge
from benchmarks.memory import PeakMemory
from benchmarks.providers import PROVIDERS
from benchmarks.providers.copy_limit import copy_limit
from benchmarks.registry import (
    DTYPES,
    Case,
    Implementation,
    Op,
    Provider,
    Shape,
    Truth,
    Unsupported,
)
from benchmarks.runner import (
    Contender,
    Row,
    Settings,
    available,
    clear_gradients,
    free,
    make_rows,
    named_results,
    on_large_pages,
)
from benchmarks.timing import MAX_CALLS, MIN_LAP_MS, Samples

COPY_ROUNDS = 5  # of copies before anything is measured; there is one more in each turn
COPY_BYTES = 32 << 20  # of a round, at least

# Milliseconds of each stage of a call, on average over calls on successive sets of inputs, from the
# number of the first set and the number of calls.
Loop = Callable[[int, int], list[float]]


def run_rank(op: Op, settings: Settings) -> Iterator[list[Row]]:
    """Measure ``op`` with the other ranks of the default group; rows by shape, equal on all."""
    device, ranks = settings.device, dist.get_world_size()
    usable = [n for n, why in available(op, device.type, settings.providers).items() if not why]
    # Where a provider fails on one rank alone, the others wait for it until its group's time is up.
    patience = timedelta(seconds=settings.timeout)
    groups = {name: dist.new_group(timeout=patience) for name in usable}
    control: Any = dist.new_group(backend="gloo", timeout=3 * patience)
    directions = settings.directions or op.directions[device.type]
    modes = {
        False: [d for d in directions if d == "forward"],
        True: [d for d in directions if d != "forward"],
    }
    for dtype in settings.dtypes or op.dtypes[device.type]:
        for base in op.shapes(device.type, settings.shapes):
            shape = Shape({**base.sizes, "P": ranks})
            for routing in settings.routings(op, shape):
                key = (str(shape), dtype, routing)
                if all((key, direction) in settings.done for direction in directions):
                    continue
                case = op.make_case(shape, DTYPES[dtype], device, routing, settings.seed)
                if settings.large_pages:
                    case = on_large_pages(case)
                cost = op.cost(case)
                # about what is copied at a time
                copying = Copying(control, case, int(cost["forward"].bytes / 4))
                common: Row = {"op": op.name, "shape": str(shape), "sizes": dict(shape.sizes)}
                common |= {"dtype": dtype, "routing": routing, "ranks": ranks}
                common |= {"threads": torch.get_num_threads()}
                common |= op.details(case)
                rows: list[Row] = []
                for training, asked in modes.items():
                    wanted = [d for d in asked if (key, d) not in settings.done]
                    if not wanted:
                        continue
                    contenders = _compete(op, case, groups, control, settings, training, copying)
                    for direction in wanted:
                        rows += make_rows(common, direction, contenders, cost, None)
                yield _with_floors(rows, copying.bandwidth)
                del case, copying
                free(device)


def _with_floors(rows: Sequence[Row], bandwidth: float | None) -> list[Row]:
    """The rows with their floor: their bytes at the fastest that the ranks were seen to copy at."""
    seen = [
        1e3 * row["bytes"] / row["ms_min"]
        for row in rows
        if row["provider"] == copy_limit.name and row["ms_min"]
    ]
    best = max([bandwidth or 0.0, *seen])
    full = []
    for row in rows:
        floor = 1e3 * row["bytes"] / best if best else None
        over = row["ms"] / floor if row["ms"] and floor else None
        full.append({**row, "copy_bandwidth": best or None, "floor_ms": floor, "over_floor": over})
    return full


class Copying:
    """Copies by all ranks at once, of ``size`` bytes, in turns with what is measured.

    As many pairs of buffers as the case has inputs: caches hold what they would of the op.

    Attributes:
        bandwidth: bytes read and written a second and rank, the best of all rounds; None where
            there is nothing to copy.
    """

    def __init__(self, control: Any, case: Case, size: int) -> None:
        self._control, self._device = control, case.device
        self._pairs = [
            [torch.ones(size, dtype=torch.uint8, device=case.device) for _ in range(2)]
            for _ in case.inputs[: len(case.inputs) if size else 0]
        ]
        self.bandwidth: float | None = None
        for _ in range(COPY_ROUNDS if size else 0):
            self.round()

    def round(self) -> None:
        if not self._pairs:
            return
        size = self._pairs[0][0].nbytes
        calls = max(len(self._pairs), min(100, COPY_BYTES // size))
        dist.barrier(self._control)
        start = time.perf_counter()
        for number in range(calls):
            source, target = self._pairs[number % len(self._pairs)]
            target.copy_(source)
        _synchronize(self._device)
        slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._control)
        self.bandwidth = max(self.bandwidth or 0.0, 2 * size * calls / float(slowest))


def _compete(
    op: Op,
    case: Case,
    groups: Mapping[str, Any],
    control: Any,
    settings: Settings,
    training: bool,
    copying: Copying,
) -> dict[str, Contender]:
    """Check every provider on all ranks, then time those that work in turns."""
    yardstick = _yardstick(op, case, training)
    contenders: dict[str, Contender] = {}
    loops: dict[str, Loop] = {}
    for name, group in groups.items():
        own = dataclasses.replace(case, group=group)
        contender, loop = _try(op, PROVIDERS[name], own, training)
        contenders[name] = _agreed(contender, yardstick, control)
        if loop is not None and not contenders[name].note:
            loops[name] = loop
    _take_turns(contenders, loops, control, settings, copying)
    clear_gradients(case)
    return contenders


def _yardstick(op: Op, case: Case, training: bool) -> Accuracy | None:
    if op.yardstick is None:
        return None
    return _check(op, case, op.yardstick(case), training)


def _check(op: Op, case: Case, implementation: Implementation, training: bool) -> Accuracy:
    """Results on all inputs, with the case's further ones, against float64.

    Taken together: a single token has too few values for its error to mean anything.
    """
    found: list[dict[str, Tensor]] = []
    truths: list[Mapping[str, Truth]] = []
    clear_gradients(case)
    for index, inputs in enumerate(case.inputs):
        checked = {**inputs, **case.check}
        with torch.inference_mode(not training):
            outputs = implementation.run(checked)
        if training:
            implementation.backward(outputs, checked)
        only = dataclasses.replace(case, inputs=[inputs])
        found.append(named_results(op, only, implementation, outputs, training))
        truths.append(op.truth(case, index, training))
    accuracy = judge(
        {name: torch.cat([results[name].detach() for results in found]) for name in truths[0]},
        {name: _together([t[name] for t in truths], found, name) for name in truths[0]},
    )
    clear_gradients(case)
    return accuracy


def _together(truths: Sequence[Truth], found: Sequence[Mapping[str, Tensor]], name: str) -> Truth:
    """The truth of results that follow each other."""
    ends = list(accumulate(len(results[name]) for results in found))
    rows = [truth.rows + start for truth, start in zip(truths, [0, *ends], strict=False)]
    independent = sum(truth.independent or truth.values.numel() for truth in truths)
    return Truth(torch.cat(rows), torch.cat([truth.values for truth in truths]), independent)


def _try(op: Op, provider: Provider, case: Case, training: bool) -> tuple[Contender, Loop | None]:
    """Accuracy, warm-up and peak memory of a provider on this rank."""
    contender, loop = Contender(), None
    try:
        implementation = provider.builders[op.name](case)
        if not provider.limit:
            contender.accuracy = _check(op, case, implementation, training)
        loop = _loop(case, implementation, training)
        for _ in range(2):
            with PeakMemory(case.device) as memory:
                loop(0, 1)
            if memory.bytes is not None:
                contender.peak_bytes = max(contender.peak_bytes or 0, memory.bytes)
        for _ in range(2):  # every set, the first time for what is made when first needed
            contender.first = loop(0, len(case.inputs))
    except Unsupported as reason:
        contender.note, contender.unsupported = str(reason), True
    except Exception as error:  # another project's failure is a row of the table, not the end of it
        contender.note = _first_line(error)
    return contender, loop


def _loop(case: Case, implementation: Implementation, training: bool) -> Loop:
    def forward(first: int, calls: int) -> list[float]:
        with torch.inference_mode():
            start = time.perf_counter()
            for number in range(first, first + calls):
                implementation.run(case.inputs[number % len(case.inputs)])
            _synchronize(case.device)
            return [1e3 * (time.perf_counter() - start) / calls]

    def forward_backward(first: int, calls: int) -> list[float]:
        start = time.perf_counter()
        backward = 0.0
        for number in range(first, first + calls):
            index = number % len(case.inputs)
            for leaf in case.leaves(index).values():
                leaf.grad = None
            outputs = implementation.run(case.inputs[index])
            _synchronize(case.device)
            middle = time.perf_counter()
            implementation.backward(outputs, case.inputs[index])
            _synchronize(case.device)
            backward += time.perf_counter() - middle
            del outputs
        whole = time.perf_counter() - start
        return [1e3 * (whole - backward) / calls, 1e3 * backward / calls]

    return forward_backward if training else forward


def _agreed(contender: Contender, yardstick: Accuracy | None, control: Any) -> Contender:
    """What is wrong on any rank is wrong; the largest of errors and times counts."""
    verdict = contender.accuracy.verdict(yardstick)
    mine = (contender.note, contender.unsupported, verdict, contender.accuracy.errors)
    everyone: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(everyone, (*mine, contender.first, contender.peak_bytes), group=control)
    notes, unsupported, verdicts, errors, firsts, peaks = zip(*everyone, strict=True)
    together = Contender(
        note=_named(notes),
        unsupported=all(unsupported),
        accuracy=Accuracy(wrong=_named(verdicts)),
    )
    for of_rank in errors:
        for name, error in of_rank.items():
            known = together.accuracy.errors.get(name, 0.0)
            # a NaN, which no comparison finds larger, stays
            together.accuracy.errors[name] = error if not error <= known else known
    if not together.note:
        together.first = [max(laps) for laps in zip(*firsts, strict=True)]
        together.peak_bytes = max((peak for peak in peaks if peak is not None), default=None)
    return together


def _named(texts: Sequence[str]) -> str:
    """What the ranks say as one text: each with its rank, unless all say the same."""
    if all(text == texts[0] for text in texts):
        return texts[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


def _take_turns(
    contenders: Mapping[str, Contender],
    loops: Mapping[str, Loop],
    control: Any,
    settings: Settings,
    copying: Copying,
) -> None:
    """Fill in the samples: of each turn and stage the slowest rank's time."""
    names = list(loops)
    repeats = {
        name: max(1, min(MAX_CALLS, math.ceil(MIN_LAP_MS / max(sum(contenders[name].first), 1e-3))))
        for name in names
    }
    taken: dict[str, list[list[float]]] = {name: [] for name in names}
    errors = dict.fromkeys(names, "")
    failed = dict.fromkeys(names, False)
    order = list(names)
    start = time.perf_counter()
    for turn in range(settings.max_rounds):
        late = turn >= 3 and time.perf_counter() - start > settings.seconds
        for name in order:
            late, failed = _meet(control, late, errors)
            if late:
                break
            if failed[name]:
                continue
            try:
                loops[name](turn - 1, 1)  # so that the next finds the memory that this one freed
                taken[name].append(loops[name](turn, repeats[name]))
            except Exception as error:
                errors[name] = _first_line(error)
        if late or not order:
            break
        copying.round()
        order = order[1:] + order[:1]  # nobody always follows the same neighbour
    _, failed = _meet(control, False, errors)
    for name in names:
        if failed[name]:
            everyone: list[Any] = [None] * dist.get_world_size(control)
            dist.all_gather_object(everyone, errors[name], group=control)
            contenders[name].note = _named(everyone)
            continue
        if not taken[name]:
            continue
        slowest = torch.tensor(taken[name], dtype=torch.float64)
        totals = slowest.sum(1, keepdim=True)
        both = torch.cat([totals, slowest[:, 1:]], dim=1)  # the whole call, and its backward
        dist.all_reduce(both, dist.ReduceOp.MAX, group=control)
        stages = [(both[:, 0] - both[:, 1:].sum(1)).tolist(), *both[:, 1:].T.tolist()]
        contenders[name].samples = Samples(stages)


def _meet(control: Any, late: bool, errors: Mapping[str, str]) -> tuple[bool, dict[str, bool]]:
    """A barrier: whether the first rank's time is up, and what has failed on any rank."""
    mine = [late and dist.get_rank(control) == 0, *map(bool, errors.values())]
    flags = torch.tensor(mine, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=control)
    is_late, *failures = map(bool, flags.tolist())
    return is_late, dict(zip(errors, failures, strict=True))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
