"""Clocks for CPU and CUDA, and rounds in which implementations take turns.

Other work on a machine slows whole stretches of time. Taking turns spreads such a stretch over all
implementations, so that their ratios hold although their times do not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch

MIN_LAP_MS = 5.0  # a CPU measurement of less than this is repeated and averaged
MAX_CALLS = 200
FLUSH_BYTES = 512 << 20  # more than the L2 cache of any GPU


class CpuClock:
    """Marks in time on the host."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def prepare(self) -> None:
        """Nothing to do: rotating inputs keep the caches cold."""

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def reset(self) -> None:
        self._marks = []

    def laps(self) -> list[float]:
        """Milliseconds between marks since the last call."""
        marks, self._marks = self._marks, []
        return [1e3 * (b - a) for a, b in pairwise(marks)]


class CudaClock:
    """Marks in the current stream. The L2 cache is flushed before the first of them."""

    def __init__(self, device: torch.device) -> None:
        self._marks: list[torch.cuda.Event] = []
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def prepare(self) -> None:
        # It also occupies the GPU while the host enqueues what is measured.
        self._flush.zero_()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def reset(self) -> None:
        self._marks = []

    def laps(self) -> list[float]:
        """Milliseconds between marks since the last call."""
        marks, self._marks = self._marks, []
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]


Clock = CpuClock | CudaClock
# One call, of the given input set, that marks the clock before, between and after its stages.
Call = Callable[[Clock, int], object]


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass
class Samples:
    """Measured times of one implementation.

    Attributes:
        stages: for each stage of a call a list of milliseconds.
        failure: the error that ended the measurement, or "".
    """

    stages: list[list[float]] = field(default_factory=list)
    failure: str = ""

    def add(self, laps: list[float]) -> None:
        if not self.stages:
            self.stages = [[] for _ in laps]
        for stage, lap in zip(self.stages, laps, strict=True):
            stage.append(lap)

    def of(self, direction: str) -> list[float]:
        """Milliseconds of the backward stage alone, or else of whole calls."""
        if direction == "backward":
            return self.stages[1]
        return [sum(laps) for laps in zip(*self.stages, strict=True)]


def measure(clock: Clock, call: Call, first_set: int, calls: int) -> list[float]:
    """Average milliseconds of each stage over ``calls`` calls on successive input sets.

    One more call goes before them: as in a loop, they then find the memory that it freed, instead
    of what another implementation left to the system.
    """
    sums: list[float] = []
    call(clock, first_set - 1)
    clock.reset()
    for number in range(calls):
        clock.prepare()
        call(clock, first_set + number)
        laps = clock.laps()
        sums = [a + b for a, b in zip(sums, laps, strict=True)] if sums else laps
    return [total / calls for total in sums]


def take_turns(
    clock: Clock,
    calls: Mapping[str, Call],
    first: Mapping[str, list[float]],
    *,
    seconds: float,
    max_rounds: int,
    turn: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
    failed: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Measure all ``calls`` in rounds until the time is used up.

    Args:
        first: milliseconds of the stages of a call of each, from when they were tried.
        seconds: for all of them together, at least 3 rounds. One whose call takes more than its
            share, ``seconds / 3 / len(calls)``, is not called again: ``first`` is its sample.
        max_rounds: at most; with none there are no samples.
        turn: is told whose turn it is; what it returns is around that turn.
        failed: is told whose turn raised, before anybody else's is: who broke the device would
            not be known after that. What it raises ends the measurement.

    Returns:
        Samples by name.
    """
    samples = {name: Samples() for name in calls}
    share_ms = 1e3 * seconds / 3 / max(1, len(calls))
    repeats: dict[str, int] = {}
    for name, laps in first.items():
        wanted = 1 if isinstance(clock, CudaClock) else MIN_LAP_MS / max(sum(laps), 1e-3)
        repeats[name] = max(1, min(MAX_CALLS, math.ceil(wanted)))
        if max_rounds and sum(laps) > share_ms:
            samples[name].add(laps)
    order = [name for name in calls if not samples[name].stages]
    start = time.perf_counter()
    for number in range(max_rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for name in order:
            if samples[name].failure:
                continue
            try:
                with turn(name):
                    laps = measure(clock, calls[name], number, repeats[name])
                samples[name].add(laps)
            except Exception as error:  # out of memory with other inputs, say: the rest goes on
                samples[name] = Samples(failure=f"{type(error).__name__}: {error}".split("\n")[0])
                clock.reset()
                failed(name)
        order = order[1:] + order[:1]  # nobody always follows the same neighbour
    return samples
