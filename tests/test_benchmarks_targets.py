"""How far rows are from the targets on a GPU: of rows that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.ops._shapes import layer_sets
from benchmarks.providers import COPY, DENSE, OURS
from benchmarks.registry import Shape
from benchmarks.sweep import PLANS
from benchmarks.targets import PUBLISHED, TARGETS, Found, table

LAYER = {"T": 32768, "H": 7168, "I": 2048, "E": 256, "K": 8}
WIDE = {"T": 32768, "H": 4096, "I": 2048, "E": 32, "K": 4}
SONIC = {"T": 32768, "H": 4096, "I": 2048, "E": 64, "K": 4}
PRODUCT = {"R": 131072, "D": 4096, "N": 4096, "E": 32}


def rows(
    op: str, sizes: dict[str, int], direction: str = "forward", **ms: float
) -> list[dict[str, Any]]:
    """One a provider, with 600 TFLOP/s and 3000 GB/s where it takes a millisecond."""
    return [
        {
            "op": op,
            "shape": str(Shape(sizes)),
            "sizes": sizes,
            "dtype": "bf16",
            "routing": "uniform",
            "direction": direction,
            "provider": provider,
            "ms": time,
            "ms_min": time,
            "tflops": 600 / time,
            "gbs": 3000 / time,
            "vs_best_peer": 2.0 if provider == OURS else 0.5,
        }
        for provider, time in ms.items()
    ]


def lines(measured: list[dict[str, Any]]) -> dict[str, list[str]]:
    cells = [line.strip("| ").split(" | ") for line in table(measured).splitlines()[2:]]
    assert len(cells) == len(TARGETS)
    return {text.split(",")[0] + " " + goal: rest for text, goal, *rest in cells}


def test_without_rows_nothing_is_measured() -> None:
    assert table([]).count("not yet measured") == len(TARGETS)
    slow = rows("fused_experts", SONIC, **{OURS: 1.0})
    slow[0] |= {"ms": None, "void": "error of y"}
    assert table(slow).count("not yet measured") == len(TARGETS)


def test_each_target_is_held_to_its_rows() -> None:
    few = {"R": 1024, "D": 4096, "N": 4096, "E": 32}  # rows an expert too few for the first
    measured = [
        *rows("grouped_gemm", PRODUCT, **{OURS: 1.0, DENSE: 0.8, "torch": 1.2}),
        *rows("grouped_gemm", PRODUCT, "backward", **{OURS: 1.0, DENSE: 0.95, "torch": 0.9}),
        *rows("grouped_gemm", few, **{OURS: 1.0, DENSE: 0.1, "torch": 1.2}),
        *rows("scaled_grouped_gemm", PRODUCT, **{OURS: 0.6}),
        *rows("fused_experts", SONIC, **{OURS: 1.0, "torch": 2.0}),
        *rows("fused_experts", SONIC, "backward", **{OURS: 1.1, "torch": 2.0}),
        *rows("fused_experts", WIDE, **{OURS: 1.0}),
        *rows("fused_experts_fp8", WIDE, **{OURS: 0.8}),
        *rows("fused_experts", LAYER, **{OURS: 1.0}),
        *rows("topk_router", {"T": 32768, "E": 256, "K": 8}, **{OURS: 0.04}),
        *rows("topk_router", {"T": 4096, "E": 256, "K": 8}, **{OURS: 9.0}),
        *rows("permute", {"T": 4096, "H": 7168, "E": 256, "K": 8}, **{OURS: 1.1, COPY: 1.0}),
        *rows("chunk_permute", {"R": 4096, "H": 7168, "P": 8, "E": 32}, **{OURS: 2.0, COPY: 1.0}),
    ]
    found = lines(measured)
    product = "R131072 D4096 N4096 E32 uniform"
    assert found["grouped_gemm at least 0.9"] == ["1 of 2", f"0.8: grouped_gemm {product} forward"]
    assert found["grouped_gemm at least 1"] == ["2 of 3", f"0.9: grouped_gemm {product} backward"]
    published = [value for text, value in found.items() if text == "fused_experts at least 1"]
    assert published == [["1 of 2", f"{600 / 1.1 / 586:.3g}: {_layer('backward')}"]]
    assert found["topk_router at most 0.05"][0] == "1 of 1"
    assert found["permute at least 0.85"][0] == "1 of 2"
    assert found["float8 at least 1.5"][0] == "1 of 2"
    peers = TARGETS[2].line(Found(measured))
    assert "| 4 of 4 | 2: " in peers


def _layer(direction: str) -> str:
    return f"fused_experts {Shape(SONIC)} uniform {direction}"


def test_the_published_shapes_are_measured() -> None:
    sets = layer_sets()["sonicmoe"]
    assert {tuple(shape[letter] for letter in "THIEK") for shape in sets} == set(PUBLISHED)


@pytest.mark.parametrize("shape", ["H=4096,I=2048", "D=4096,N=4096", "D=2048,N=4096"])
def test_the_sweeps_measure_float8_where_it_counts(shape: str) -> None:
    for plan in PLANS.values():
        texts = [text for part in plan for text in part.arguments]
        assert any(shape in text for text in texts)


def test_a_report_of_a_gpu_has_the_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = rows("fused_experts", SONIC, **{OURS: 1.0})
    for row in measured:
        row |= {"over_floor": 1.0, "floor_ms": 1.0, "peak_bytes": 1, "error": 0.0, "void": ""}
        row |= {"note": "", "rounds": 3}
    document: dict[str, Any] = {
        "op": "fused_experts",
        "device": {"type": "cuda", "name": "NVIDIA H200"},
        "threads": 1,
        "date": "today",
        "versions": {},
        "commit": {"hash": "x", "dirty": False, "sources": "y"},
        "limits": {},
        "providers": {},
        "rows": measured,
    }
    (tmp_path / "a.json").write_text(json.dumps(document, indent=1))
    arguments = ["report", str(tmp_path / "a.json"), "--tables", "--out", str(tmp_path)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "## Targets on NVIDIA H200" in text
    assert "| at least 1 | 1 of 1 | 1.01: fused_experts" in text
    document["device"]["type"] = "cpu"
    (tmp_path / "a.json").write_text(json.dumps(document, indent=1))
    assert main(arguments) == 0
    assert "## Targets" not in capsys.readouterr().out
