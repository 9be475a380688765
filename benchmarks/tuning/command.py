"""``python -m benchmarks tune``: finds tile shapes and writes the device's table."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results
from benchmarks.architectures import ARCHITECTURES
from benchmarks.ops._shapes import layer_sets, tuning_set
from benchmarks.registry import DTYPES, Shape
from benchmarks.routing import ROUTINGS
from benchmarks.runner import DeviceLostError, check_device
from benchmarks.sweep import DEVICE_LOST
from benchmarks.timing import Call, Clock, make_clock, take_turns

RUNS = environment.ROOT / "runs" / "tuning"
# wgrad first of the two: with what is found for it backward through the down-projection is timed
KERNELS = ("up", "grouped_gemm", "wgrad", "down_backward", "scaled_grouped_gemm")
COMPILE_SECONDS = 120.0


def add_parser(commands: Any) -> None:
    tune = commands.add_parser(
        "tune", help="find the tile shapes of the GEMM kernels that are fastest on this GPU"
    )
    tune.add_argument(
        "kernels", nargs="*", metavar="kernel", help=f"of {', '.join(KERNELS)}; default: all"
    )
    tune.add_argument("--device", choices=("cuda",), default="cuda")
    tune.add_argument(
        "--shape",
        "--shapes",
        nargs="+",
        default=(),
        help="shape sets of fused_experts (see list) or sizes; default: one or more a bucket",
    )
    tune.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    tune.add_argument("--routing", choices=ROUTINGS, default="uniform")
    tune.add_argument("--out", type=Path, help="a table; default: the device's in runs/tuning")
    tune.add_argument(
        "--among",
        type=Path,
        metavar="TABLE",
        help="try only configurations of this table, whatever bucket has them: minutes for a GPU "
        "that is like the table's",
    )
    tune.add_argument("--again", action="store_true", help="also buckets that the table has")
    tune.add_argument("--seconds", type=float, default=4.0, help="of timing each time")
    tune.add_argument("--limit", type=float, help="seconds after which no bucket is started")
    tune.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    tune.add_argument(
        "--dry-run", action="store_true", help="compile the candidates only; needs no GPU"
    )
    tune.add_argument(
        "--arch", type=int, choices=ARCHITECTURES, default=90, help="of a dry run; default 90"
    )
    tune.set_defaults(command=tune_command)


def shapes(wanted: Sequence[str]) -> list[Shape]:
    if not wanted:
        return tuning_set()
    sets = layer_sets()
    found = [
        shape for text in wanted for shape in sets.get(text) or [tuning_set()[0].replace(text)]
    ]
    if variants := [str(shape) for shape in found if shape.variant]:
        raise ValueError(f"tune: kernels are tuned with swiglu and without bias; got {variants[0]}")
    return found


def tune_command(options: argparse.Namespace) -> int:
    unknown = set(options.kernels) - set(KERNELS)
    if unknown:
        raise ValueError(
            f"tune: kernels must be of {', '.join(KERNELS)}; got {', '.join(sorted(unknown))}"
        )
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError(
            f"tune: torch {torch.__version__} finds no CUDA device; --dry-run compiles the "
            "candidates without one"
        )
    chosen = [kernel for kernel in KERNELS if kernel in (options.kernels or KERNELS)]
    wanted = list(_buckets(chosen, shapes(options.shape), options.dtype))
    return _dry_run(wanted, options) if options.dry_run else _tune(wanted, options)


def _buckets(
    kernels: Sequence[str], wanted: Sequence[Shape], dtype: str
) -> Iterator[tuple[Any, list[tuple[str, int, Shape]]]]:
    """Each bucket of the kernels on the shapes, and its problems: kernel, part, shape."""
    from benchmarks.tuning.problems import PROBLEMS, bucket_of

    found: dict[Any, list[tuple[str, int, Shape]]] = {}
    for shape in wanted:
        for kernel in kernels:
            for number, part in enumerate(PROBLEMS[kernel]):
                bucket = bucket_of(kernel, part, shape, DTYPES[dtype])
                found.setdefault(bucket, []).append((kernel, number, shape))
    yield from found.items()


def _among(path: Path) -> dict[tuple[str, str], list[Any]]:
    """A table's configurations by kernel and precision, without repetitions."""
    from moe_kernels.triton._config_tables import parse_entry, read_table
    from moe_kernels.triton._configs import CONFIGS

    found: dict[tuple[str, str], list[Any]] = {}
    for entry in read_table(path, CONFIGS)["entries"]:
        bucket, config = parse_entry(entry, CONFIGS, str(path))
        configs = found.setdefault((bucket.kernel, bucket.precision), [])
        if config not in configs:
            configs.append(config)
    return found


