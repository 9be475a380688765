"""Calls with few tokens allocate nothing but their results."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_few_tokens_allocate_nothing_but_results(tmp_path: Path) -> None:
    """Whatever the layer, the number of threads, and what went wrong before."""
    counter = str(tmp_path / "count_allocations.so")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = "tests/native/count_allocations.cpp"
    flags = ("-std=c++20", "-O1", "-fPIC", "-shared")
    subprocess.run([*compiler, *flags, source, "-o", counter], cwd=ROOT, check=True)
    env = {**os.environ, "LD_PRELOAD": counter, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.allocation_check"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 19
    for name, calls in found.items():
        for count, size, count_of_results, size_of_results in calls:
            assert count_of_results > 0, "allocations are not counted"
            assert count <= count_of_results, (name, calls)
            assert size <= size_of_results, (name, calls)
