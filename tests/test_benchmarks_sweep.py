"""Runs that are interrupted, die or find too little memory lose nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

from benchmarks import environment, results, resume, runner
from benchmarks.accuracy import ABSOLUTE, Accuracy
from benchmarks.cli import main
from benchmarks.limits import Limits
from benchmarks.ops import OPS
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.registry import Case, Implementation, Inputs, Output
from benchmarks.routing import ROUTINGS
from benchmarks.sweep import (
    CUT_OFF,
    DEVICE_LOST,
    NOT_STARTED,
    PLANS,
    Part,
    compile_first,
    is_right,
    launch,
    outcome,
    start_process,
    sweep,
)
from benchmarks.tables import vs_best_peer
from tests.conftest import HAS_GPU

FIRST, SECOND = "T=3,H=16,I=8,E=4,K=2", "T=5,H=16,I=8,E=4,K=2"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(flops=1e11, bytes=1e10)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *arguments: limits)


def run(out: Path, *options: str, shapes: Sequence[str] = (FIRST, SECOND)) -> int:
    arguments = ["run", "fused_experts", "--device", "cpu", "--dtype", "fp32", "--rounds", "1"]
    arguments += ["--seconds", "1", "--out", str(out), "--direction", "forward", "--shape"]
    return main([*arguments, *shapes, "--provider", OURS, "torch", *options])


def provider(monkeypatch: pytest.MonkeyPatch, name: str, call: Any) -> None:
    """A provider whose calls go through ``call``, after plain PyTorch."""

    torch_chain = PROVIDERS["torch"].builders["fused_experts"]

    def build(case: Case) -> Implementation:
        right = torch_chain(case)

        def computed(inputs: Inputs) -> Output:
            call(case)
            return right.run(inputs)

        return Implementation(computed)

    made = dataclasses.replace(PROVIDERS["torch"], name=name, builders={"fused_experts": build})
    monkeypatch.setitem(PROVIDERS, name, made)


# ----------------------------------------------------------------------------------------- resume


def test_a_resumed_run_does_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.json"
    assert run(out, "--resume", shapes=[FIRST]) == 0
    before = results.read(out)["rows"]
    assert run(out, "--resume") == 0
    after = results.read(out)["rows"]
    assert after[: len(before)] == before
    assert [row["shape"] for row in after] == ["T3 H16 I8 E4 K2"] * 2 + ["T5 H16 I8 E4 K2"] * 2
    text = out.read_text()
    assert run(out, "--resume") == 0
    assert out.read_text() == text
    assert not resume.marker(out).exists()
    capsys.readouterr()


def test_another_commits_file_is_moved_aside(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run(out, shapes=[FIRST])
    document = json.loads(out.read_text())
    document["commit"]["hash"] = "0" * 40
    out.write_text(json.dumps(document))
    run(out, "--resume", shapes=[SECOND])
    assert {row["shape"] for row in results.read(out)["rows"]} == {"T5 H16 I8 E4 K2"}
    assert json.loads(out.with_suffix(".old").read_text()) == document


def test_what_ends_the_process_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process really dies, and the next one says of what."""
    out = tmp_path / "out.json"
    provider(monkeypatch, "deadly", lambda case: os._exit(7) if case.shape["T"] == 5 else None)
    child = os.fork()
    if child == 0:
        try:
            run(out, "deadly", "--resume")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert json.loads(resume.marker(out).read_text())["provider"] == "deadly"
    assert run(out, "deadly", "--resume") == 0
    found = results.read(out)
    rows = {(row["shape"], row["provider"]): row for row in found["rows"]}
    assert rows["T3 H16 I8 E4 K2", "deadly"]["ms"] > 0
    note = rows["T5 H16 I8 E4 K2", "deadly"]["note"]
    assert note == "does not run: it ended the process at T5 H16 I8 E4 K2 fp32 uniform"
    assert rows["T5 H16 I8 E4 K2", OURS]["ms"] > 0
    assert found["crashed"] == {"deadly": note}


