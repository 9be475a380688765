"""Warps as threads and barriers as objects, for ``gluon_model.py``: who goes on is drawn by lot."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WARPS = 2  # of a role that has several: the first, which arrives, and another


class DeadlockError(AssertionError):
    """No warp can go on, and nothing is being copied."""


class RaceError(AssertionError):
    """A product read memory that holds something else."""


@dataclass
class _Warp:
    role: int
    number: int
    go: threading.Event = field(default_factory=threading.Event)
    until: Callable[[], bool] | None = None
    done: bool = False
    fenced: int = 0  # when, last
    copying: list[Any] = field(default_factory=list)  # its copies by cp.async that are not done
    storing: list[Any] = field(default_factory=list)  # what it has TMA store, and is not read yet
    wrote: bool = False  # to shared memory, since its last fence


class Machine:
    """The warps of one program, of which one runs at a time."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._paused = threading.Event()
        self.warps: list[_Warp] = []
        self._local = threading.local()
        self._error: BaseException | None = None
        self.real: list[int] = []  # warps of each role, and as many as stand for them
        self.sizes: list[int] = []
        self.time = 0
        # what happens at some later time, and since when it can
        self.copies: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self.met: dict[int, list[int]] = {}

    @property
    def warp(self) -> _Warp:
        found: _Warp = self._local.warp
        return found

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others run, at least until the condition holds."""
        warp = self.warp
        warp.until = until
        warp.go.clear()
        self._paused.set()
        warp.go.wait()
        if self._error is not None:
            raise SystemExit  # the program is over

    def tick(self) -> int:
        self.time += 1
        return self.time

    def run(
        self, roles: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int]
    ) -> None:
        """``warps`` of each role."""
        threads = []
        self.real, self.sizes = warps, [min(number, WARPS) for number in warps]
        for role, (function, arguments) in enumerate(roles):
            for number in range(self.sizes[role]):
                warp = _Warp(role, number)
                self.warps.append(warp)
                thread = threading.Thread(
                    target=self._main, args=(warp, function, arguments), daemon=True
                )
                threads.append(thread)
                thread.start()
        try:
            self._schedule()
        except BaseException as error:
            self._error = error
        for warp in self.warps:
            warp.go.set()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _main(self, warp: _Warp, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._local.warp = warp
        warp.until = lambda: True
        warp.go.wait()
        try:
            if self._error is None:
                function(*arguments)
        except SystemExit:
            pass
        except BaseException as error:
            self._error = error
        warp.done = True
        self._paused.set()

    def _schedule(self) -> None:
        while self._error is None:
            able = [w for w in self.warps if not w.done and w.until is not None and w.until()]
            choices: list[Any] = [*able, *(copy for copy in self.copies if copy[0]())]
            if not choices:
                stuck = [(w.role, w.number) for w in self.warps if not w.done]
                if stuck:
                    raise DeadlockError(f"roles and warps that wait: {stuck}")
                return
            chosen = self._random.choice(choices)
            if isinstance(chosen, _Warp):
                self._paused.clear()
                chosen.go.set()
                self._paused.wait()
            else:
                self.copies.remove(chosen)
                chosen[1]()


class Barrier:
    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phase = 0
        self.shown = False  # to TMA

    def index(self, _: int) -> Barrier:
        return self

    def init(self, count: int) -> None:
        self.count = self.arrivals = count

    def change(self, arrivals: int, size: int) -> None:
        self.arrivals -= arrivals
        self.bytes += size
        assert self.arrivals >= 0, "more arrivals than the barrier counts"
        if self.arrivals == 0 and self.bytes == 0:
            self.phase += 1
            self.arrivals = self.count


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, number: Any) -> Barrier:
        return self.all[int(number)]
