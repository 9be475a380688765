"""What the benchmark commands refuse, leave out and write, whatever they measure."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cli, results, resume, simulate_command
from benchmarks.accuracy import judge
from benchmarks.cli import main
from benchmarks.limits import Limits
from benchmarks.ops import OPS
from benchmarks.providers import PROVIDERS
from benchmarks.registry import Case, Implementation, Shape, Truth
from benchmarks.tuning.trials import Trials

QUICK = ("--device", "cpu", "--dtype", "fp32", "--direction", "forward", "--provider", "torch")


@pytest.fixture(autouse=True)
def given_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(flops=1e11, bytes=1e10)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *arguments: limits)


def run(out: Path, *options: str) -> int:
    return main(["run", *options, *QUICK, "--rounds", "1", "--out", str(out)])


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    out = tmp_path / "permute.json"
    assert run(out, "permute", "--shape", "T=3,H=4,E=4,K=2") == 0
    return out


def test_ops_without_the_sizes_asked_for_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ("--shape", "T=3,H=4")
    assert run(tmp_path, "expert_activation", "permute", *shape) == 0
    said = "expert_activation: not run: shape must be sizes by letter, of R, I"
    assert said in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"permute.json"}
    assert run(tmp_path, "expert_activation", "grouped_gemm", *shape) == 2
    assert "of R, I (T=16,H=2048); got 'T=3'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "permute", "--device", "cpu", "--out"],
        ["memory", "--device", "cpu", "--out"],
        ["report", "--tables", "--out"],
        ["simulate", "--out"],
        ["sweep", "main", "--device", "cpu", "--out"],
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(
    arguments: list[str],
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def begun(*arguments: Any) -> Any:
        pytest.fail("measured for nothing")

    for name in ("cli.run_op", "activation_checkpointing.measure", "sweep.sweep"):
        monkeypatch.setattr(f"benchmarks.{name}", begun)
    monkeypatch.setattr(cli, "COMMITTED", measured.parent)
    a_file = measured.with_suffix(".txt")
    a_file.write_text("")
    assert main([*arguments, str(a_file)]) == 2
    assert f"--out must be where files can be written: [Errno 17] File exists: '{a_file}'" in (
        capsys.readouterr().err
    )
    folder = measured.with_name("folder.json")
    folder.mkdir()
    if arguments[0] in ("run", "memory"):
        assert main([*arguments, str(folder)]) == 2
        assert f"{folder} is a folder" in capsys.readouterr().err


def test_a_plan_is_listed_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "full", "--list"]) == 0
    assert "launches: run moe_layer" in capsys.readouterr().out
    assert main(["sweep", "full", "--device", "cpu"]) == 2
    assert "--out FOLDER is required" in capsys.readouterr().err


def test_the_committed_results_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "RUNS", tmp_path / "none")
    assert main(["report", "--tables", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for folder in cli.COMMITTED.iterdir():
        document = results.read(folder / "fused_experts.json")
        assert f"## fused_experts on {document['device']['name']}" in text


def test_a_folder_is_reported_without_what_holds_no_results(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rows": [\n{"x": 1}]}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    out = tmp_path / "report"
    assert main(["report", "--tables", "--out", str(out), str(tmp_path)]) == 0
    assert f"left out: {other} is not a results file" in capsys.readouterr().err
    assert "## permute on" in (out / "report.md").read_text()
    assert main(["report", "--tables", "--out", str(out), str(other)]) == 2


@pytest.mark.parametrize("key", ["op", "date", "device.name", "commit.dirty", "rows"])
def test_a_file_of_another_version_is_said_to_lack(key: str, measured: Path) -> None:
    document = json.loads(measured.read_text())
    part, _, name = key.partition(".")
    (document[part] if name else document).pop(name or part)
    measured.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"not a results file: it lacks {key}"):
        results.read(measured)


@pytest.mark.parametrize("key", ["dtype", "routing", "floor_ms"])
def test_rows_of_another_version_are_said_to_lack(key: str, measured: Path) -> None:
    document = json.loads(measured.read_text())
    document["rows"][0].pop(key)
    measured.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"not a results file: it lacks {key}"):
        results.read(measured)


@pytest.mark.parametrize("key", ["device", "commit", "versions", "providers"])
def test_what_should_be_a_table_is_named(key: str, measured: Path) -> None:
    document = json.loads(measured.read_text())
    measured.write_text(json.dumps(document | {key: "x"}))
    with pytest.raises(ValueError, match=f"not a results file: its {key} is 'x'"):
        results.read(measured)


def test_bytes_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.json is not a results file"):
        results.read(path)


def test_a_simulation_without_matplotlib_has_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(name: str) -> Any:
        return None if name == "matplotlib" else find_spec(name)

    monkeypatch.setattr(simulate_command, "find_spec", found)
    assert main(["simulate", "--gpus", "8", "--tokens", "128", "--out", str(tmp_path)]) == 0
    assert "no plot, which needs matplotlib" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"dispatch.md"}
    assert "dispatch.png" not in (tmp_path / "dispatch.md").read_text()


# --------------------------------------------------------------------------------- resumed runs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 99),
        ("large_pages", True),
        ("environment", {"MOE_KERNELS_BACKEND": "reference"}),
        ("ranks", {"2": {"threads": 7}}),
    ],
)
def test_rows_of_other_settings_are_moved_aside(key: str, value: Any, measured: Path) -> None:
    document = json.loads(measured.read_text())
    if key == "ranks":
        document["ranks"] = {"2": {"threads": 1}, "4": {"threads": 1}}
        measured.write_text(json.dumps(document))
        more = {"2": {"threads": 1}, "8": {"threads": 1}}
        assert resume.earlier(measured, document | {"ranks": more}).rows
    assert resume.earlier(measured, document).rows == document["rows"]
    assert not resume.earlier(measured, document | {key: value}).rows
    assert json.loads(measured.with_suffix(".old").read_text()) == document


def test_a_process_that_is_killed_leaves_no_half_of_a_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, text: str) -> None:
        self.open("w").close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        resume.watch(out, ("T1", "fp32", "uniform"), "torch")
    assert not resume.marker(out).exists()
    config, bucket = (dataclasses.make_dataclass("Any", [])() for _ in range(2))
    with pytest.raises(KeyboardInterrupt), Trials(out).of(bucket, config):
        pytest.fail("it is not written what is tried")
    assert not out.with_suffix(".trying").exists()


# ----------------------------------------------------------------------------- what does not count


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if not op.on_ranks])
def test_rows_say_no_routing_that_their_inputs_do_not_have(
    op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs differ with the routing, or there are no rows of another."""
    letters = OPS[op].shapes("cpu")[0].sizes
    if {"T", "L"} <= set(letters):  # a whole model
        assert not OPS[op].routed
        return
    sizes = {"T": 5, "R": 40, "H": 32, "I": 32, "E": 8, "K": 2, "D": 8, "N": 4, "P": 2, "B": 4}
    shape = Shape({letter: sizes[letter] for letter in letters})
    cases = [
        OPS[op].make_case(shape, torch.float32, torch.device("cpu"), routing, 0)
        for routing in ("uniform", "one")
    ]
    names = [n for n, v in cases[0].inputs[0].items() if not v.is_floating_point()]
    differ = any(not torch.equal(*(c.inputs[0][name] for c in cases)) for name in names)
    assert differ == OPS[op].routed
    if not OPS[op].routed:
        text = ",".join(f"{letter}={size}" for letter, size in shape.sizes.items())
        assert run(tmp_path, op, "--shape", text, "--routing", "zipf", "one") == 0
        assert f"{op}: --routing does not change its inputs" in capsys.readouterr().out
        (row,) = results.read(tmp_path / f"{op}.json")["rows"]
        assert row["routing"] == "uniform"


