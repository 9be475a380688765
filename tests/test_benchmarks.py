"""The benchmark command on tiny shapes: its JSON, and that wrong results do not count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_kernels
from benchmarks import results
from benchmarks.accuracy import judge
from benchmarks.cli import main
from benchmarks.limits import Limits
from benchmarks.ops import OPS
from benchmarks.providers import LIMITS, OURS, OWN, PROVIDERS
from benchmarks.registry import Case, Implementation, Inputs, Output, Shape, Truth, Unsupported
from benchmarks.routing import ROUTINGS, make_topk_ids
from benchmarks.runner import available
from moe_kernels.triton._launch import TRITON_VERSION
from tests.conftest import GPU, HAS_GPU
from tests.kernels.accuracy import frobenius_error
from tests.kernels.interpreter import mended_interpreter

TINY = {
    "fused_experts": "T=5,H=32,I=16,E=8,K=2",
    "fused_experts_fp8": "T=9,H=144,I=80,E=4,K=2",
    "fused_experts_quantized": "T=5,H=32,I=32,E=8,K=2,B=4",
    "grouped_gemm": "R=20,D=16,N=24,E=4",
    "expert_activation": "R=9,I=16",
    "permute": "T=5,H=16,E=4,K=2",
    "unpermute": "T=5,H=16,E=4,K=2",
    "chunk_permute": "R=40,H=16,P=2,E=3",
    "sort_by_expert": "T=5,E=4,K=2",
    "topk_router": "T=5,E=8,K=2",
    "round_tokens": "T=900,E=3,K=1",
    "moe_layer": "T=2,H=32,I=16,E=8,K=2,N=3",
    "quantize_rows": "T=5,H=144",
    "permute_quantize": "T=5,H=144,E=4,K=2",
    "quantize_weights": "E=2,H=144,N=40",
    "scaled_grouped_gemm": "R=20,D=144,N=32,E=4",
    "fp8_grouped_gemm": "R=20,D=144,N=32,E=4",
}
FORWARD_ONLY = (
    "sort_by_expert",
    "quantize_rows",
    "permute_quantize",
    "quantize_weights",
    "scaled_grouped_gemm",
    "round_tokens",
    "moe_layer",
    "fused_experts_quantized",
)


@pytest.fixture
def given_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine's own limits takes longer than all else on tiny shapes."""
    limits = Limits(flops=1e11, bytes=1e10)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *arguments: limits)


