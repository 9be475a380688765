"""The command line: ``python -m benchmarks COMMAND``; ``--help`` names the commands."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    activation_checkpointing,
    environment,
    launches,
    plots,
    ranks,
    results,
    resume,
    simulate_command,
    sweep,
    tables,
    targets,
)
from benchmarks.limits import Limits
from benchmarks.ops import OPS
from benchmarks.providers import OWN, PROVIDERS
from benchmarks.registry import DIRECTIONS, DTYPES, Op
from benchmarks.routing import ROUTINGS
from benchmarks.runner import DeviceLostError, Settings, available, run_op
from benchmarks.tuning import command as tune

RUNS = environment.ROOT / "runs" / "benchmarks"
SECONDS = {"cpu": 20.0, "cuda": 2.0}
COMMITTED = environment.ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except DeviceLostError as error:
        print(f"benchmarks: {error}; --resume goes on without it", file=sys.stderr)
        return sweep.DEVICE_LOST
    except KeyboardInterrupt:
        print("benchmarks: interrupted; what was measured before is written", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="measure ops and write the results as JSON")
    run.add_argument(
        "ops", nargs="+", choices=[*OPS, "all"], metavar="op", help=", ".join([*OPS, "or all"])
    )
    _add_device(run)
    run.add_argument(
        "--shape",
        nargs="+",
        default=(),
        help="names of shape sets (see list), or sizes such as T=16,E=8 (others as in the default)",
    )
    run.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), default=(), help="default: as the op has it"
    )
    run.add_argument(
        "--direction", nargs="+", choices=DIRECTIONS, default=(), help="default: all of the op's"
    )
    run.add_argument(
        "--provider",
        nargs="+",
        choices=list(PROVIDERS),
        metavar="PROVIDER",
        default=(),
        help="names of list; default: those that can run here, without moe_kernels_roles_...",
    )
    run.add_argument(
        "--routing", nargs="+", choices=ROUTINGS, default=(), help="default: as list says"
    )
    run.add_argument(
        "--resume", action="store_true", help="go on with the file of an interrupted run"
    )
    run.add_argument(
        "--ranks",
        nargs="+",
        type=int,
        default=(2,),
        help="processes, for ops that need several: default 2",
    )
    run.add_argument(
        "--large-pages", action="store_true", help="weights on pages of 2 MiB, for all providers"
    )
    run.add_argument("--threads", type=int, help="of PyTorch on the CPU, in each process")
    run.add_argument(
        "--seconds", type=float, help="of timing for each table; default 20 on CPU, 2 on CUDA"
    )
    run.add_argument(
        "--rounds",
        type=int,
        default=50,
        help="of timing at most; default 50; with 0 each call runs once, checked and not timed",
    )
    run.add_argument("--seed", type=int, default=0, help="of inputs and weights; default 0")
    run.add_argument(
        "--out",
        type=Path,
        help="a .json file (for one op) or a folder; default: the device's in runs/benchmarks",
    )
    run.set_defaults(command=_run)

    memory = commands.add_parser(
        "memory", help="peak memory of a training step by mode of activation checkpointing"
    )
    _add_device(memory)
    memory.add_argument("--shape", default="", help="sizes such as L=4,T=1024 (others by default)")
    memory.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    memory.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    memory.add_argument("--out", type=Path, help="a .json file or a folder")
    memory.set_defaults(command=_memory)

    simulate_command.add_parser(commands)
    tune.add_parser(commands)
    sweep.add_parser(commands)
    launches.add_parser(commands)

    report = commands.add_parser("report", help="tables and plots from result files")
    report.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="files or folders; default: the committed results and those of last runs",
    )
    report.add_argument("--tables", action="store_true", help="no plots, which need matplotlib")
    report.add_argument(
        "--out",
        type=Path,
        default=RUNS / "report",
        help="a folder; default: runs/benchmarks/report",
    )
    report.set_defaults(command=_report)

    show = commands.add_parser("list", help="ops, shapes, and providers and why they cannot run")
    _add_device(show)
    show.set_defaults(command=_list)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where torch finds such a device",
    )


def _device(options: argparse.Namespace) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1; got {options.threads}")
        torch.set_num_threads(options.threads)
    return torch.device(options.device)


def _run(options: argparse.Namespace) -> int:
    device = _device(options)
    settings = Settings(
        device=device,
        shapes=options.shape,
        dtypes=options.dtype,
        directions=options.direction,
        providers=options.provider,
        only_routings=options.routing,
        seconds=SECONDS[options.device] if options.seconds is None else options.seconds,
        max_rounds=options.rounds,
        seed=options.seed,
        large_pages=options.large_pages,
        threads=options.threads,
    )
    if not settings.seconds >= 0 or settings.max_rounds < 0:  # NaN is not, either
        raise ValueError(
            "--seconds and --rounds must be at least 0; got "
            f"{settings.seconds} and {settings.max_rounds}"
        )
    if min(options.ranks) < 1:
        raise ValueError(f"--ranks must be at least 1; got {min(options.ranks)}")
    ops = list(OPS) if "all" in options.ops else list(dict.fromkeys(options.ops))
    if options.out and options.out.suffix == ".json" and len(ops) > 1:
        raise ValueError(f"--out must be a folder for {len(ops)} ops; got {options.out}")
    shapeless = [why for name in ops if (why := _no_shape(OPS[name], settings))]
    if len(shapeless) == len(ops):
        raise ValueError(shapeless[0])
    cannot = [why for name in ops if (why := _no_provider(OPS[name], settings))]
    if len(cannot) == len(ops):
        raise ValueError(f"--provider must name one that can run here; {'; '.join(cannot)}")
    failed = [problem for name in ops for problem in _run_one(OPS[name], settings, options)]
    for problem in failed:
        print(f"benchmarks: {problem}", file=sys.stderr)
    return 1 if failed else 0


def _run_one(op: Op, settings: Settings, options: argparse.Namespace) -> list[str]:
    """Measure, print and write one op. Returns what is wrong: our own rows, ranks that failed."""
    if missing := [module for module in op.requires if not find_spec(module.split(".")[0])]:
        print(f"{op.name}: not run: needs {', '.join(missing)}", flush=True)
        return []
    if reason := _no_shape(op, settings) or _no_provider(op, settings):
        print(f"{op.name}: not run: {reason}", flush=True)
        return []
    if settings.only_routings and not op.routed:
        print(f"{op.name}: --routing does not change its inputs", flush=True)
    described = environment.describe(settings.device)
    why = available(op, settings.device.type, settings.providers)
    for name, reason in why.items():
        if reason:
            print(f"{op.name}: without {name}: {reason}", flush=True)
    path = options.out or RUNS / environment.slug(described["device"])
    if path.suffix != ".json":
        path = path / f"{op.name}.json"
    results.make_way(path)
    described |= {"large_pages": settings.large_pages}
    counts: list[int] = []
    if op.on_ranks:
        counts = _possible_ranks(op, settings, options.ranks)
        described |= {"ranks": {str(n): ranks.placement(n, settings.threads) for n in counts}}
    left = resume.earlier(path, described) if options.resume else resume.Earlier()
    settings = dataclasses.replace(settings, done=left.done)
    limits, rows, crashed = left.limits, left.rows, {"crashed": left.crashed}
    document: dict[str, Any] = {"rows": rows}
    if not op.on_ranks:
        settings = dataclasses.replace(
            settings, crashed=left.crashed, watch=functools.partial(resume.watch, path)
        )
    if left.crashed:  # kept even if this run ends before its first row
        results.write(path, results.document(op.name, described, why, limits, rows) | crashed)
    if op.on_ranks:
        described["ranks"] = left.ranks | described["ranks"]
        described["threads"] = max((d["threads"] for d in described["ranks"].values()), default=1)
    failed: list[str] = []
    try:
        for new, dtype, seen in _measured(op, settings, counts, failed):
            if seen is not None:
                limits[dtype] = limits[dtype].best(seen) if dtype in limits else seen
            rows += new
            document = results.document(op.name, described, why, limits, rows) | crashed
            results.write(path, document)
            for group in tables.grouped(document["rows"][len(rows) - len(new) :]).values():
                print(f"\n{tables.table(group)}", flush=True)
    except KeyboardInterrupt:
        resume.marker(path).unlink(missing_ok=True)  # nothing died
        raise
    if not rows:
        print(f"{op.name}: nothing was measured", flush=True)
        return failed
    print(f"\n{tables.summary(document['rows'])}\n\nwritten: {path}", flush=True)
    return failed + [
        f"{op.name} {row['shape']} {row['dtype']} {row['direction']}: {row['void'] or row['note']}"
        for row in rows
        if row["provider"] in OWN and (row["void"] or row["note"]) and not row["unsupported"]
    ]


def _no_shape(op: Op, settings: Settings) -> str:
    """Why ``op`` has not the shapes that were asked for, or ""."""
    try:
        op.shapes(settings.device.type, settings.shapes)
    except ValueError as error:
        return str(error)
    return ""


def _no_provider(op: Op, settings: Settings) -> str:
    """Why none of the providers that were asked for can run ``op`` here, or ""."""
    why = available(op, settings.device.type, settings.providers)
    if not settings.providers or "" in why.values():
        return ""
    said = [f"{name} {why.get(name, f'has no {op.name}')}" for name in settings.providers]
    return ", ".join(said)


def _measured(
    op: Op, settings: Settings, counts: Sequence[int], failed: list[str]
) -> Iterator[tuple[list[dict[str, Any]], str, Limits | None]]:
    """Rows as they come, their dtype and the machine's limits; rows of ranks bring their own.

    What ranks failed with is added to ``failed``: other numbers of them, and other ops, go on.
    """
    if not op.on_ranks:
        yield from run_op(op, settings)
    for count in counts:
        over = {"oversubscribed": ranks.placement(count, settings.threads)["oversubscribed"]}
        try:
            for rows in ranks.run_on_ranks(op, settings, count):
                yield [row | over for row in rows], rows[0]["dtype"], None
        except ranks.RanksFailed as error:
            failed.append(f"{op.name}: {error}")


def _possible_ranks(op: Op, settings: Settings, wanted: Sequence[int]) -> list[int]:
    """Those of the ``wanted`` numbers of ranks that can run here; says why others cannot."""
    possible = []
    for count in dict.fromkeys(wanted):
        placed = ranks.placement(count, settings.threads)
        if reason := ranks.impossible(op, settings, count):
            print(f"{op.name}: {reason}", flush=True)
            continue
        threads, cores = placed["threads"], placed["cores"]
        over = ": OVERSUBSCRIBED, they wait for each other's cores" * placed["oversubscribed"]
        print(f"{op.name}: {count} ranks x {threads} threads on {cores} cores{over}", flush=True)
        possible.append(count)
    return possible


def _memory(options: argparse.Namespace) -> int:
    device = _device(options)
    shape = activation_checkpointing.SHAPES[options.device].replace(options.shape)
    described = environment.describe(device)
    path = options.out or RUNS / environment.slug(described["device"])
    if path.suffix != ".json":
        path = path / f"{activation_checkpointing.NAME}.json"
    results.make_way(path)
    rows, held = activation_checkpointing.measure(device, options.dtype, shape)
    found = {"op": activation_checkpointing.NAME, **described, "limits": {}, "providers": {}}
    results.write(path, {**found, **held, "rows": rows})
    print(f"{activation_checkpointing.table(rows, held)}\n\nwritten: {path}", flush=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    documents = _documents(options.files)
    results.make_way(options.out / "report.md")
    pictures = not options.tables and find_spec("matplotlib") is not None
    if not pictures and not options.tables:
        print("benchmarks: no plots, which need matplotlib", file=sys.stderr)
    parts = []
    on_gpus: dict[str, list[dict[str, Any]]] = {}
    for found in documents:
        device, commit = found["device"], found["commit"]
        if device["type"] == "cuda":
            on_gpus.setdefault(device["name"], []).extend(found["rows"])
        name = commit["hash"] or f"unknown, sources {commit['sources']}"
        dirty = " with changes" if commit["dirty"] else ""
        versions = ", ".join(f"{name} {of}" for name, of in found["versions"].items() if of)
        parts += [
            f"## {found['op']} on {device['name']}, {found['threads']} threads",
            f"Commit {name}{dirty}, {found['date']}; {versions}.",
            *_absent(found["providers"]),
            tables.summary(found["rows"]),
        ]
        if not pictures:
            continue
        folder = options.out / environment.slug(device)
        for picture in plots.draw(found["rows"], folder):
            parts.append(f"![{picture.stem}]({picture.relative_to(options.out)})")
    for name, rows in on_gpus.items():
        parts += [f"## Targets on {name}", targets.table(rows)]
    text = "\n\n".join(["# Benchmarks", *parts]) + "\n"
    (options.out / "report.md").write_text(text)
    print(f"{text}\nwritten: {options.out / 'report.md'}")
    return 0


def _absent(providers: Mapping[str, str]) -> list[str]:
    """A line on the libraries that were not measured."""
    missing = [f"{name} ({why})" for name, why in providers.items() if why]
    return [f"Not measured: {', '.join(missing)}."] if missing else []


def _documents(wanted: Sequence[Path]) -> list[dict[str, Any]]:
    """The files that are named, and those in folders that hold rows; says which of these do not."""
    if not wanted:
        wanted = [folder for folder in (COMMITTED, RUNS) if folder.is_dir()]
    found = []
    for path in wanted:
        if not path.is_dir():
            found.append(results.read(path))
            continue
        for file in sorted(path.rglob("*.json")):
            if '"rows": [' not in file.read_text(errors="replace"):
                continue
            try:
                found.append(results.read(file))
            except ValueError as error:  # figures of another kind may lie beside
                print(f"benchmarks: left out: {error}", file=sys.stderr)
    if not found:
        places = " or ".join(map(str, wanted)) or RUNS
        raise FileNotFoundError(f"no results in {places}; python -m benchmarks run all")
    return found


def _list(options: argparse.Namespace) -> int:
    for op in OPS.values():
        print(f"{op.name}")
        for name, shapes in op.shape_sets.items():
            default = " (default)" if name in op.defaults[options.device] else ""
            print(f"  {name}{default}: {'; '.join(map(str, shapes))}")
        shapes = [shape for set_ in op.shape_sets.values() for shape in set_]
        routings = dict.fromkeys(routing for shape in shapes for routing in op.routings(shape))
        print(f"  routing: {', '.join(routings)}")
        for name, reason in available(op, options.device).items():
            print(f"  {name}: {reason or 'available'}")
    return 0