def _configs_of(
    bucket: Any,
    problems: Sequence[tuple[str, int, Shape]],
    among: Mapping[tuple[str, str], list[Any]] | None,
    dtype: str,
    arch: int,
) -> list[Any]:
    """What a bucket is tried with: all candidates, or those of a table."""
    if among is None:
        return _candidates(problems, dtype, arch)
    return among.get((bucket.kernel, bucket.precision), [])


def _candidates(problems: Sequence[tuple[str, int, Shape]], dtype: str, arch: int) -> list[Any]:
    """Those of the bucket's first problem that are also candidates of all others."""
    from benchmarks.tuning.candidates import candidates
    from benchmarks.tuning.problems import PROBLEMS, bucket_of, operand_dtype

    lists = []
    for kernel, number, shape in problems:
        part = PROBLEMS[kernel][number]
        rows = bucket_of(kernel, part, shape, DTYPES[dtype]).rows
        sides = part.sides(shape)
        itemsize = operand_dtype(kernel, DTYPES[dtype]).itemsize
        lists.append(candidates(kernel, arch, itemsize, rows, *sides))
    return [config for config in lists[0] if all(config in others for others in lists[1:])]


def _compile(
    problem: tuple[str, int, Shape], options: argparse.Namespace, arch: int
) -> Callable[[Sequence[Any]], Mapping[Any, Any]]:
    from benchmarks.tuning.compiled import compile_all

    kernel, part, shape = problem
    return lambda configs: compile_all(
        kernel, part, shape, options.dtype, configs, arch,
        processes=options.processes, seconds=COMPILE_SECONDS,
    )  # fmt: skip


def _dry_run(wanted: Sequence[Any], options: argparse.Namespace) -> int:
    among = _among(options.among) if options.among else None
    for bucket, problems in wanted:
        configs = _configs_of(bucket, problems, among, options.dtype, options.arch)
        made = [(p, _compile(p, options, options.arch)(configs)) for p in problems]
        # as the search does: who does not compile for all is not tried
        why = {
            config: of.problem for _, all_of in made for config, of in all_of.items() if of.problem
        }
        count = Counter(problem.split(" ")[0] for problem in why.values())
        dropped = "; ".join(f"{times} {word}..." for word, times in count.most_common())
        left = len(configs) - len(why)
        print(f"{bucket}: {left} of {len(configs)} candidates; {dropped or 'none dropped'}")
        for (kernel, part, shape), all_of in made:
            print(f" {kernel} {part} {shape}")
            for config, of in all_of.items():
                said = of.problem or f"{of.registers} registers, {of.shared} bytes"
                print(f"  {config}: {said}")
        sys.stdout.flush()
    return 0


def measure_in_turns(
    device: torch.device, seconds: float
) -> Callable[[Mapping[Any, Any], Any], Any]:
    """Median milliseconds of calls that take turns; those that fail are left out.

    A guard is around each turn: a kernel that was right once may still hang, or break the device.
    """
    clock = make_clock(device)

    def timed(function: Callable[[], None]) -> Call:
        def call(clock: Clock, number: int) -> None:
            clock.mark()
            function()
            clock.mark()

        return call

    def measure(calls: Mapping[Any, Callable[[], None]], guard: Any) -> dict[Any, float]:
        configs = {str(number): config for number, config in enumerate(calls)}
        named, first = {}, {}
        for name, config in configs.items():
            call = timed(calls[config])
            clock.reset()
            try:
                with guard(config):
                    call(clock, 0)
                    laps = clock.laps()
            except DeviceLostError:
                raise
            except Exception:  # out of memory, say
                continue
            named[name], first[name] = call, laps
        taken = take_turns(
            clock, named, first, seconds=seconds, max_rounds=30,
            turn=lambda name: guard(configs[name]), failed=lambda name: check_device(device, name),
        )  # fmt: skip
        return {
            configs[name]: statistics.median(samples.of("forward"))
            for name, samples in taken.items()
            if samples.stages
        }

    return measure


