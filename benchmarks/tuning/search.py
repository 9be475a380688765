"""The search for one bucket: compile, check, measure in turns with the default, refine.

What measures is given, so that the search can be followed without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.tuning.candidates import refinements
from benchmarks.tuning.compiled import Compiled
from benchmarks.tuning.problems import Problem
from moe_kernels.triton._config_tables import Bucket, Config

Compile = Callable[[Sequence[Config]], Mapping[Config, Compiled]]
# Around runs of a configuration that may be the last that the process does.
Guard = Callable[[Config], AbstractContextManager[None]]
# Milliseconds of each call, taken in turns, each in its guard; a call that fails is left out.
Measure = Callable[[Mapping[Config, Callable[[], None]], Guard], Mapping[Config, float]]

FINALISTS = 5  # tiles whose walking orders are tried
TIE = 0.98  # the default stays unless another takes less than this part of its time


@dataclass
class Found:
    """The best configuration of a bucket.

    Attributes:
        ms, default_ms: by problem, of the last round of measurements.
        dropped: why candidates were not measured, or do not count.
        tried: how many were measured.
    """

    bucket: Bucket
    config: Config
    ms: dict[str, float]
    default_ms: dict[str, float]
    dropped: dict[Config, str] = field(default_factory=dict)
    tried: int = 0

    @property
    def default_over_best(self) -> float:
        """Of times, the geometric mean over the problems."""
        logs = [math.log(self.default_ms[name] / self.ms[name]) for name in self.ms]
        return math.exp(sum(logs) / len(logs))


def search(
    bucket: Bucket,
    default: Config,
    candidates: Sequence[Config],
    problems: Sequence[tuple[str, Callable[[], Problem], Compile]],
    measure: Measure,
    arch: int,
    guard: Guard = lambda config: nullcontext(),
    *,
    refine: bool = True,
) -> Found:
    """The configuration that is fastest on all ``problems`` of a bucket together.

    Args:
        problems: a name, what makes the problem (one at a time is in memory), and what compiles
            configurations of it.
        refine: try further walking orders of the best tiles.

    Raises:
        RuntimeError: the default itself is wrong or fails.
    """
    dropped: dict[Config, str] = {}
    compiled: dict[Config, Compiled] = {}
    wanted = [config for config in candidates if config != default]
    for _, _, compile_all in problems:
        for config, made in compile_all([default, *wanted]).items():
            if made.problem and config != default:
                dropped[config] = made.problem
            compiled[config] = made
    first = _measure_all(default, _left(wanted, dropped), problems, measure, dropped, guard)
    finalists = [config for config in _ranked(first) if config != default][:FINALISTS]
    wider = {
        other
        for config in ((default, *finalists) if refine else ())
        for other in refinements(config, compiled[config].shared, compiled[config].registers, arch)
    }
    # in an order that does not depend on hashes
    more = sorted(wider - {default, *finalists}, key=lambda config: tuple(vars(config).values()))
    last = _measure_all(default, [*finalists, *more], problems, measure, dropped, guard)
    best = _ranked(last)[0]
    if _score(last, best) > TIE:
        best = default
    return Found(
        bucket,
        best,
        ms={name: times[best] for name, times in last.items()},
        default_ms={name: times[default] for name, times in last.items()},
        dropped=dropped,
        tried=len(_left(wanted, dropped)) + len(more) + 1,
    )


def _left(configs: Sequence[Config], dropped: Mapping[Config, str]) -> list[Config]:
    return [config for config in configs if config not in dropped]


def _measure_all(
    default: Config,
    configs: Sequence[Config],
    problems: Sequence[tuple[str, Callable[[], Problem], Compile]],
    measure: Measure,
    dropped: dict[Config, str],
    guard: Guard,
) -> dict[str, dict[Config, float]]:
    """Times by problem of those that are right on every problem, the default's with them."""
    times: dict[str, dict[Config, float]] = {}
    for name, make, _ in problems:
        problem = make()
        with guard(default):
            wrong = _wrong(problem, default, None)
        if wrong:
            raise RuntimeError(f"{name}: the default, {default}, is wrong: {wrong}")
        results = problem.results()
        for config in _left(configs, dropped):
            with guard(config):
                wrong = _wrong(problem, config, results)
            if wrong:
                dropped[config] = wrong
        del results
        calls = {config: _call(problem, config) for config in (default, *_left(configs, dropped))}
        times[name] = dict(measure(calls, guard))
        if default not in times[name]:
            raise RuntimeError(f"{name}: the default, {default}, could not be measured")
        for config in calls:
            if config not in times[name]:
                dropped.setdefault(config, "failed while it was measured")
    for of in times.values():
        for config in dropped:
            of.pop(config, None)
    return times


def _wrong(problem: Problem, config: Config, results: list[Tensor] | None) -> str:
    try:
        return problem.wrong(config, results)
    except Exception as error:  # too much shared memory, say: the others go on
        return f"{type(error).__name__}: {error}".split("\n")[0]


def _call(problem: Problem, config: Config) -> Callable[[], None]:
    return lambda: problem.run(config)


def _score(times: Mapping[str, Mapping[Config, float]], config: Config) -> float:
    """Time over the default's, which comes first: the geometric mean over problems."""
    logs = [math.log(of[config] / next(iter(of.values()))) for of in times.values()]
    return math.exp(sum(logs) / len(logs))


def _ranked(times: Mapping[str, Mapping[Config, float]]) -> list[Config]:
    """Fastest first; equals stay in the order of the candidates."""
    (first, *_) = times.values()
    return sorted(first, key=lambda config: _score(times, config))
