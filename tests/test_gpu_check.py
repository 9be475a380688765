"""``make gpu-check`` goes on whatever fails, and leaves what it has.

A script stands in for Python: it notes what it is asked for, and fails where a case says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
echo "$MOE_KERNELS_CUDA ${MOE_KERNELS_BACKEND:-native} $*" >> "$CALLS"
case "$MOE_KERNELS_CUDA $*" in
*"import $MISSING") exit 1 ;;
off*setup.py*) echo without CUDA; exit ${OFF:-0} ;;
*setup.py*) echo with CUDA; exit ${ON:-0} ;;
*sweep*) exit ${SWEEP:-0} ;;
*"-m pytest"*ranks.xml*) exit ${RANKS:-0} ;;
*"-m pytest"*) exit ${TESTS:-0} ;;
esac
"""


class Checked:
    """One run: its exit code, what Python was asked for, and the folder of results."""

    def __init__(self, folder: Path, **environment: str) -> None:
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)
        self.out = folder / "out"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MOE_KERNELS_", "MAKE"))
        }
        environment = {"MISSING": "nothing", **inherited, **environment}
        environment |= {"CALLS": str(folder / "calls")}
        command = ["make", "-C", ROOT, "gpu-check", f"PYTHON={folder}/python", f"OUT={self.out}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        self.code, self.error = done.returncode, done.stderr
        self.calls = (folder / "calls").read_text().splitlines()

    def call(self, word: str) -> str:
        (found,) = [call for call in self.calls if word in call]
        return found


def test_all_is_done_in_order(tmp_path: Path) -> None:
    run = Checked(tmp_path)
    assert run.code == 0, run.error
    done = [call for call in run.calls if " -c " not in call]
    assert [call.split(" ")[2:5] for call in done] == [
        ["setup.py", "--quiet", "build_ext"],
        ["-m", "benchmarks", "sweep"],
        ["-m", "benchmarks", "report"],
        ["-m", "pytest", "-m"],
        ["-m", "pytest", "-m"],
    ]
    assert all(call.startswith("on native ") for call in run.calls)
    words = run.call("sweep").split()
    assert 230 < int(words[words.index("--limit") + 1]) <= 260
    cores = len(os.sched_getaffinity(0))
    for call, processes in ((run.call("tests.xml"), 16), (run.call("ranks.xml"), 5)):
        assert f"--numprocesses={min(cores, processes)}" in call
        assert "--timeout=75" in call
    first = run.call("tests.xml").split("--first ")[1].split(" ")[0]
    assert (ROOT / first).exists()
    ranks = run.call("tests.xml").split("--ignore=")[1].split(" ")[0]
    assert run.call("ranks.xml").endswith(ranks)
    assert (ROOT / ranks).exists()
    with tarfile.open(run.out.with_suffix(".tgz")) as archive:
        assert "./build.log" in archive.getnames()


@pytest.mark.parametrize(
    ("fails", "backend"),
    [
        ({"ON": "1"}, "native"),
        ({"ON": "1", "OFF": "1"}, "triton"),
        ({"SWEEP": "1"}, "native"),
        ({"TESTS": "1"}, "native"),
        ({"RANKS": "1"}, "native"),
        ({"MISSING": "pytest"}, "native"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_what_fails_is_said_and_the_rest_goes_on(
    tmp_path: Path, fails: dict[str, str], backend: str
) -> None:
    run = Checked(tmp_path, **fails)
    assert run.code != 0
    assert run.call("sweep").split(" ")[1] == backend
    assert run.call("report")
    if "MISSING" in fails:
        assert "needs pytest" in run.error
        assert not any("-m pytest" in call for call in run.calls)
    else:
        assert run.call("tests.xml").split(" ")[1] == run.call("ranks.xml").split(" ")[1] == backend
    assert run.out.with_suffix(".tgz").exists()
    if "ON" in fails:
        assert "failed or took too long" in run.error
        assert (run.out / "build.log").read_text() == "with CUDA\n"
        assert (run.out / "build-off.log").read_text() == "without CUDA\n"
    assert ("going on with Triton" in run.error) == (backend == "triton")


def test_results_of_tests_are_written_as_they_come(tmp_path: Path) -> None:
    """Also if the process is killed in one of them, and those of one file before all others."""
    (tmp_path / "test_three.py").write_text(
        "import os\n"
        "def test_first(): pass\n"
        "def test_second(): assert 1 == 2\n"
        "def test_third(): os._exit(9)\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_zero.py").write_text("def test_zeroth(): pass\n")
    shutil.copy(ROOT / "tests" / "progress.py", tmp_path / "progress.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "progress", "--progress", "lines"]
    command += ["--first", "test_zero.py"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [(line["test"], line["outcome"]) for line in lines] == [
        ("test_broken.py", "failed"),
        ("test_zero.py::test_zeroth", "started"),
        ("test_zero.py::test_zeroth", "passed"),
        ("test_three.py::test_first", "started"),
        ("test_three.py::test_first", "passed"),
        ("test_three.py::test_second", "started"),
        ("test_three.py::test_second", "failed"),
        ("test_three.py::test_third", "started"),
    ]
    assert "no_such_module" in lines[0]["text"]
    assert "assert 1 == 2" in lines[6]["text"]