def _tune(wanted: Sequence[Any], options: argparse.Namespace) -> int:
    from benchmarks.tuning import table
    from benchmarks.tuning.compiled import Compiled
    from benchmarks.tuning.problems import PROBLEMS, Layer, Problem
    from benchmarks.tuning.search import search
    from benchmarks.tuning.trials import Trials
    from moe_kernels.triton._config_tables import as_table, device_class
    from moe_kernels.triton._configs import CONFIGS, default_config
    from moe_kernels.triton._launch import architecture

    device, start = torch.device(options.device), time.monotonic()
    name, arch = device_class(device), architecture(device)
    path = options.out or RUNS / f"{name}.json"
    results.make_way(path)
    document = table.load(path, name, CONFIGS)
    known = as_table(document, CONFIGS)
    among = _among(options.among) if options.among else None
    trials = Trials(path, lambda: check_device(device, "a configuration"))
    for hung in trials.hung:
        print(f"not tried, since it ended the process: {hung}", flush=True)
    described = environment.describe(device)
    measure = measure_in_turns(device, options.seconds)

    @functools.lru_cache(maxsize=1)
    def layer(shape: str) -> Layer:
        torch.cuda.empty_cache()
        sizes = next(s for _, ps in wanted for _, _, s in ps if str(s) == shape)
        return Layer(sizes, DTYPES[options.dtype], device, options.routing, tuned=known)

    def compiler(problem: tuple[str, int, Shape]) -> Callable[[Sequence[Any]], Mapping[Any, Any]]:
        if among is None:
            return _compile(problem, options, arch)
        return lambda configs: {config: Compiled() for config in configs}  # by the first run

    def maker(kernel: str, part: int, shape: Shape) -> Callable[[], Problem]:
        return lambda: PROBLEMS[kernel][part].make(layer(str(shape)))

    failed, done, lost = [], [], False
    for bucket, problems in wanted:
        if bucket in known and not options.again:
            print(f"{bucket}: already in {path}; --again measures it again", flush=True)
            continue
        if options.limit and time.monotonic() - start > options.limit:
            print(f"tune: the {options.limit:.0f} seconds are over; call again to go on")
            break
        kernel, _, shape = problems[0]
        default = default_config(
            kernel, arch, bucket.precision, shape["T"] * shape["K"], shape["E"]
        )
        if not trials.ended(bucket, default, times=2):  # a process may also be killed
            failed.append(f"{bucket}: the default, {default}, ended the process: not tuned")
            print(failed[-1], flush=True)
            continue
        try:
            found = search(
                bucket,
                default,
                [
                    config
                    for config in _configs_of(bucket, problems, among, options.dtype, arch)
                    if trials.ended(bucket, config)
                ],
                [
                    (f"{k} {part} {shape}", maker(k, part, shape), compiler(p))
                    for p in problems
                    for k, part, shape in [p]
                ],
                measure,
                arch,
                functools.partial(trials.of, bucket),
                refine=among is None,
            )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            failed.append(f"{bucket}: {error}".split("\n")[0])
            print(failed[-1], flush=True)
            if lost := _is_lost(device, str(bucket)):  # all that follows would fail too
                break
            continue
        known_from = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": described["device"]["name"],
            "commit": described["commit"],
            "versions": {key: described["versions"][key] for key in ("torch", "triton")},
            "routing": options.routing,
        }
        known[bucket] = found.config
        document = table.merge(document, found, known_from, CONFIGS)
        table.write(path, document)
        done.append(found)
        print(
            f"{bucket}: {found.config}; the default takes {found.default_over_best:.2f} times as "
            f"long; {found.tried} measured, {len(found.dropped)} dropped",
            flush=True,
        )
    print(f"\n{table.summary(document['entries'])}\n\nwritten: {path}", flush=True)
    print("MOE_KERNELS_CONFIGS=FILE uses a table; one in moe_kernels/triton/configs is shipped.")
    for problem in failed:
        print(f"benchmarks: {problem}", file=sys.stderr)
    if lost:
        print(
            "tune: the device is lost; call again to go on without what broke it", file=sys.stderr
        )
        return DEVICE_LOST
    return 1 if failed else 0


def _is_lost(device: torch.device, user: str) -> bool:
    try:
        check_device(device, user)
    except DeviceLostError:
        return True
    return False
