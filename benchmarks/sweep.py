"""``python -m benchmarks sweep``: many runs, each in a process of its own with a time limit.

The most valuable come first. Each writes rows as they come and goes on where it was interrupted, so
a sweep that is started again does only what is left. A process that dies, of a library's
segmentation fault say, is started again without that library.

Before, kernels can be compiled for many runs side by side, which a fresh machine has yet to do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.providers import OURS

DEVICE_LOST = 3
RESTARTS = 3  # of a run whose process died
GRACE = 15.0  # seconds to write what is there, after an interrupt; at most a quarter of all
LEAST = 5.0  # seconds in which a run can do anything
# what is no fault of a run: the time of all was over, before it began or before it ended
NOT_STARTED, CUT_OFF = (
    "not started: the sweep's time was over",
    "cut off: the sweep's time was over",
)


@dataclass(frozen=True)
class Part:
    """One run.

    Attributes:
        arguments: of ``python -m benchmarks``, without the output.
        seconds: that it may take.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float


def _run(name: str, text: str, seconds: float) -> Part:
    return Part(name, ("run", *text.split()), seconds)


# one of each group of three of the published shapes
SOME_PUBLISHED = "T=40960,H=768,I=512,E=64,K=4 T=24576,H=1536,I=512,E=64,K=4 sonicmoe-wide"
# experts wide enough for products to be what counts, in float8 and without
WIDE = "T=32768,H=4096,I=2048,E=32,K=4"
WIDE_PRODUCTS = (
    "R=131072,D=4096,N=4096,E=32 R=131072,D=2048,N=4096,E=32 --direction forward --seconds 0.5"
)
MODELS = (
    *("qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3", "mixtral-8x7b"),
    *("qwen3-235b-a22b", "kimi-k2"),
)
SMALL_OPS = "topk_router sort_by_expert permute unpermute chunk_permute expert_activation"
FLOAT8_OPS = "quantize_rows permute_quantize quantize_weights scaled_grouped_gemm fp8_grouped_gemm"

# no other run has these shapes: the package's grouped GEMM beside those whose warps have roles
ROLES = _run(
    "grouped_gemm, warps with roles",
    "grouped_gemm --shape R=49152,D=2048,N=1536,E=128 R=49152,D=768,N=2048,E=128 --provider "
    "moe_kernels torch moe_kernels_roles_triton moe_kernels_roles_gluon_turns "
    "moe_kernels_roles_gluon_shared --direction forward --seconds 0.5",
    30,
)

# what a reader asks for first
MAIN = (
    _run("layer", "fused_experts --shape qwen3-30b-a3b --seconds 0.5", 90),
    _run("small ops", f"{SMALL_OPS} --seconds 0.15", 60),
    _run("launches", "moe_layer --seconds 0.3", 30),
    _run("float8, products", f"grouped_gemm scaled_grouped_gemm --shape {WIDE_PRODUCTS}", 40),
    _run("decode", "fused_experts --shape decode --direction forward --seconds 0.3", 50),
    _run("published", f"fused_experts --shape {SOME_PUBLISHED} --seconds 0.5", 90),
    _run("grouped_gemm", "grouped_gemm --shape qwen3-30b-a3b --seconds 0.5", 50),
    _run("float8", f"fused_experts fused_experts_fp8 --shape {WIDE} --seconds 0.5", 60),
    _run("gpt-oss", "fused_experts --shape gpt-oss-120b --seconds 0.5", 60),
    ROLES,
    _run("published, all", "fused_experts --shape sonicmoe --seconds 0.5", 180),
)


def _everything() -> Iterator[Part]:
    yield _run("published", "fused_experts --shape sonicmoe", 900)
    for model in MODELS:
        yield _run(model, f"fused_experts --shape {model}", 300)
    yield _run("grouped_gemm", f"grouped_gemm --shape {' '.join(MODELS)}", 600)
    yield ROLES
    for model in MODELS:
        text = f"fused_experts --shape {model}-decode --direction forward --seconds 1"
        yield _run(f"{model}, decode", text, 240)
    yield _run("float8", f"fused_experts fused_experts_fp8 --shape {WIDE}", 400)
    yield _run("float8, products", f"grouped_gemm scaled_grouped_gemm --shape {WIDE_PRODUCTS}", 60)
    for model in MODELS:
        yield _run(f"{model}, float8", f"fused_experts_fp8 --shape {model}", 300)
    for op in (*SMALL_OPS.split(), "round_tokens", *FLOAT8_OPS.split()):
        yield _run(op, op, 240)
    yield _run("launches", "moe_layer --shape qwen3-30b-a3b gpt-oss-120b --seconds 1", 200)
    yield _run("a model's step", "model_decode", 600)
    yield _run("8 and 4 bits", "fused_experts_quantized --seconds 1", 300)
    for letter in "TEI":
        yield _run(f"scaling with {letter}", f"fused_experts --shape scaling-{letter}", 400)
    for routing in ("balanced", "zipf", "one"):
        for model in MODELS:
            text = f"fused_experts --shape {model} --routing {routing}"
            yield _run(f"{model}, {routing}", text, 300)
        text = f"fused_experts --shape sonicmoe --routing {routing}"
        yield _run(f"published, {routing}", text, 900)
        yield _run(
            f"grouped_gemm, {routing}",
            f"grouped_gemm --shape qwen3-30b-a3b --routing {routing}",
            200,
        )