def test_rows_of_inference_outlast_a_crash_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only what is missing is computed then."""
    out, modes = tmp_path / "out.json", []

    def deadly(case: Case) -> None:
        modes.append("training" if torch.is_grad_enabled() else "inference")
        if modes[-1] == "training":
            os._exit(7)

    provider(monkeypatch, "deadly", deadly)
    both = ["deadly", "--resume", "--direction", "forward", "backward"]
    child = os.fork()
    if child == 0:
        try:
            run(out, *both, shapes=[FIRST])
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    before = results.read(out)["rows"]
    assert {(row["direction"], row["provider"]) for row in before if row["ms"]} == {
        ("forward", name) for name in (OURS, "torch", "deadly")
    }
    assert run(out, *both, shapes=[FIRST]) == 0
    assert modes == []
    rows = results.read(out)["rows"]
    assert rows[: len(before)] == before
    assert {row["provider"] for row in rows[len(before) :] if row["ms"]} == {OURS, "torch"}
    assert {row["direction"] for row in rows[len(before) :]} == {"backward"}


def test_who_broke_the_device_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one whose turn comes after that, and fails too."""
    out, calls, broken = tmp_path / "out.json", [], []

    def innocent(case: Case) -> None:
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    def deadly(case: Case) -> None:
        calls.append(case)
        if len(calls) == 5:  # two to try it, two in its first turn
            broken.append(case)
            raise RuntimeError("an illegal memory access was encountered")

    def check(device: torch.device, name: str) -> None:
        if broken:
            raise runner.DeviceLostError(f"{name} left the GPU unusable")

    provider(monkeypatch, "innocent", innocent)
    provider(monkeypatch, "deadly", deadly)
    monkeypatch.setattr(runner, "check_device", check)
    three = ["innocent", "deadly", "--resume", "--rounds", "3"]
    assert run(out, *three, shapes=[FIRST]) == DEVICE_LOST
    broken.clear()
    assert run(out, *three, shapes=[FIRST]) == 0
    assert set(results.read(out)["crashed"]) == {"deadly"}


def test_an_interrupt_blames_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(case: Case) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out.json"
    provider(monkeypatch, "slow", interrupted)
    assert run(out, "slow", "--resume") == 130
    assert not resume.marker(out).exists()


def test_a_lost_device_ends_the_process_and_names_the_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(case: Case) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def lost(device: torch.device, name: str) -> None:
        raise runner.DeviceLostError(f"{name} left the GPU unusable")

    out = tmp_path / "out.json"
    provider(monkeypatch, "deadly", fail)
    monkeypatch.setattr(runner, "check_device", lost)
    assert run(out, "deadly", "--resume") == DEVICE_LOST
    assert "deadly left the GPU unusable; --resume goes on without" in capsys.readouterr().err
    assert run(out, "deadly", "--resume") == 0
    assert {row["provider"] for row in results.read(out)["rows"] if row["ms"]} == {OURS, "torch"}


# ----------------------------------------------------------------------------------- little memory