@pytest.mark.parametrize("shape", ["T=3,E=4,K=5", "T=3,H=4,E=4,K=5"])
def test_more_experts_a_token_than_there_are(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "permute" if "H" in shape else "topk_router", "--shape", shape) == 2
    assert "K must be at most E = 4; got 5" in capsys.readouterr().err


def test_a_shape_that_does_not_fit_leaves_the_others(tmp_path: Path) -> None:
    shapes = ("T=3,H=100000000000000,E=4,K=2", "T=3,H=4,E=4,K=2")
    assert run(tmp_path, "permute", "--shape", *shapes) == 0
    rows = results.read(tmp_path / "permute.json")["rows"]
    assert rows[0]["note"].startswith("its inputs do not fit: ")
    assert rows[1]["ms"] > 0


def test_a_result_with_rows_too_many_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(case: Case) -> Implementation:
        right: Any = PROVIDERS["torch"].builders["permute"](case)
        return Implementation(lambda inputs: torch.cat([right.run(inputs)] * 2))

    wide = dataclasses.replace(PROVIDERS["torch"], name="wide", builders={"permute": build})
    monkeypatch.setitem(PROVIDERS, "wide", wide)
    shape = ("--shape", "T=3,H=4,E=4,K=2")
    out = ("--out", str(tmp_path), "--rounds", "1")
    assert main(["run", "permute", *QUICK, "wide", *shape, *out]) == 0
    voids = {r["provider"]: r["void"] for r in results.read(tmp_path / "permute.json")["rows"]}
    assert voids == {"torch": "", "wide": "rows has 12 rows instead of 6"}


def test_integers_are_exact_without_a_yardstick() -> None:
    right = torch.arange(4000)
    truth = {"ids": Truth(right, right.double())}
    assert judge({"ids": right}, truth).verdict(None, 1e-2) == ""
    assert "error of ids" in judge({"ids": right + (right == 7)}, truth).verdict(None, 1e-2)


def test_without_rounds_nothing_has_a_time(tmp_path: Path) -> None:
    few = ("--shape", "T=3,H=4,E=4,K=2", "--rounds", "0", "--seconds", "0")
    assert main(["run", "permute", *QUICK, *few, "--out", str(tmp_path)]) == 0
    (row,) = results.read(tmp_path / "permute.json")["rows"]
    assert (row["ms"], row["rounds"], row["void"], row["error"]) == (None, 0, "", 0.0)