PLANS: dict[str, tuple[Part, ...]] = {"main": MAIN, "full": tuple(_everything())}

Start = Callable[[Sequence[str], float], int]
Launch = Callable[[Sequence[str], TextIO], "subprocess.Popen[bytes]"]


def launch(arguments: Sequence[str], output: TextIO | None = None) -> subprocess.Popen[bytes]:
    """The command, begun. It hears an interrupt also where this process was told to ignore them, as
    a shell tells what it starts in the background."""

    def hear_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        stdout=output,
        stderr=output and subprocess.STDOUT,
        preexec_fn=hear_interrupts,
    )


def start_process(arguments: Sequence[str], seconds: float) -> int:
    """Run the command for at most ``seconds``; its exit code, negative where a signal ended it."""
    process = launch(arguments)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    try:
        process.wait(min(GRACE, seconds / 3))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return 124


def compile_first(
    parts: Sequence[Part],
    out: Path,
    device: str,
    seconds: float,
    at_once: int,
    launch: Launch = launch,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Call our implementation of the first parts, a process each, so that its kernels are compiled
    and on disk; for at most ``seconds``. What goes wrong is left to the runs to find."""
    began = clock()
    with tempfile.TemporaryDirectory() as folder, (out / "compile.log").open("w") as log:
        processes = []
        for number, part in enumerate(parts[:at_once]):
            arguments = [*part.arguments, "--provider", OURS, "--rounds", "0", "--seconds", "0"]
            arguments += ["--device", device, "--out", f"{folder}/{number}"]
            processes.append(launch(arguments, log))
        for process in processes:
            try:
                process.wait(max(0.0, seconds - (clock() - began)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def outcome(code: int) -> str:
    """What an exit code of a run means."""
    if code == 124:
        return "out of time"
    if code < 0:
        return f"died of signal {-code}"
    known = {0: "done", 1: "rows of ours are wrong or failed", DEVICE_LOST: "lost the device"}
    return known.get(code, f"failed with code {code}")


def sweep(
    parts: Sequence[Part],
    out: Path,
    device: str,
    limit: float,
    start: Start = start_process,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Run ``parts`` in order until ``limit`` seconds are over, and say how each went.

    What is known is written to ``sweep.json`` after each.
    """
    began, done = clock(), []
    for part in parts:
        if limit - (clock() - began) < LEAST:
            done.append({**asdict(part), "outcome": NOT_STARTED, "took": 0.0})
            continue
        first, code, restarts = clock(), 0, 0
        last = part.seconds > limit - (clock() - began)  # the sweep's time is over before its own
        while True:
            left = min(part.seconds - (clock() - first), limit - (clock() - began))
            if left < LEAST:
                code = 124
                break
            arguments = [*part.arguments, "--device", device, "--out", str(out), "--resume"]
            print(f"\n== {part.name}: python -m benchmarks {' '.join(arguments)}", flush=True)
            code = start(arguments, left - min(GRACE, left / 4))
            if (code == DEVICE_LOST or code < 0) and restarts < RESTARTS:
                restarts += 1
                print(f"== {part.name}: {outcome(code)}; again without what it died of", flush=True)
                continue
            break
        took = round(clock() - first, 1)
        how = CUT_OFF if code == 124 and last else outcome(code)
        done.append({**asdict(part), "outcome": how, "restarts": restarts, "took": took})
        print(f"== {part.name}: {how}, {took} s", flush=True)
        _write(out, done)
    _write(out, done)
    return done


def is_right(done: Sequence[dict[str, Any]]) -> bool:
    """Whether some runs are done, and what is not lacked the sweep's time alone."""
    outcomes = {row["outcome"] for row in done}
    return "done" in outcomes and outcomes <= {"done", NOT_STARTED, CUT_OFF}


def _write(out: Path, done: Sequence[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").write_text(json.dumps({"parts": list(done)}, indent=1) + "\n")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep", help="many runs, each with a time limit; again to go on where it stopped"
    )
    parser.add_argument(
        "plan", choices=PLANS, help="the tables of make gpu-check, or every op, model and routing"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda")
    parser.add_argument("--out", type=Path, help="a folder; none needed with --list")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument(
        "--compile", type=float, default=0.0, help="seconds in which to compile kernels at first"
    )
    parser.add_argument("--list", action="store_true", help="say what would run, and nothing else")
    parser.set_defaults(command=sweep_command)


def sweep_command(options: argparse.Namespace) -> int:
    parts = PLANS[options.plan]
    if options.list:
        for part in parts:
            print(f"{part.seconds:5.0f} s  {part.name}: {' '.join(part.arguments)}")
        print(f"{sum(part.seconds for part in parts):5.0f} s  at most")
        return 0
    if options.out is None:
        raise ValueError("sweep: --out FOLDER is required, unless with --list")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"sweep: torch {torch.__version__} finds no CUDA device")
    out, began = options.out.resolve(), time.monotonic()
    results.make_way(out / "sweep.json")
    if options.compile:
        at_once = max(1, (os.cpu_count() or 1) // 2)
        compile_first(parts, out, options.device, options.compile, at_once)
        print(f"compiled kernels for {time.monotonic() - began:.0f} s", flush=True)
    done = sweep(parts, out, options.device, options.limit - (time.monotonic() - began))
    print("\n| run | outcome | seconds |\n| --- | --- | --- |")
    for row in done:
        print(f"| {row['name']} | {row['outcome']} | {row['took']:.0f} |")
    return 0 if is_right(done) else 1