def test_a_case_that_does_not_fit_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS["fused_experts"]

    def make_case(shape: Any, *arguments: Any) -> Case:
        if shape["T"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return op.make_case(shape, *arguments)

    monkeypatch.setitem(OPS, op.name, dataclasses.replace(op, make_case=make_case))
    out = tmp_path / "out.json"
    assert run(out) == 1
    rows = results.read(out)["rows"]
    assert [row["note"] for row in rows if row["shape"].startswith("T3")] == [
        "its inputs do not fit: CUDA out of memory"
    ] * 2
    assert all(row["ms"] > 0 for row in rows if row["shape"].startswith("T5"))


def test_without_the_yardstick_a_bound_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(case: Case) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    provider(monkeypatch, "torch", no_memory)
    out = tmp_path / "out.json"
    assert run(out) == 0
    rows = {row["provider"]: row for row in results.read(out)["rows"]}
    assert rows["torch"]["note"] == "does not run: OutOfMemoryError: CUDA out of memory"
    assert rows[OURS]["ms"] > 0
    bad = Accuracy(errors={"y": 0.05})
    assert bad.verdict(Accuracy(), ABSOLUTE[torch.bfloat16]) == "error of y is above 2e-02"
    assert Accuracy(errors={"y": 0.004}).verdict(None, ABSOLUTE[torch.bfloat16]) == ""
    assert "above" in Accuracy(errors={"y": float("nan")}).verdict(None, ABSOLUTE[torch.bfloat16])


# ------------------------------------------------------------------------------------------ gpt-oss


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_layer_of_gpt_oss(direction: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--dtype", "bf16", "fp32", "--rounds", "1", "--seconds", "1"]
    options += ["--shape", "T=6,H=32,I=16,E=8,K=2,swigluoai", "--direction", direction]
    assert main(["run", "fused_experts", "--out", str(out), *options]) == 0
    rows = results.read(out)["rows"]
    names = {row["provider"] for row in rows if row["ms"]}
    assert {OURS, "torch", "transformers_eager", "transformers_grouped_mm"} <= names
    for row in rows:
        assert row["shape"] == "T6 H32 I16 E8 K2 swigluoai"
        assert (row["void"], row["note"]) == ("", "")


def test_every_model_of_the_sweep_is_a_shape_set() -> None:
    for plan in PLANS.values():
        for part in plan:
            ops, shapes = [], []
            words = iter(part.arguments[1:])
            for word in words:
                if word in OPS:
                    ops.append(word)
                elif word == "--shape":
                    break
            for word in words:
                if word.startswith("--"):
                    break
                shapes.append(word)
            for op in ops:
                found = OPS[op].shapes("cuda", shapes)
                assert len(found) >= max(1, len(shapes)), part


def test_the_full_sweep_has_every_op_of_one_gpu() -> None:
    measured = {word for part in PLANS["full"] for word in part.arguments}
    assert {name for name, op in OPS.items() if not op.on_ranks} <= measured


def test_the_full_sweep_has_every_routing_of_the_layer() -> None:
    routings = {"uniform"}
    for part in PLANS["full"]:
        if "fused_experts" in part.arguments and "--routing" in part.arguments:
            routings.add(part.arguments[part.arguments.index("--routing") + 1])
    assert routings == set(ROUTINGS)


# ------------------------------------------------------------------------------------------- ratios


def test_the_ratio_to_the_best_peer() -> None:
    group = [
        {"provider": name, "ms_min": ms}
        for name, ms in {OURS: 2.0, "torch": 4.0, "liger": 3.0, "dense_limit": 1.0}.items()
    ] + [{"provider": "sonicmoe", "ms_min": None}]
    ratios = [vs_best_peer(row, group) for row in group]
    assert ratios == [1.5, 0.5, pytest.approx(2 / 3), None, None]


# -------------------------------------------------------------------------------------------- sweep


class Runs:
    """Exit codes by part, in turn, on a clock of its own."""

    def __init__(self, codes: dict[str, list[int]], seconds: float) -> None:
        self.codes, self.seconds, self.now = codes, seconds, 0.0
        self.started: list[tuple[str, float]] = []

    def start(self, arguments: Sequence[str], seconds: float) -> int:
        assert arguments[-1] == "--resume"
        self.started.append((arguments[1], seconds))
        self.now += min(self.seconds, seconds)
        return self.codes[arguments[1]].pop(0)


def test_a_sweep_restarts_what_dies_and_goes_on(tmp_path: Path) -> None:
    parts = [Part(name, ("run", name), 100.0) for name in ("a", "b", "c", "d")]
    runs = Runs({"a": [DEVICE_LOST, -11, 0], "b": [1], "c": [-9] * 9, "d": [2]}, 10.0)
    done = sweep(parts, tmp_path, "cuda", 1000.0, runs.start, lambda: runs.now)
    assert [part["outcome"] for part in done] == [
        "done",
        "rows of ours are wrong or failed",
        "died of signal 9",
        "failed with code 2",
    ]
    assert [part["restarts"] for part in done] == [2, 0, 3, 0]
    assert json.loads((tmp_path / "sweep.json").read_text())["parts"] == [
        {**part, "arguments": list(part["arguments"])} for part in done
    ]


def test_a_sweep_ends_in_time(tmp_path: Path) -> None:
    parts = [Part(name, ("run", name), 60.0) for name in ("a", "b", "c")]
    runs = Runs({"a": [124], "b": [124], "c": [0]}, 1e9)
    done = sweep(parts, tmp_path, "cuda", 100.0, runs.start, lambda: runs.now)
    assert [part["outcome"] for part in done] == ["out of time", CUT_OFF, "done"]
    # the limit of the part, then what is left of all; with time to write after an interrupt
    assert runs.started[0] == ("a", 45.0)
    assert runs.started[1] == ("b", 41.25)
    assert runs.now <= 100.0
    assert not is_right(done)


def test_a_sweep_whose_time_is_over_is_right_as_far_as_it_came(tmp_path: Path) -> None:
    parts = [Part(name, ("run", name), 60.0) for name in ("a", "b", "c")]
    runs = Runs({"a": [0], "b": [124], "c": [0]}, 40.0)
    done = sweep(parts, tmp_path, "cuda", 58.0, runs.start, lambda: runs.now)
    assert [part["outcome"] for part in done] == ["done", CUT_OFF, NOT_STARTED]
    assert is_right(done)
    assert not is_right(done[1:])  # a run that hangs would end so, too


class Compiling:
    """A process that ends after some seconds, on the clock of all."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.end, self.killed = clock, clock[0] + seconds, False

    def wait(self, seconds: float | None = None) -> int:
        if not self.killed and seconds is not None:
            self.clock[0] = max(self.clock[0], min(self.end, self.clock[0] + seconds))
            if self.clock[0] < self.end:
                raise subprocess.TimeoutExpired("compile", seconds)
        return 0

    def kill(self) -> None:
        self.killed = True


def test_kernels_are_compiled_side_by_side_for_a_while(tmp_path: Path) -> None:
    clock, begun = [0.0], []
    ends = {"a": 10.0, "b": 1e9, "c": 20.0, "d": 1e9}

    def begin(arguments: Sequence[str], output: TextIO) -> Any:
        begun.append((arguments, Compiling(clock, ends[arguments[1]])))
        return begun[-1][1]

    parts = [Part(name, ("run", name, "--provider", "torch"), 60.0) for name in ("a", "b", "c")]
    parts.append(Part("d", ("run", "d"), 60.0))
    compile_first(parts, tmp_path, "cuda", 45.0, 3, begin, lambda: clock[0])
    assert [arguments[1] for arguments, _ in begun] == ["a", "b", "c"]
    assert [process.killed for _, process in begun] == [False, True, False]
    assert clock == [45.0]
    folders = {arguments[arguments.index("--out") + 1] for arguments, _ in begun}
    assert len(folders) == 3
    assert not any(folder.startswith(str(tmp_path)) for folder in folders)


def test_what_compiles_runs_ours_alone(tmp_path: Path) -> None:
    """Each mode is called, and nothing is timed that could take long."""
    part = PLANS["main"][0]
    seen = []

    def begin(arguments: Sequence[str], output: TextIO) -> Any:
        words = [word for word in arguments if word != "qwen3-30b-a3b"]
        place = words.index("--shape")
        code = main([*words[: place + 1], FIRST, *words[place + 1 :], "--dtype", "fp32"])
        found = results.read(Path(arguments[arguments.index("--out") + 1]) / "fused_experts.json")
        seen.extend((code, [(row["provider"], row["direction"]) for row in found["rows"]]))
        return Compiling([0.0], 0.0)

    compile_first([part], tmp_path, "cpu", 45.0, 1, begin)
    assert seen == [0, [(OURS, "forward"), (OURS, "forward+backward")]]


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_a_sweep_of_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "main", "--out", "nowhere"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_installed_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PEERS", ("pytest", "no-such-library"))
    versions = environment.describe(torch.device("cpu"))["versions"]
    assert versions["pytest"] == pytest.__version__
    assert "no-such-library" not in versions


def test_a_process_that_takes_too_long_is_ended() -> None:
    assert outcome(start_process(["list", "--device", "cpu"], 0.3)) == "out of time"


def test_an_interrupt_is_heard_in_the_background() -> None:
    """Where a shell has told this process to ignore it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = launch(["list", "--device", "cpu"])
        process.send_signal(signal.SIGINT)
        assert process.wait(120) != 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_copy_without_git_is_known_by_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("csrc/a.cpp", "moe_kernels/b.py", "benchmarks/results/x.json", "docs/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    first = environment.commit()
    assert (first["hash"], first["dirty"]) == (None, False)
    for name in ("benchmarks/results/x.json", "docs/c.md"):
        (tmp_path / name).write_text("two")
    assert environment.commit() == first
    for name in ("csrc/a.cpp", "moe_kernels/b.py"):
        (tmp_path / name).write_text("two")
        assert environment.commit() != first
        (tmp_path / name).write_text("one")
    out = tmp_path / "out.json"
    run(out, shapes=[FIRST])
    assert main(["report", str(out), "--tables", "--out", str(tmp_path / "report")]) == 0
    assert f"sources {first['sources']}" in (tmp_path / "report" / "report.md").read_text()


def test_device_and_commit_are_said(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run(out, shapes=[FIRST])
    found = results.read(out)
    assert found["commit"] == environment.commit()
    for row in found["rows"]:
        assert {
            *("op", "shape", "direction", "provider", "ms", "tflops", "over_floor"),
            *("peak_bytes", "error"),
        } <= set(row)
