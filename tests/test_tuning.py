"""Tuning without a GPU: candidates, what the compiler drops, the search, and its table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES, shared_memory
from benchmarks.cli import main
from benchmarks.ops._shapes import layer, layer_sets, tuning_set
from benchmarks.tuning import table
from benchmarks.tuning.candidates import GROUPS, LARGEST_SUM, candidates, refinements
from benchmarks.tuning.command import KERNELS, _buckets, _candidates
from benchmarks.tuning.compiled import Compiled, compile_all, judge, small_shape
from benchmarks.tuning.problems import PROBLEMS, Problem, bucket_of, operand_dtype
from benchmarks.tuning.search import Found, search
from moe_kernels.triton._config_tables import (
    GLUON,
    LARGEST_TILE,
    ROWS,
    Bucket,
    Config,
    as_table,
    parse_config,
    precision_class,
    read_table,
    suits_gluon,
)
from moe_kernels.triton._configs import CONFIGS, default_config
from moe_kernels.triton._launch import TRITON_VERSION
from tests.conftest import HAS_GPU
from tests.kernels.interpreter import mended_interpreter

BUCKET = Bucket("up", "half", 256, "wide")
DEFAULT = Config(128, 128, 64, warps=8, stages=4)


# ----------------------------------------------------------------------------------- what is tried


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", [*ROWS, None])
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_can_work(kernel: str, rows: int | None, arch: int) -> None:
    itemsize = operand_dtype(kernel, torch.bfloat16).itemsize
    found = candidates(kernel, arch, itemsize, rows, 2048, 768)
    assert len(found) == len(set(found)) > 10
    assert found == candidates(kernel, arch, itemsize, rows, 2048, 768)
    for cut in found:
        assert parse_config(dataclasses.asdict(cut), kernel, "a table") == cut
    many = rows is None or rows > 16
    on_hopper = arch == 90 and many
    by_triton = kernel in ("up", "down_backward", "grouped_gemm") and arch == 100
    by_triton |= kernel == "grouped_gemm" and on_hopper
    ways = {"no"} | ({"triton"} if by_triton else set()) | ({"gluon"} if on_hopper else set())
    more = {"down_backward": {"gluon_gather"}, "scaled_grouped_gemm": {"gluon_activate"}}
    ways |= more.get(kernel, set()) if on_hopper else set()
    assert {cut.warp_specialize for cut in found} == ways
    for cut in found:
        weights = 2 if kernel == "up" else 1
        if cut.warp_specialize != "no":
            assert cut.programs == 1
            if cut.warp_specialize in GLUON:
                assert cut.block_m * cut.block_n * weights in (LARGEST_TILE, 2 * LARGEST_TILE)
                assert suits_gluon(kernel, cut)
                if cut.warp_specialize == "gluon_activate":
                    assert cut.block_n == 256
            elif arch == 90:  # eight warps multiply, in two groups
                assert (cut.warps, cut.block_m >= 128) == (4, True)
                cut = dataclasses.replace(cut, warps=8)
        stage = itemsize * (cut.block_m * cut.block_k + cut.block_k * cut.block_n * weights)
        assert stage * cut.stages * cut.programs <= shared_memory(arch)
        held = 2 if kernel == "scaled_grouped_gemm" and cut.block_n <= 128 else weights
        assert cut.block_m * cut.block_n * held <= LARGEST_SUM * 32 * cut.warps
        assert cut.stages >= 2
        if kernel != "wgrad" and rows and rows <= 4:
            assert cut.block_m == 16


def test_candidates_do_not_exceed_a_small_matrix() -> None:
    for cut in candidates("grouped_gemm", 90, 2, 1024, 64, 32):
        assert cut.block_n == 32
        assert cut.block_k <= 64


def test_refinements_keep_the_tile_and_fit() -> None:
    config = Config(128, 64, 64, warps=8, stages=4)
    found = list(refinements(config, shared=100_000, registers=120, arch=90))
    assert {(c.block_m, c.block_n, c.block_k, c.warps, c.stages) for c in found} == {
        (128, 64, 64, 8, 4)
    }
    assert {c.programs for c in found} == {1, 2}
    assert config not in found
    # registers for one program only
    assert {c.programs for c in refinements(config, 1000, 255, 90)} == {1}


def test_the_default_shapes_reach_every_bucket() -> None:
    found = {bucket for bucket, _ in _buckets(KERNELS, tuning_set(), "bf16")}
    for kernel in KERNELS:
        precision = precision_class(operand_dtype(kernel, torch.bfloat16))
        for rows in (*ROWS, None):
            for inner in ("slim", "narrow", "wide"):
                if (kernel, inner) != ("grouped_gemm", "wide"):
                    assert Bucket(kernel, precision, rows, inner) in found, (kernel, rows, inner)
    for _, problems in _buckets(KERNELS, tuning_set(), "bf16"):
        assert _candidates(problems, "bf16", 90)


# ------------------------------------------------------------------------- what the compiler drops


def test_the_compiler_drops_what_spills_or_does_not_fit() -> None:
    shape = layer(4096, 2048, 768, 128, 8)
    good = default_config("up", 90, "half", 256 * 128, 128)
    spills, large = Config(128, 128, 64, 4, 3), Config(128, 128, 64, 8, 6)
    refused = Config(128, 128, 64, 3, 3)  # no power of two of warps
    found = compile_all(
        "up", 0, shape, "bf16", [good, spills, large, refused], 90, processes=1, seconds=240
    )
    assert found[good].problem == ""
    assert 0 < found[good].registers <= 255
    assert 100_000 < found[good].shared <= shared_memory(90)
    assert "spills" in found[spills].problem
    assert "bytes of shared memory; there are 232448" in found[large].problem
    assert "does not compile" in found[refused].problem


def test_float8_is_compiled_as_the_layer_runs_it() -> None:
    """The up-projection in one kernel with its activation, or before it where tiles are narrow."""
    shape, kernel = layer(4096, 2048, 768, 128, 8), "scaled_grouped_gemm"
    fused = default_config(kernel, 90, "fp8", 256 * 128, 128)
    apart = Config(128, 64, 128, warps=8, stages=5)
    gluon = Config(128, 256, 128, warps=8, stages=4, warp_specialize="gluon")
    in_roles = dataclasses.replace(gluon, warp_specialize="gluon_activate")
    configs = [fused, apart, gluon, in_roles]
    found = compile_all(kernel, 0, shape, "bf16", configs, 90, processes=1, seconds=240)
    assert {made.problem for made in found.values()} == {""}
    assert found[fused].registers > found[apart].registers > 0


def test_roles_of_warps_are_dropped_where_the_compiler_errs_or_gives_none() -> None:
    report = {"spilled": 0, "shared": 1, "serialized": False, "torn": 0, "specialized": True}
    assert judge(report, 9, True) == ""
    assert "2 tiles of another size" in judge(report | {"torn": 2}, 9, True)
    assert "no warps with roles" in judge(report | {"specialized": False}, 9, True)
    assert judge(report | {"specialized": False}, 9, False) == ""


def test_the_compiler_gives_warps_roles() -> None:
    shape = layer(4096, 2048, 768, 128, 8)
    roles = Config(128, 256, 64, warps=4, stages=3, warp_specialize="triton")
    gluon = Config(128, 128, 64, warps=8, stages=4, warp_specialize="gluon")
    plain = dataclasses.replace(roles, block_m=64, block_n=128)  # too few rows to halve
    configs = [roles, gluon, plain]
    found = compile_all("grouped_gemm", 0, shape, "bf16", configs, 90, processes=1, seconds=240)
    assert found[gluon].problem == ""
    assert (found[roles].problem == "") == (TRITON_VERSION >= (3, 7))
    assert found[plain].problem == "has no warps with roles, although it is asked for"
    up = Config(128, 64, 64, warps=8, stages=4, warp_specialize="gluon")
    assert compile_all("up", 0, shape, "bf16", [up], 90, processes=1, seconds=240)[up].problem == ""


def test_what_is_not_compiled_in_time_is_dropped() -> None:
    shape = layer(64, 64, 32, 4, 2)
    found = compile_all("up", 0, shape, "bf16", [DEFAULT], 90, processes=1, seconds=0.05)
    assert found[DEFAULT].problem == "was not compiled in time"


def test_small_shapes_compile_the_same_kernels() -> None:
    for shape in tuning_set():
        small = small_shape(shape)
        for kernel, parts in PROBLEMS.items():
            for part in parts:
                assert bucket_of(kernel, part, shape, torch.bfloat16) == bucket_of(
                    kernel, part, small, torch.bfloat16
                )
        assert (small["H"], small["I"]) == (shape["H"], shape["I"])


# ------------------------------------------------------------------------------- what is measured


class Bench:
    """A problem whose times are given, and what the search did with it."""

    def __init__(self, times: Mapping[Config, float], wrong: Sequence[Config] = ()) -> None:
        self.times, self.wrong_ones = dict(times), set(wrong)
        self.measured: list[list[Config]] = []

    def problem(self) -> Problem:
        bench, truth = self, torch.ones(4, 4, dtype=torch.float64)
        out = torch.empty(4, 4)

        def run(cut: Config) -> None:
            if cut in bench.wrong_ones:
                out[0] = 1.0
            else:
                out.fill_(1.0)

        return Problem(
            "up", BUCKET, 4, 1, 4, 4, run, lambda cut: None, (out,),
            lambda: [(torch.arange(4), truth)], 1.0,
        )  # fmt: skip

    def measure(
        self, calls: Mapping[Config, Callable[[], None]], guard: Callable[[Config], Any]
    ) -> dict[Config, float]:
        self.measured.append(list(calls))
        for config, call in calls.items():
            with guard(config):
                call()
        return {config: self.times[config] for config in calls if config in self.times}

    def search(
        self, configs: Sequence[Config], problem_of: Mapping[Config, str], **guard: Any
    ) -> Found:
        def compile_all(wanted: Sequence[Config]) -> dict[Config, Compiled]:
            return {
                c: Compiled(problem_of.get(c, ""), registers=200, shared=150_000) for c in wanted
            }

        problems = [("layer", self.problem, compile_all)]
        return search(BUCKET, DEFAULT, configs, problems, self.measure, 90, **guard)


def _grouped(config: Config) -> list[Config]:
    return [dataclasses.replace(config, group_m=group) for group in GROUPS]


def test_the_search_takes_the_fastest_that_is_right() -> None:
    fast, spilling, wrong, failing, slow = (
        dataclasses.replace(DEFAULT, block_n=n, stages=s)
        for n, s in ((64, 4), (256, 4), (32, 3), (32, 4), (64, 3))
    )
    times = dict.fromkeys(_grouped(DEFAULT), 1.0)
    times |= dict.fromkeys(_grouped(fast), 0.8)
    times |= dict.fromkeys(_grouped(slow), 2.0)
    times |= {wrong: 0.1, spilling: 0.1}
    best = dataclasses.replace(fast, group_m=16)
    times[best] = 0.5
    bench = Bench(times, wrong=[wrong])
    found = bench.search([fast, spilling, wrong, failing, slow, DEFAULT], {spilling: "spills"})
    assert found.config == best
    assert found.default_over_best == pytest.approx(2.0)
    assert found.dropped[spilling] == "spills"
    assert "error against float64" in found.dropped[wrong]
    assert found.dropped[failing] == "failed while it was measured"
    first, last = bench.measured
    # the default takes part in every round; nothing dropped does
    assert first == [DEFAULT, fast, failing, slow]
    assert last[0] == DEFAULT
    assert set(last) == {*_grouped(DEFAULT), *_grouped(fast), *_grouped(slow)}
    # and again the same
    again = Bench(times, wrong=[wrong])
    again.search([fast, spilling, wrong, failing, slow, DEFAULT], {spilling: "spills"})
    assert again.measured == bench.measured


def test_a_tie_leaves_the_default() -> None:
    other = dataclasses.replace(DEFAULT, block_n=64)
    times = dict.fromkeys(_grouped(DEFAULT), 1.0)
    times |= dict.fromkeys(_grouped(other), 0.99)
    found = Bench(times).search([other], {})
    assert found.config == DEFAULT
    assert found.default_over_best == 1.0


def test_the_default_and_what_is_measured_are_guarded_too() -> None:
    """A default can break the device like any other, and so can a second run of what was right."""
    other, runs = dataclasses.replace(DEFAULT, block_n=64), []

    @contextmanager
    def guard(config: Config) -> Iterator[None]:
        runs.append(config)
        yield

    times = dict.fromkeys([*_grouped(DEFAULT), *_grouped(other)], 1.0)
    Bench(times).search([other], {}, guard=guard)
    # checked, then measured; with the walking orders once more
    assert runs[:4] == [DEFAULT, other] * 2
    assert runs[4] == DEFAULT
    assert runs.count(DEFAULT) == 4


def test_a_wrong_default_ends_the_search() -> None:
    with pytest.raises(RuntimeError, match=r"the default, .* is wrong: error against float64"):
        Bench({DEFAULT: 1.0}, wrong=[DEFAULT]).search([DEFAULT], {})


def test_a_bucket_of_two_problems_takes_the_best_for_both() -> None:
    """Each problem has its own favourite; the third is good on both."""
    a, b, both = (dataclasses.replace(DEFAULT, block_n=n) for n in (32, 64, 256))
    times = [{a: 0.5, b: 2.0, both: 0.7}, {a: 2.0, b: 0.5, both: 0.7}]
    benches = [
        Bench({g: t for c, t in {**of, DEFAULT: 1.0}.items() for g in _grouped(c)}) for of in times
    ]
    turn: list[int] = []

    def measure(calls: Mapping[Config, Callable[[], None]], guard: Any) -> dict[Config, float]:
        turn.append(0)
        return benches[(len(turn) - 1) % 2].measure(calls, guard)

    def compile_all(wanted: Sequence[Config]) -> dict[Config, Compiled]:
        return {c: Compiled(registers=200, shared=150_000) for c in wanted}

    problems = [(str(i), bench.problem, compile_all) for i, bench in enumerate(benches)]
    found = search(BUCKET, DEFAULT, [a, b, both], problems, measure, 90)
    assert found.config == both
    assert found.ms == {"0": 0.7, "1": 0.7}


# ------------------------------------------------------------------------------------- the table


def _found(bucket: Bucket = BUCKET, ms: float = 0.5) -> Found:
    return Found(bucket, DEFAULT, {"layer": ms}, {"layer": 1.0}, tried=7)


def test_entries_are_merged_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "sm_90-h200.json"
    document = table.load(path, "sm_90-h200", CONFIGS)
    largest = dataclasses.replace(BUCKET, rows=None)
    for found in (_found(largest), _found(), _found(dataclasses.replace(BUCKET, rows=4))):
        document = table.merge(document, found, {"commit": "x"}, CONFIGS)
    document = table.merge(document, _found(ms=0.9), {"commit": "y"}, CONFIGS)
    table.write(path, document)
    read = read_table(path, CONFIGS)
    assert [entry["rows"] for entry in read["entries"]] == [4, 256, None]
    assert read["entries"][1]["measured"]["ms"] == {"layer": 0.9}
    few = dataclasses.replace(BUCKET, rows=4)
    assert as_table(read, CONFIGS) == dict.fromkeys((few, BUCKET, largest), DEFAULT)
    text = table.summary(read["entries"])
    assert "2.00 ABOVE 1.15" in text
    assert "1.11 |" in text
    assert "within 15 percent of the best in 1 of 3 buckets" in text


def test_a_table_of_another_device_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.write(path, {"format": 1, "device": "sm_80-a100", "entries": []})
    with pytest.raises(ValueError, match="the table of sm_80-a100, and this device is sm_90"):
        table.load(path, "sm_90", CONFIGS)


# --------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "upp"], "kernels must be of up, grouped_gemm, wgrad, down_backward, scaled_"),
        (["tune", "--dry-run", "--shape", "Q=3"], "got 'Q=3'"),
        (["tune", "--dry-run", "--shape", "gpt-oss-120b"], "tuned with swiglu and without bias"),
        pytest.param(
            ["tune"],
            "finds no CUDA device; --dry-run compiles",
            marks=pytest.mark.skipif(HAS_GPU, reason="there is one"),
        ),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        ("up", (64, 32)),
        pytest.param("scaled_grouped_gemm", (32, 32), marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_says_what_would_be_tried(
    kernel: str, sizes: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "T=4,H=64,I=32,E=4,K=1"
    assert main(["tune", kernel, "--dry-run", "--shape", shape, "--processes", "2"]) == 0
    out = capsys.readouterr().out
    itemsize = operand_dtype(kernel, torch.bfloat16).itemsize
    count = len(candidates(kernel, 90, itemsize, 4, *sizes))
    assert f"of {count} candidates" in out
    assert out.count("registers") == out.count("  Config(") == count * len(PROBLEMS[kernel])
    for part in range(len(PROBLEMS[kernel])):  # what one of them drops is not tried
        assert f"\n {kernel} {part} T4 H64 I32 E4 K1\n" in out


def without_a_gpu(monkeypatch: pytest.MonkeyPatch, out: Path, measure_in_turns: Any) -> list[str]:
    """Arguments of a run with another clock and compiler."""
    from benchmarks.tuning import command, compiled

    def made(*args: Any, **kwargs: Any) -> dict[Config, Compiled]:
        return {c: Compiled("" if c.block_k == 32 else "no", 200, 150_000) for c in args[4]}

    monkeypatch.setattr(compiled, "compile_all", made)
    monkeypatch.setattr(command, "measure_in_turns", measure_in_turns)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(command.torch, "device", lambda name: torch.empty(0).device)
    return ["tune", "up", "wgrad", "--shape", "T=6,H=64,I=32,E=4,K=2", "--out", str(out)]


def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with another clock and compiler, its kernels in the interpreter."""

    def measure_in_turns(device: torch.device, seconds: float) -> Any:
        return lambda calls, guard: {config: 1000.0 / config.block_n for config in calls}

    arguments = without_a_gpu(monkeypatch, tmp_path / "table.json", measure_in_turns)
    out = tmp_path / "table.json"
    with mended_interpreter():
        assert main(arguments) == 0
    text = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert {entry["kernel"] for entry in document["entries"]} == {"up", "wgrad"}
    assert read_table(out, CONFIGS) == document
    assert "MOE_KERNELS_CONFIGS=FILE" in text
    before = out.read_text()
    with mended_interpreter():
        assert main(arguments) == 0
    assert "already in" in capsys.readouterr().out
    assert out.read_text() == before


