"""How work is divided into units, for numbers of threads that this machine may not have."""

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_threads_share_work_whatever_the_routing(tmp_path: Path) -> None:
    program = str(tmp_path / "work_division")
    sources = "tests/native/work_division.cpp", "csrc/cpu/division.cpp"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++20", "-O1", "-Icsrc", *sources, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
