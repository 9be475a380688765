"""What tuning runs and times, and how it checks the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.ops._shapes import layer, tuning_set
from benchmarks.tuning import problems
from benchmarks.tuning.command import KERNELS, _buckets
from benchmarks.tuning.problems import PROBLEMS, Layer, Problem, bucket_of
from moe_kernels.triton._config_tables import Config
from moe_kernels.triton._configs import default_config
from moe_kernels.triton._wgrad import weight_gradient
from tests.conftest import HAS_GPU
from tests.kernels.interpreter import mended_interpreter


@pytest.fixture
def device() -> Iterator[torch.device]:
    with nullcontext() if HAS_GPU else mended_interpreter():
        yield torch.device("cuda" if HAS_GPU else "cpu")


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("kernel", KERNELS)
def test_problems_check_their_kernels(kernel: str, tokens: int, device: torch.device) -> None:
    # float8 is rounded in the product where a tile has all 128 columns of a scale
    shape = layer(tokens, 48, 128 if kernel == "scaled_grouped_gemm" else 32, 3, 2)
    for part in PROBLEMS[kernel]:
        problem = part.make(Layer(shape, torch.bfloat16, device))
        assert problem.bucket == bucket_of(kernel, part, shape, torch.bfloat16)
        assert (problem.contracted, problem.columns) == part.sides(shape)
        precision = problem.bucket.precision
        default = default_config(kernel, 90, precision, problem.rows, problem.experts)
        assert problem.wrong(default) == ""
        results = problem.results()
        other = Config(16, 32, 32, warps=4, stages=2, group_m=1, programs=2)
        assert problem.wrong(other, results) == ""
        idle = dataclasses.replace(problem, run=lambda cut: None)
        assert "error against float64 nan" in idle.wrong(default)

        def off(cut: Config, problem: Problem = problem) -> None:
            problem.finish(cut)
            problem.outputs[0].mul_(1.02)

        assert "error against float64" in dataclasses.replace(problem, finish=off).wrong(default)
        results[0][-1] += 1  # a row or expert outside the sample
        assert "differs from the default" in problem.wrong(default, results)


def test_backward_is_timed_with_the_weight_gradient_that_was_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def recorded(*args: Any, cut: Config | None = None, **options: Any) -> None:
        asked.append(cut)
        weight_gradient(*args, cut=cut, **options)

    monkeypatch.setattr(problems, "weight_gradient", recorded)
    shape, found = layer(70, 48, 32, 3, 2), Config(32, 32, 16, warps=4, stages=2)
    bucket = bucket_of("wgrad", PROBLEMS["wgrad"][1], shape, torch.bfloat16)
    made = Layer(shape, torch.bfloat16, device, tuned={bucket: found})
    backward = PROBLEMS["down_backward"][0].make(made)
    assert backward.wrong(default_config("down_backward", 90, "half", made.rows, 3)) == ""
    assert asked == [found]
    # and its buckets come later
    order = [bucket for bucket, _ in _buckets(KERNELS, tuning_set(), "bf16")]
    later = [bucket for bucket in order if bucket.kernel == "down_backward"]
    assert later
    for bucket in later:
        before = dataclasses.replace(bucket, kernel="wgrad")
        assert order.index(before) < order.index(bucket)
