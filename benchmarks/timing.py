"""Clocks for CPU and CUDA, and rounds in which implementations take turns.

Other work on a machine slows whole stretches of time. Taking turns spreads such a stretch over all
implementations, so that their ratios hold although their times do not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
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

    def laps(self) -> list[float]:
        """Milliseconds between marks since the last call."""
        marks, self._marks = self._marks, []
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]


Clock = CpuClock | CudaClock
# One call, of the given input set, that marks the clock before, between and after its stages.
Call = Callable[[Clock, int], None]


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass
class Samples:
    """Measured times of one implementation: for each stage of a call a list of milliseconds."""

    stages: list[list[float]] = field(default_factory=list)

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
    """Average milliseconds of each stage over ``calls`` calls on successive input sets."""
    sums: list[float] = []
    for number in range(calls):
        clock.prepare()
        call(clock, first_set + number)
        laps = clock.laps()
        sums = [a + b for a, b in zip(sums, laps, strict=True)] if sums else laps
    return [total / calls for total in sums]


def take_turns(
    clock: Clock,
    calls: Mapping[str, Call],
    first_ms: Mapping[str, float],
    *,
    seconds: float,
    max_rounds: int,
) -> dict[str, Samples]:
    """Measure all ``calls`` in rounds until the time is used up.

    Args:
        first_ms: what one call of each took when it was warmed up.
        seconds: for all of them together, at least 3 rounds. One whose single call exceeds its
            share, ``seconds / 3 / len(calls)``, is measured in one round only.
        max_rounds: at most.

    Returns:
        Samples by name.
    """
    samples = {name: Samples() for name in calls}
    share_ms = 1e3 * seconds / 3 / max(1, len(calls))
    repeats = {
        name: 1
        if isinstance(clock, CudaClock)
        else max(1, min(MAX_CALLS, math.ceil(MIN_LAP_MS / max(first_ms[name], 1e-3))))
        for name in calls
    }
    order = list(calls)
    start = time.perf_counter()
    for turn in range(max_rounds):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        for name in order:
            if turn == 0 or first_ms[name] <= share_ms:
                laps = measure(clock, calls[name], turn, repeats[name])
                samples[name].add(laps)
        order.append(order.pop(0))  # nobody always follows the same neighbour
    return samples