def run(op: str, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    arguments = ["run", op, "--device", "cpu", "--shape", TINY[op], "--out", str(out)]
    code = main([*arguments, "--seconds", "9", "--rounds", "2", *options])
    return code, results.read(out)


def rows_of(found: dict[str, Any], **wanted: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if all(row[k] == v for k, v in wanted.items())]


def test_every_op_has_a_tiny_shape() -> None:
    elsewhere = {"model_decode"}  # tests.test_benchmarks_models
    assert set(TINY) == {name for name, op in OPS.items() if not op.on_ranks} - elsewhere


def test_every_op_is_measured() -> None:
    parts = {
        "grouped_gemm_wgrad": "grouped_gemm",  # its backward
        "dequantize_rows": "fp8_grouped_gemm",  # its backward, too
        "quantize_experts": "fused_experts_quantized",
        "experts_from_mxfp4": "fused_experts_quantized",
        "fused_moe": "fused_experts",  # in another layout
    }
    no_ops = {"free_kept_buffers", "use_large_pages", "rounded_rows"}
    public = {name for name in moe_kernels.__all__ if name.islower() and not name.startswith("_")}
    assert {parts.get(name, name) for name in public - no_ops} <= set(OPS)


@pytest.mark.usefixtures("given_limits")
@pytest.mark.parametrize("device", ["cpu", *([GPU] if HAS_GPU else [])])
@pytest.mark.parametrize("op", TINY)
def test_rows_are_complete(op: str, device: str, tmp_path: Path) -> None:
    directions = ("forward", "backward", "forward+backward")
    options = ("--device", device, "--direction", *directions)
    code, found = run(op, tmp_path / "out.json", *options)
    assert code == 0
    expected = ["forward"] if op in FORWARD_ONLY else list(directions)
    # the error of a format is no fault: there it has no yardstick
    yardstick = "moe_kernels_unquantized" if op == "fused_experts_quantized" else "torch"
    for dtype in OPS[op].dtypes[device]:
        for direction in expected:
            rows = rows_of(found, dtype=dtype, direction=direction)
            names = {name for name, why in found["providers"].items() if not why}
            assert {row["provider"] for row in rows} == names
            assert {OURS, yardstick, "copy_limit"} <= names
            for row in rows:
                if row["unsupported"]:
                    assert row["provider"] not in (OURS, yardstick, *LIMITS)
                    continue
                assert row["void"] == row["note"] == ""
                assert 0 < row["ms_min"] <= row["ms"]
                assert row["rounds"] == 2
                assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
                assert (row["error"] is None) == (row["provider"] in LIMITS)
                if row["flops"]:
                    rate = row["flops"] / row["ms"] / 1e9
                    assert row["tflops"] == pytest.approx(rate)
    assert {row["direction"] for row in found["rows"]} == set(expected)


@pytest.mark.usefixtures("given_limits")
@pytest.mark.parametrize("op", [op for op in TINY if "quanti" in op or "fp8" in op])
def test_rounding_is_no_error_without_a_yardstick(op: str, tmp_path: Path) -> None:
    """Where plain PyTorch is not among those that are measured, or finds no memory."""
    code, found = run(op, tmp_path / "out.json", "--provider", OURS)
    assert code == 0
    assert found["rows"]
    assert all(row["error"] > 2e-2 and row["void"] == "" for row in found["rows"])


def test_the_file_says_what_it_was_measured_on(tmp_path: Path) -> None:
    _, found = run("expert_activation", tmp_path / "out.json", "--dtype", "fp32", "--threads", "1")
    assert found["threads"] == 1
    assert found["device"]["type"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["commit"]["hash"]) == 40
    assert isinstance(found["commit"]["dirty"], bool)
    assert found["limits"]["fp32"]["flops_per_second"] > 1e8
    assert found["limits"]["fp32"]["bytes_per_second"] > 1e8


def test_the_costs_are_those_of_the_definition() -> None:
    shape = Shape({"T": 6, "H": 32, "I": 16, "E": 4, "K": 2})
    op = OPS["fused_experts"]
    case = op.make_case(shape, torch.float32, torch.device("cpu"), "one", 0)
    cost = op.cost(case)
    expert = 3 * 32 * 16
    assert cost["forward"].flops == 2 * 6 * 2 * expert
    assert cost["forward"].bytes == 4 * (2 * expert + 2 * 6 * 32)  # two experts have tokens
    assert cost["backward"].flops == 2 * cost["forward"].flops
    assert cost["backward"].bytes == 4 * ((2 + 4) * expert + 3 * 6 * 32)


def _wrong(name: str, change: Any) -> Any:
    """A provider whose output is that of plain PyTorch, changed."""

    def build(case: Case) -> Implementation:
        right = PROVIDERS["torch"].builders["fused_experts"](case)
        return Implementation(lambda inputs: change(right.run(inputs)))

    return dataclasses.replace(PROVIDERS[OURS], name=name, builders={"fused_experts": build})


@pytest.mark.usefixtures("given_limits")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * 1.01, "error of y"),
        # a row that the sample against float64 leaves out
        (lambda y: y * (torch.arange(len(y)) != 4)[:, None], "1 rows of y are wrong, first 4"),
        (lambda y: y.index_fill(0, torch.tensor([4]), torch.nan), "not finite"),
    ],
)
def test_a_wrong_result_has_no_time(
    change: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, OURS, _wrong(OURS, change))
    shape = ("--shape", "T=6,H=32,I=16,E=8,K=2")
    out = tmp_path / "out.json"
    code, found = run("fused_experts", out, *shape, "--dtype", "fp32")
    assert code == 1
    for row in rows_of(found, provider=OURS):
        assert reason in row["void"]
        assert row["ms"] is row["ms_min"] is row["tflops"] is row["over_floor"] is None
    assert all(row["ms"] for row in rows_of(found, provider="torch"))