def test_a_table_names_all_that_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the kernel, of all buckets, and the default; nothing is compiled beforehand."""
    tried: list[list[Config]] = []

    def measure_in_turns(device: torch.device, seconds: float) -> Any:
        def measure(calls: Any, guard: Any) -> dict[Config, float]:
            tried.append(list(calls))
            return {config: 1000.0 / config.block_n for config in calls}

        return measure

    among = tmp_path / "among.json"
    cuts = [Config(64, n, 32, warps=4, stages=2) for n in (16, 64, 32)]
    kernels = zip(("up", "up", "grouped_gemm"), (4, None, 4), cuts, strict=True)
    entries = [
        {
            "kernel": kernel, "precision": "full", "rows": rows, "inner": "any",
            "config": dataclasses.asdict(cut),
        }
        for kernel, rows, cut in kernels
    ]  # fmt: skip
    among.write_text(json.dumps({"format": 1, "device": "sm_90", "entries": entries}))
    arguments = without_a_gpu(monkeypatch, tmp_path / "table.json", measure_in_turns)
    with mended_interpreter():
        assert main([*arguments, "--dtype", "fp32", "--among", str(among)]) == 0
    assert {config for calls in tried[:2] for config in calls[1:]} == set(cuts[:2])
    assert [len(calls) for calls in tried[2:]] == [1, 1, 1, 1]  # the default of wgrad
    capsys.readouterr()


def test_a_dry_run_tries_what_a_table_has(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cut = dataclasses.asdict(Config(64, 64, 64, warps=4, stages=3))
    of = {"kernel": "grouped_gemm", "precision": "half", "inner": "any", "config": cut}
    among = tmp_path / "among.json"
    entries = [{**of, "rows": 4}, {**of, "rows": None}]
    among.write_text(json.dumps({"format": 1, "device": "sm_90", "entries": entries}))
    arguments = ["tune", "grouped_gemm", "--dry-run", "--among", str(among)]
    assert main([*arguments, "--shape", "T=64,H=64,I=64,E=2,K=1", "--processes", "1"]) == 0
    assert "1 of 1 candidates; none dropped" in capsys.readouterr().out


def test_the_shape_sets_of_layers_can_be_tuned() -> None:
    for name, shapes in layer_sets().items():
        for shape in shapes:
            if not shape.variant:
                assert list(_buckets(("up",), [shape], "bf16")), name
