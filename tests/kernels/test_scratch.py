"""Memory that threads keep between calls: what they get of it, and how much they keep."""

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_stack_gives_and_keeps_what_calls_use(tmp_path: Path) -> None:
    program = str(tmp_path / "scratch_stack")
    sources = "tests/native/scratch_stack.cpp", "csrc/cpu/scratch.cpp"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++20", "-O1", "-pthread", "-Icsrc", *sources, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
