"""The limits: what the machine allows, and what they leave to the others meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.cli import main
from benchmarks.limits import Limits
from benchmarks.ops import OPS
from benchmarks.providers import DENSE, PROVIDERS
from benchmarks.registry import Case, Implementation, Inputs, Output, Shape
from tests.kernels.test_triton_memory import Allocations

SHAPES = {
    "fused_experts": {"T": 40, "H": 64, "I": 48, "E": 4, "K": 2},
    "grouped_gemm": {"R": 80, "D": 64, "N": 96, "E": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_dense_products_hold_memory_during_calls_alone(name: str) -> None:
    """With many rows it is tens of gigabytes, which other libraries then have."""
    op, shape = OPS[name], Shape(SHAPES[name])
    case = op.make_case(shape, torch.bfloat16, torch.device("cpu"), "uniform", 0)
    inputs = case.inputs[0]
    with Allocations() as seen:
        limit = PROVIDERS[DENSE].builders[name](case)
        assert seen.alive() < 64
        with limit.during():
            out = limit.run(inputs)
            limit.backward(out, inputs)
            rows = shape.sizes.get("R", 80)
            assert out.shape[0] == rows
            assert seen.alive() > 2 * 2 * rows * (64 + 96)  # operands and results in bf16
            assert bool(out.isfinite().all())
            del out
        assert seen.alive() < 64
        with pytest.raises(RuntimeError, match="no memory"), limit.during():
            raise RuntimeError("no memory")
        assert seen.alive() < 64


def test_a_provider_has_its_memory_in_its_own_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    torch_chain = PROVIDERS["torch"].builders["fused_experts"]

    def spy(name: str) -> Any:
        def build(case: Case) -> Implementation:
            right = torch_chain(case)

            def run(inputs: Inputs) -> Output:
                calls.append((name, list(held)))
                return right.run(inputs)

            @contextmanager
            def during() -> Iterator[None]:
                held.append(name)
                try:
                    yield
                finally:
                    held.remove(name)

            return Implementation(run, during=during)

        return build

    for name in ("first", "second"):
        made = {"fused_experts": spy(name)}
        provider = dataclasses.replace(PROVIDERS["torch"], name=name, builders=made)
        monkeypatch.setitem(PROVIDERS, name, provider)
    limits = Limits(flops=1e11, bytes=1e10)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *arguments: limits)
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--dtype", "fp32", "--rounds", "2", "--out", str(out)]
    options += ["--shape", "T=3,H=16,I=8,E=4,K=2", "--provider", "first", "second"]
    assert main(["run", "fused_experts", *options]) == 0
    assert all(row["ms"] > 0 for row in results.read(out)["rows"])
    assert {name for name, _ in calls} == {"first", "second"}
    assert all(during == [name] for name, during in calls)
    assert held == []


def test_dense_products_compute_the_layer_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many flops as the op says, forward and backward."""
    flops: list[float] = []
    multiply = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        assert out.shape == (a.shape[0], b.shape[1])
        flops.append(2.0 * a.shape[0] * a.shape[1] * b.shape[1])
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    for name, sizes in SHAPES.items():
        op = OPS[name]
        case = op.make_case(Shape(sizes), torch.float32, torch.device("cpu"), "uniform", 0)
        limit, cost = PROVIDERS[DENSE].builders[name](case), op.cost(case)
        with limit.during():
            out = limit.run(case.inputs[0])
            assert sum(flops) == cost["forward"].flops
            flops.clear()
            limit.backward(out, case.inputs[0])
            assert sum(flops) == cost["backward"].flops
            flops.clear()


def test_dense_products_are_those_whose_rate_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch multiplies floats faster than 16 bits; the file says so, also once resumed."""
    multiplied: list[torch.dtype] = []
    multiply = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        multiplied.append(a.dtype)
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    limits = Limits(flops=1e11, bytes=1e10, product=torch.float32)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *arguments: limits)
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--dtype", "bf16", "--rounds", "1", "--out", str(out)]
    options += ["--shape", "T=3,H=16,I=8,E=4,K=2", "--provider", DENSE, "--resume"]
    for _ in range(2):
        assert main(["run", "fused_experts", *options]) == 0
        rates = results.read(out)["limits"]["bf16"]
        assert rates == {
            "flops_per_second": 1e11, "bytes_per_second": 1e10, "product_dtype": "fp32"
        }  # fmt: skip
    assert set(multiplied) == {torch.float32}


def test_what_limits_were_measured_with_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything else is made: on a GPU several processes compile at once."""
    events: list[str] = []
    op = OPS["expert_activation"]

    def measured(*arguments: Any) -> Limits:
        events.append("limits")
        return Limits(flops=1e11, bytes=1e10)

    def make_case(*arguments: Any) -> Case:
        events.append("case")
        return op.make_case(*arguments)

    monkeypatch.setattr("benchmarks.runner.measure_limits", measured)
    monkeypatch.setattr("benchmarks.runner.free", lambda device: events.append("free"))
    monkeypatch.setitem(OPS, op.name, dataclasses.replace(op, make_case=make_case))
    options = ["--device", "cpu", "--dtype", "fp32", "--rounds", "1", "--seconds", "1"]
    options += ["--shape", "R=3,I=8", "--out", str(tmp_path / "out.json")]
    assert main(["run", op.name, *options]) == 0
    assert events[:3] == ["limits", "free", "case"]
