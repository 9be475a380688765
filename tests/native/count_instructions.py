"""Counts the instructions of the AVX2 kernels on a small expert, and compares them with the record.

    python -m tests.native.count_instructions [--record]

An instruction more per row or column shows here, on any machine, however busy; what it costs in
time does not. Needs valgrind, which does not know AVX-512.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_suffix(".json")
SOURCES = (
    "tests/native/expert_instructions.cpp",
    "csrc/cpu/activation_kernels.cpp",
    "csrc/cpu/gemm_kernels.cpp",
    "csrc/cpu/row_kernels.cpp",
    "csrc/cpu/weight_grad_kernels.cpp",
    "csrc/cpu/scratch.cpp",
)
FLAGS = (
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-fno-math-errno",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-Icsrc",
    "-DCPU_CAPABILITY=AVX2",
    "-DCPU_CAPABILITY_AVX2",
)
CASES = [
    f"{dtype} {layout} {rows}"
    for dtype in ("bf16", "fp32")
    for layout in ("rows", "columns")
    for rows in (1, 6, 40)
]
# of a count by the compiler of the record, and by another
ALLOWED, ALLOWED_ELSEWHERE = 1.02, 1.3


def compiler() -> str:
    command = os.environ.get("CXX", "g++")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    return version.stdout.splitlines()[0]


def build(program: Path) -> None:
    command = [os.environ.get("CXX", "g++"), *FLAGS, *SOURCES, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)


def count(program: Path, case: str) -> int:
    """Instructions of the case, by callgrind."""
    result = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=*counted*",
            "--callgrind-out-file=/dev/null",
            str(program),
            *case.split(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Collected : (\d+)", result.stderr)
    if not found or int(found[1]) == 0:
        raise RuntimeError(f"callgrind counted nothing for {case!r}:\n{result.stderr}")
    return int(found[1])


def main(arguments: list[str]) -> int:
    if not shutil.which("valgrind"):
        print("counting instructions needs valgrind, which is not on PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "expert_instructions"
        build(program)
        counts = {case: count(program, case) for case in CASES}
    if arguments == ["--record"]:
        record = {"compiler": compiler(), "instructions": counts}
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        return 0
    record = json.loads(RECORD.read_text())
    allowed = ALLOWED if compiler() == record["compiler"] else ALLOWED_ELSEWHERE
    grown = 0
    for case, now in counts.items():
        before = record["instructions"][case]
        more = now > allowed * before
        grown += more
        print(f"{case:18} {now:10} {now / before:6.3f} of the record{'  MORE' if more else ''}")
    if grown:
        print(
            f"{grown} of {len(counts)} cases take over {allowed} times the recorded instructions. "
            "If that is worth it, say why and run python -m tests.native.count_instructions "
            "--record.",
            file=sys.stderr,
        )
    return int(grown > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
