"""Every Triton kernel compiles for GPUs that need not be here, and to what it was designed for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (
    90,
    pytest.param(80, marks=pytest.mark.slow),
    pytest.param(100, marks=pytest.mark.slow),
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """One process an architecture, since kernels here may be decorated for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["MOE_KERNELS_BACKEND"] = "reference"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_check", "--arch", str(request.param)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_keep_their_values_in_registers_and_fit(reports: list[dict[str, Any]]) -> None:
    assert len(reports) >= 18
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["fits"], report
