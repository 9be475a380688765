"""What the benchmarks ask of a machine with a GPU, on one that has neither it nor all packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cli, environment, results
from benchmarks.cli import main
from benchmarks.ops import OPS
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.registry import Shape
from tests.test_benchmarks import run


def test_clocks_are_those_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    busy: list[str] = []
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1, uuid="ab"
    )

    @contextmanager
    def load(device: torch.device) -> Iterator[None]:
        busy.append(device.type)
        yield
        busy.clear()

    def output(*command: str) -> str:
        if command[0] != "nvidia-smi":
            return ""
        assert busy == ["cuda"]
        assert "--id=GPU-ab" in command
        return "1980, 1980, 3201, 700.00, 580.1\n"

    monkeypatch.setattr(environment, "_busy", load)
    monkeypatch.setattr(environment, "_output", output)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    described = environment.describe(torch.device("cuda"))
    assert busy == []
    assert described["device"]["name"] == "NVIDIA H200"
    assert described["clocks"] == {
        "clocks.sm": "1980",
        "clocks.max.sm": "1980",
        "clocks.mem": "3201",
        "power.limit": "700.00",
        "driver_version": "580.1",
    }


def test_results_say_device_clocks_versions_and_commit(tmp_path: Path) -> None:
    _, found = run("expert_activation", tmp_path / "out.json", "--dtype", "fp32")
    assert {"device", "clocks", "versions", "commit", "rows"} <= set(found)
    assert "mhz" in found["clocks"]


def test_a_report_without_matplotlib_has_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "out.json", tmp_path / "report"
    run("expert_activation", out, "--dtype", "fp32")
    find_spec: Any = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else find_spec)
    assert main(["report", str(out), "--out", str(report)]) == 0
    assert "no plots, which need matplotlib" in capsys.readouterr().err
    assert "### expert_activation, forward" in (report / "report.md").read_text()
    assert not list(report.rglob("*.png"))
    assert results.read(out)["rows"]


@pytest.mark.parametrize("variant", ["", "swigluoai"])
def test_a_layer_in_a_graph_is_captured_once_and_replayed(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a graph that does at each replay what was captured, on the CPU."""
    shape = Shape({"T": 2, "H": 32, "I": 16, "E": 8, "K": 2, "N": 3}, variant)
    case = OPS["moe_layer"].make_case(shape, torch.float32, torch.device("cpu"), "uniform", 0)
    eager = PROVIDERS[OURS].builders["moe_layer"](case)
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")
            result.copy_(eager.run(seen))

    @contextmanager
    def capturing(graph: Graph) -> Iterator[None]:
        done.append("capture")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextmanager(lambda: iter([0]))())
    implementation = PROVIDERS["moe_kernels_graph"].builders["moe_layer"](case)
    with torch.inference_mode():
        for index in (0, 1, 0):
            seen = case.inputs[index]
            result = torch.empty_like(seen["x"])
            out = implementation.run(seen)
            assert done[-3:] == ["replay"] * 3
            assert torch.equal(result, eager.run(seen))
            if index == 0 and done.count("replay") == 3:
                assert torch.equal(out, result)  # captured with the first inputs
    assert done.count("capture") == 1
