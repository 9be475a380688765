"""What the Triton launchers ask of the host, proven where nothing can be launched.

That a GPU is never waited for is measured in test_gpu.py; here, that nothing is called that would.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.test_triton_launches import GATHER

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "MOE_KERNELS_BACKEND", "MOE_KERNELS_CHECK")
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launch_check"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # a read by the host ends the process
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_every_way_to_read_is_caught(found: dict[str, Any]) -> None:
    assert found["caught"] == found["reads"]


def test_every_op_launches_its_kernels_and_reads_nothing(found: dict[str, Any]) -> None:
    assert found["left out"] == []
    launched = set(found["launches"]["every op"]["all"])
    assert launched >= {
        "_topk_router_kernel",
        "_topk_router_backward_kernel",
        "_permute_kernel",
        "_unpermute_kernel",
        "_unpermute_backward_kernel",
        "_grouped_gemm_kernel",
        "_wgrad_kernel",
        "_sum_rows_kernel",
        "_up_kernel",
        "_down_backward_kernel",
        "_scaled_grouped_gemm_kernel",
        "_scaled_up_kernel",
        "_activate_quantize_backward_kernel",
        "_round_tokens_kernel",
        "_dequantize_rows_kernel",
    }


def test_a_token_takes_few_launches(found: dict[str, Any]) -> None:
    """Sort with tiles, up, down, combine; and the router, which clears the loads first."""
    steps = found["launches"]["one token"]
    assert steps["experts"] == [
        "_sort_one_block_kernel",
        *GATHER,
        "_up_kernel",
        "_grouped_gemm_kernel",
        "_unpermute_kernel",
    ]
    assert len(steps["router"]) <= 2
    assert found["launches"]["one token, biased"]["experts"] == steps["experts"]
    experts = len(steps["experts"])
    assert len(steps["forward"]) <= len(steps["router"]) + experts  # nothing for the tail of h
    assert len(steps["backward"]) <= 9 + 2 * len(GATHER)


def test_many_tokens_take_few_more(found: dict[str, Any]) -> None:
    few, many = found["launches"]["some tokens"], found["launches"]["many tokens"]
    assert len(few["experts"]) == 4 + len(GATHER)
    # two launches sort and map tiles; another where the two products differ in tiles
    assert len(many["experts"]) <= len(few["experts"]) + 2
    assert len(many["backward"]) <= 10 + 2 * len(GATHER)


def test_pytorch_adds_nothing_to_the_experts(found: dict[str, Any]) -> None:
    for name, steps in found["launches"].items():
        if name != "every op":
            assert not [launch for launch in steps["experts"] if launch.startswith("aten::")], name


def test_repeated_calls_launch_what_decided_ones_do(found: dict[str, Any]) -> None:
    for name in ("every op", "together"):
        calls = found["repeated"][name]
        assert calls["different"] is None
        assert calls["launches"] > 80
        assert calls["repeated"] > 8 * calls["decided"]


def test_only_calls_that_can_be_told_apart_are_repeated(found: dict[str, Any]) -> None:
    repeated = {name: calls["repeated"] for name, calls in found["repeated"].items()}
    assert repeated["experts"] == repeated["adjacent"] == 1
    assert repeated["unaligned"] == 2
    for name in ("overlapping", "zeroed", "copied", "hooked", "checked", "tf32"):
        assert repeated[name] == 0, name
    for name in ("experts", "overlapping", "adjacent", "copied", "hooked", "unaligned"):
        assert found["repeated"][name]["different"] is None, name


def test_calls_like_earlier_ones_are_not_checked_again(found: dict[str, Any]) -> None:
    """But where someone is to hear of the op, or the dispatcher has something to do."""
    known = found["known"]
    for name in ("first calls", "router", "fewer rows"):
        assert known[name] == [1, 1, 0, 0], name
    assert known["again"] == 0
    assert known["inference"] == [0, 0]
    assert known["another sign of zero"] == [1, 1, 0, 0, 1]
    assert known["a mode"] == [1, 2 * 3 * 2 * (64 * 64 + 32 * 64)]
    for name in ("a profiler", "a profiler of all threads", "an observer"):
        assert known[name] == [1, 1], name
    for name in ("a mode of functions", "a trace", "a fake mode", "autocast", "gradients"):
        assert known[name] == 1, name
    for name in ("a negative view", "a zero tensor", "a functional tensor"):
        assert known[name] == 1, name
    assert known["a subclass"] == [1] * 4
    assert known["meta"] == [3, 2]


def test_what_is_like_an_earlier_call_and_wrong_is_an_error(found: dict[str, Any]) -> None:
    known = found["known"]
    for name in ("sparse", "nested", "nested ids", "a flag of 1", "2.0 of experts"):
        assert known[name] == "TypeError", name
    for name in ("no tensor", "an array"):
        assert known[name] == "TypeError", name
    assert known["too many rows"] == known["unchecked"] == "ValueError"
    assert not known["kept"]


def test_all_launches_can_be_noted() -> None:
    """A launch that goes past ``launch`` would be missing from a plan."""
    for path in (ROOT / "moe_kernels" / "triton").glob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        launched = [func.value for func in calls if isinstance(func, ast.Subscript)]
        names = [ast.unparse(value) for value in launched]
        assert names == (["kernel"] if path.name == "_replay.py" else []), path