@pytest.mark.parametrize(
    ("values", "independent", "wrong"),
    [(1, None, 20), (10, None, 10), (2000, 8, 10), (2000, None, 2)],
)
def test_luck_of_a_small_sample_is_no_error(
    values: int, independent: int | None, wrong: float
) -> None:
    """Equal chains pass whatever the draw, and one with ``wrong`` times the error does not."""

    def verdict(factor: float) -> str:
        right = torch.randn(1, values, dtype=torch.float64)
        drawn = torch.randn(2, independent or values, dtype=torch.float64)
        noise = 4e-3 * drawn.repeat_interleave(-(-values // drawn.shape[1]), 1)[:, :values]
        truth = {"y": Truth(torch.zeros(1, dtype=torch.int64), right, independent)}
        theirs = judge({"y": (right * (1 + noise[:1])).bfloat16()}, truth)
        ours = judge({"y": (right * (1 + factor * noise[1:])).bfloat16()}, truth)
        return ours.verdict(theirs)

    assert [verdict(1) for _ in range(100)] == [""] * 100
    assert sum("error of y" in verdict(wrong) for _ in range(20)) > 10


@pytest.mark.usefixtures("given_limits")
def test_a_failing_or_missing_provider_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(case: Case) -> Implementation:
        raise NotImplementedError("not for this shape")

    failing = dataclasses.replace(PROVIDERS["torch"], name="x", builders={"fused_experts": fail})
    missing = dataclasses.replace(failing, name="y", requires=("no_such_module",))
    monkeypatch.setitem(PROVIDERS, "x", failing)
    monkeypatch.setitem(PROVIDERS, "y", missing)
    code, found = run("fused_experts", tmp_path / "out.json", "--dtype", "fp32")
    assert code == 0
    assert "no_such_module does not import" in found["providers"]["y"]
    assert "without y: no_such_module" in capsys.readouterr().out
    notes = {row["note"] for row in rows_of(found, provider="x")}
    assert notes == {"does not run: NotImplementedError: not for this shape"}
    assert not rows_of(found, provider="y")


@pytest.mark.usefixtures("given_limits")
def test_a_provider_that_fails_late_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(case: Case) -> Implementation:
        right = PROVIDERS["torch"].builders["fused_experts"](case)

        def run_first_set(inputs: Inputs) -> Output:
            if inputs is not case.inputs[0]:
                raise RuntimeError("out of memory")
            return right.run(inputs)

        return Implementation(run_first_set)

    late = dataclasses.replace(PROVIDERS["torch"], name="x", builders={"fused_experts": build})
    monkeypatch.setitem(PROVIDERS, "x", late)
    _, found = run("fused_experts", tmp_path / "out.json", "--dtype", "fp32")
    for row in rows_of(found, provider="x"):
        assert (row["note"], row["ms"]) == ("does not run: RuntimeError: out of memory", None)
    assert all(row["rounds"] == 2 for row in rows_of(found, provider=OURS))


@pytest.mark.usefixtures("given_limits")
@pytest.mark.parametrize("right", [True, False])
def test_a_provider_may_keep_weights_of_its_own(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another layout, from which its gradients are brought back and checked."""

    def build(case: Case) -> Implementation:
        own = {
            name: weight.detach().mT.contiguous().requires_grad_()
            for name, weight in case.weights.items()
        }
        turned = dataclasses.replace(case, weights={n: w.mT for n, w in own.items()})
        convert = (lambda grad: grad.mT) if right else (lambda grad: 2 * grad.mT)
        return Implementation(
            PROVIDERS["torch"].builders["fused_experts"](turned).run,
            own_weights={name: ((weight,), convert) for name, weight in own.items()},
        )

    keeper = dataclasses.replace(PROVIDERS["torch"], name="x", builders={"fused_experts": build})
    monkeypatch.setitem(PROVIDERS, "x", keeper)
    out, direction = tmp_path / "out.json", ("--direction", "backward")
    _, found = run("fused_experts", out, "--dtype", "fp32", *direction)
    (row,) = rows_of(found, provider="x")
    assert ("error of gate_up" in row["void"]) == (not right)


@pytest.mark.usefixtures("given_limits")
def test_report_draws_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    _, found = run("fused_experts", out, "--dtype", "fp32", "--direction", "forward")
    capsys.readouterr()
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert text in capsys.readouterr().out
    best = min(row["ms_min"] for row in found["rows"] if row["provider"] not in (OURS, *LIMITS))
    own = rows_of(found, provider=OURS)[0]["ms_min"]
    line = next(line for line in text.splitlines() if line.startswith("| T5 H32 I16 E8 K2 |"))
    assert line.endswith(f"| {best / own:.2f} |")
    pictures = sorted((tmp_path / "report").rglob("*.png"))
    kind = "fused-experts-fp32-uniform-forward"
    assert [picture.name for picture in pictures] == [f"{kind}-tflops.png", f"{kind}.png"]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.name in text


@pytest.mark.usefixtures("given_limits")
def test_report_draws_how_times_scale(tmp_path: Path) -> None:
    shapes = [f"T={t},H=16,I=8,E=4,K=2" for t in (1, 2, 4, 8)]
    folder, out = tmp_path / "results", tmp_path / "report"
    options = ["--dtype", "fp32", "--direction", "forward", "--seconds", "1", "--rounds", "1"]
    arguments = ["run", "fused_experts", "--device", "cpu", "--out", str(folder)]
    assert main([*arguments, "--shape", *shapes, *options]) == 0
    (folder / "sweep.json").write_text('{"parts": []}')  # lies there too, and is no results file
    assert main(["report", str(folder), "--out", str(out)]) == 0
    names = {picture.name for picture in out.rglob("*.png")}
    assert "fused-experts-fp32-uniform-forward-over-t-h16-i8-e4-k2.png" in names
    assert main(["report", str(folder), "--out", str(tmp_path / "tables"), "--tables"]) == 0
    assert not list((tmp_path / "tables").rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "permute", "--shape", "Q=3"], "of T, H, E, K (T=16,H=2048); got 'Q=3'"),
        (["run", "permute", "--shape", "T=0"], "sizes of at least 1"),
        (["run", "topk_router", "permute", "--out", "x.json"], "--out must be a folder"),
        (["run", "permute", "--rounds", "-1"], "must be at least 0; got 20.0 and -1"),
        (["run", "permute", "--seconds", "nan"], "must be at least 0; got nan and 50"),
        (["run", "permute", "--threads", "0"], "--threads must be at least 1; got 0"),
        (["report", "no_such_file.json"], "no_such_file.json"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_providers_that_cannot_run_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*arguments: Any) -> Limits:
        pytest.fail("limits were measured for nothing")

    monkeypatch.setattr("benchmarks.runner.measure_limits", measured)
    monkeypatch.setattr("benchmarks.ranks.run_on_ranks", measured)
    out = ["--device", "cpu", "--out", str(tmp_path)]
    for ops in (["fused_experts"], ["fused_experts", "dispatch", "permute"], ["all"]):
        assert main(["run", *ops, *out, "--provider", "liger", "sonicmoe"]) == 2
        found = capsys.readouterr().err
        assert "--provider must name one that can run here; " in found
        assert "liger runs on cuda only, sonicmoe runs on cuda only" in found
    limits = Limits(flops=1e11, bytes=1e10)
    monkeypatch.setattr("benchmarks.runner.measure_limits", lambda *arguments: limits)
    ops = ["permute", "sort_by_expert", "--shape", "T=5,E=4,K=2"]
    few = ["--rounds", "0", "--provider", "transformers_eager", "torch"]
    builders = {"permute": PROVIDERS["torch"].builders["permute"]}
    only = dataclasses.replace(PROVIDERS["torch"], builders=builders)
    monkeypatch.setitem(PROVIDERS, "torch", only)
    assert main(["run", *ops, *out, *few]) == 0
    said = "sort_by_expert: not run: transformers_eager has no sort_by_expert, torch has no"
    assert said in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"permute.json"}


def test_report_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="lacks commit, date, device"):
        results.read(path)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing: str) -> None:
    ids = make_topk_ids(64, 16, 4, routing, torch.Generator().manual_seed(0))
    assert ids.shape == (64, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    load = torch.bincount(ids.flatten(), minlength=16)
    if routing == "one":
        assert load.tolist() == [64] * 4 + [0] * 12
    elif routing == "balanced":
        assert load.tolist() == [16] * 16
    elif routing == "zipf":
        assert load.max() > 2.5 * load.float().mean()
    else:
        assert load.max() < 2.5 * load.float().mean()


def test_memory_of_activation_checkpointing(tmp_path: Path) -> None:
    """Modes that compute more again need less; nothing but the step decides the figures."""
    shape = "L=3,B=1,T=200,H=64,I=48,E=4,K=2"
    for name in ("a.json", "b.json"):
        arguments = ["memory", "--device", "cpu", "--shape", shape, "--dtype", "fp32"]
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    first, second = (results.read(tmp_path / name)["rows"] for name in ("a.json", "b.json"))
    peaks = {row["provider"]: row["peak_bytes"] for row in first}
    assert list(peaks) == ["off", "selective", "router-saving", "full"]
    assert (
        peaks["off"]
        > 1.3 * peaks["selective"]
        > 1.3 * peaks["router-saving"]
        >= 1.3 * peaks["full"]
    )
    # at least the pre-activations, [T * K, 2I], of every layer
    assert peaks["off"] > 3 * 200 * 2 * 2 * 48 * 4
    for row in second:
        assert row["peak_bytes"] == pytest.approx(peaks[row["provider"]], rel=0.01)
    assert main(["report", str(tmp_path / "a.json"), "--out", str(tmp_path)]) == 0
    assert "| full |" in (tmp_path / "report.md").read_text()


# ------------------------------------------------------------------------------ warps with roles


def test_warps_with_roles_are_measured_only_if_named() -> None:
    names = [name for name, provider in PROVIDERS.items() if provider.by_name]
    assert len(names) == 3
    assert set(names) < set(OWN)
    op = OPS["grouped_gemm"]
    assert not set(names) & set(available(op, "cuda"))
    assert list(available(op, "cuda", [OURS, *names])) == [OURS, *names]


@pytest.mark.skipif(HAS_GPU, reason="in the interpreter")
def test_warps_with_roles_compute_the_product() -> None:
    """Those that Triton gives; the others say that they cannot run here."""
    op, device = OPS["grouped_gemm"], torch.device("cpu")
    case = op.make_case(
        Shape({"R": 150, "D": 64, "N": 40, "E": 3}), torch.bfloat16, device, "uniform", 0
    )
    names = ["moe_kernels_roles_gluon_turns", "moe_kernels_roles_gluon_shared"]
    if TRITON_VERSION >= (3, 7):
        build = PROVIDERS["moe_kernels_roles_triton"].builders["grouped_gemm"]
        with mended_interpreter():
            found = build(case).run(case.inputs[0])
        truth = op.truth(case, 0, False)["c"]
        assert frobenius_error(found[truth.rows], truth.values) < 4e-3
    else:
        names.append("moe_kernels_roles_triton")
    for name in names:
        with pytest.raises(Unsupported, match="cannot give warps roles on this device"):
            PROVIDERS[name].builders["grouped_gemm"](case)
