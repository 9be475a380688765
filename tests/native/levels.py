"""Runs the kernels of one instruction set after another, without torch and Python around them.

    python -m tests.native.levels [--sanitize] LEVEL ...

A level is one of those of the CPU kernels (docs/design.md), or aarch64: the level default, compiled
by a cross compiler and run by qemu-aarch64. The instructions of amx are emulated. Each program
compares what the kernels give with formulas in double, over sizes that fill no vector and memory
that ends where they must not read on; --sanitize lets the address and the undefined behaviour
sanitizer see that too. Codes of quantised weights must be the same at every level of a run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++20", "-g1", "-Wall", "-Wextra", "-fno-math-errno", "-I.", "-Icsrc")
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
AVX512_BF16 = (*AVX512, "-mavx512bf16", "-mavx512vnni")
LEVELS: dict[str, tuple[str, ...]] = {
    "default": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": (*AVX512_BF16, "-DMOE_AMX_EMULATED"),
    "aarch64": ("-static",),
}
# What processors call what a level is compiled for.
FEATURES = {"-mavx512bf16": "avx512_bf16", "-mavx512vnni": "avx512_vnni"}

PRODUCTS = (
    "tests/native/level_products.cpp",
    "csrc/cpu/amx.cpp",
    "csrc/cpu/gemm_kernels.cpp",
    "csrc/cpu/scratch.cpp",
    "csrc/cpu/weight_grad_kernels.cpp",
)
FUNCTIONS = (
    "tests/native/level_functions.cpp",
    "csrc/cpu/activation_kernels.cpp",
    "csrc/cpu/quantized_kernels.cpp",
    "csrc/cpu/quantizing_kernels.cpp",
    "csrc/cpu/row_kernels.cpp",
)


def missing(level: str) -> set[str]:
    """Instructions of the level that this processor does not have."""
    wanted = {FEATURES.get(flag, flag[2:]) for flag in LEVELS[level] if flag.startswith("-m")}
    return wanted - set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))


def build(level: str, sanitize: bool, folder: Path) -> Path:
    capability = "DEFAULT" if level == "aarch64" else level.upper()
    sources = PRODUCTS if level == "amx" else PRODUCTS + FUNCTIONS
    compiler = shlex.split(
        os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++")
        if level == "aarch64"
        else os.environ.get("CXX", "g++")
    )
    flags = [*FLAGS, *LEVELS[level], *(SANITIZE if sanitize else ("-O2",))]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    objects = []
    for source in sources:
        objects.append(str(folder / f"{level}_{Path(source).stem}.o"))
        # as CMakeLists.txt has it: every operation of quantising is rounded for itself
        own = ["-ffp-contract=off"] if "quantizing" in source else []
        command = [*compiler, *flags, *own, "-c", source, "-o", objects[-1]]
        subprocess.run(command, cwd=ROOT, check=True)
    program = folder / level
    subprocess.run([*compiler, *flags, *objects, "-o", str(program)], cwd=ROOT, check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("levels", nargs="+", choices=LEVELS, metavar="LEVEL")
    options = parser.parse_args()
    codes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for level in options.levels:
            if lacking := missing(level):
                print(f"{level}: not run, this processor lacks {', '.join(sorted(lacking))}")
                continue
            program = build(level, options.sanitize, Path(folder))
            emulator = ["qemu-aarch64"] if level == "aarch64" else []
            done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
            print(f"{level}: {done.stdout.strip()}\n{done.stderr}".rstrip(), flush=True)
            if done.returncode:
                return 1
            if found := re.search(r"codes (\w+)", done.stdout):
                codes[level] = found[1]
    if len(set(codes.values())) > 1:
        print(f"codes of quantised weights are not the same: {codes}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
