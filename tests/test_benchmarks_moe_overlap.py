"""The benchmark of what overlap gains: its rows, and that a layer that is wrong does not count."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import results, tables
from benchmarks.cli import main
from benchmarks.ops import OPS
from benchmarks.ops.moe_overlap import DOWN, GATE_UP, layer_in_plain_pytorch
from benchmarks.providers import OWN, PROVIDERS
from benchmarks.rank_runner import run_rank
from benchmarks.registry import Builder, Case, Implementation, Shape
from benchmarks.runner import Settings
from moe_parallel import MLP
from moe_parallel.dispatch import TRANSPORTS, AllToAllDispatcher, Dispatched, Pending
from tests.parallel.ranks import run_ranks

OP = OPS["moe_overlap"]
SIZES = {"T": 6, "H": 16, "I": 12, "E": 8, "K": 3, "S": 20}
TEXT = ",".join(f"{letter}={size}" for letter, size in SIZES.items())
WAYS = ("overlap", "in_turn")
NAMES = {f"{transport}_{way}" for transport in TRANSPORTS for way in WAYS}
DIRECTIONS = ("forward", "forward+backward")
BY_GROUP = tuple(f"process_group_{way}" for way in WAYS)
SETTINGS = Settings(
    torch.device("cpu"), shapes=(TEXT,), providers=BY_GROUP, seconds=0.0, max_rounds=2
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe_overlap") / "out.json"
    arguments = ["run", OP.name, "--device", "cpu", "--ranks", "2", "--shape", TEXT]
    code = main([*arguments, "--large-pages", "--seconds", "0", "--rounds", "2", "--out", str(out)])
    assert code == 0
    return out


def test_every_transport_overlaps_and_takes_turns() -> None:
    assert {name for name, p in PROVIDERS.items() if OP.name in p.builders} >= NAMES
    for transport in TRANSPORTS:
        assert f"{transport}_overlap" in OWN
        assert f"{transport}_in_turn" not in OWN  # what the former is compared with


def test_rows_are_complete(measured: Path) -> None:
    found = results.read(measured)
    names = {name for name, why in found["providers"].items() if not why}
    assert {*BY_GROUP, "copy_limit"} <= names
    assert {row["provider"] for row in found["rows"]} == names
    assert {row["direction"] for row in found["rows"]} == set(DIRECTIONS)
    for row in found["rows"]:
        assert row["sizes"] == {**SIZES, "P": 2}
        assert (row["dtype"], row["routing"]) == ("bf16", "balanced")
        assert row["void"] == row["note"] == ""
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["rounds"] == 2
        assert row["over_floor"] > 0
        assert (row["error"] is None) == (row["provider"] == "copy_limit")
        assert row["error"] is None or 0 < row["error"] < 2e-2


def test_report(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(measured), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == len(DIRECTIONS)
    shape = "| T6 H16 I12 E8 K3 S20 P2 "
    lines = [line for line in text.splitlines() if line.startswith(shape)]
    for times, gain, direction in zip(lines[:2], lines[2:], DIRECTIONS, strict=True):
        rows = json.loads(measured.read_text())["rows"]
        of = {row["provider"]: row for row in rows if row["direction"] == direction}
        best = [min(row["ms_min"] for n, row in of.items() if n.endswith(way)) for way in WAYS]
        assert times.endswith(f"| {best[1] / best[0]:.2f} |")  # ours is compared with in turn
        overlap, in_turn = (of[name] for name in BY_GROUP)
        medians, minima = (f"{in_turn[time] / overlap[time]:.2f}" for time in ("ms", "ms_min"))
        assert gain.startswith(f"{shape}bf16 | balanced | {direction} | {medians} / {minima} |")
        assert gain.count(" / ") == sum(name.endswith(WAYS[0]) for name in of)


def test_gains_are_of_what_was_measured_in_both_ways() -> None:
    def row(provider: str, ms: float | None) -> dict[str, Any]:
        return {
            "op": OP.name,
            "shape": "T1",
            "dtype": "bf16",
            "routing": "balanced",
            "direction": "forward",
            "provider": provider,
            "ms": ms,
            "ms_min": ms and ms / 2,
        }

    rows = [row(BY_GROUP[0], 2.0), row(BY_GROUP[1], 3.0), row("shared_memory_overlap", 1.0)]
    text = tables.gains([*rows, row("shared_memory_in_turn", None), row("copy_limit", 1.0)])
    assert text.splitlines()[2] == "| shape | routing | direction | process_group |"
    assert text.splitlines()[4:] == ["| T1 bf16 | balanced | forward | 1.50 / 1.50 |"]
    assert tables.gains(rows[:1]) == ""


def make_case(
    monkeypatch: pytest.MonkeyPatch,
    routing: str = "balanced",
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    return OP.make_case(Shape({**SIZES, "P": 2}), dtype, torch.device("cpu"), routing, 0)


@pytest.mark.parametrize("routing", ["balanced", "zipf", "one"])
def test_the_router_chooses_what_the_routing_says(
    routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clearly so, on tokens that the ranks do not share, with weights that they do."""
    cases = [make_case(monkeypatch, routing, rank, torch.bfloat16) for rank in range(2)]
    for name, weight in cases[0].weights.items():
        assert torch.equal(weight, cases[1].weights[name])
    assert not torch.equal(cases[0].inputs[0]["x"], cases[1].inputs[0]["x"])
    for case in cases:
        for inputs in case.inputs:
            logits = inputs["x"].detach().double() @ case.weights["gate.weight"].double().T
            chosen = torch.zeros(logits.shape, dtype=torch.bool)
            chosen.scatter_(1, inputs["topk_ids"], True)
            assert float(logits[chosen].min()) > 5.0
            assert float(logits[~chosen].max()) < 1.0
    hit = [inputs["topk_ids"] for case in cases for inputs in (case.inputs[0],)]
    assert float(cases[0].inputs[0]["experts_hit"]) == torch.cat(hit).unique().numel() / 2


def test_the_cost_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens go to 3 experts, so that a rank computes 1.5 on average."""
    cost = OP.cost(make_case(monkeypatch, "one", dtype=torch.bfloat16))
    flops = 6 * (3 * 3 * 2 * 16 * 12 + 3 * 2 * 16 * 20)
    assert (cost["forward"].flops, cost["backward"].flops) == (flops, 2 * flops)
    expert, dense, rows = 3 * 16 * 12, 3 * 16 * 20 + 8 * 16, 6 * 16
    assert cost["forward"].bytes == 2 * (1.5 * expert + dense + 2 * rows)
    assert cost["backward"].bytes == 2 * ((1.5 + 4) * expert + 2 * dense + 3 * rows)


def test_truth_and_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over tokens and their experts."""
    case = make_case(monkeypatch, "uniform")
    of = {name: weight.double() for name, weight in case.weights.items()}
    inputs = case.inputs[0]
    expected = []

    def swiglu(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g = gate @ h
        return down @ (g * torch.sigmoid(g) * (up @ h))

    x = inputs["x"].detach().double().requires_grad_()
    for token, h in enumerate(x):
        scores = (of["gate.weight"] @ h).softmax(0)
        ids = inputs["topk_ids"][token].tolist()
        shared = (of[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        row = swiglu(h, *shared)
        for expert in ids:
            both = of[GATE_UP][expert].T
            y = swiglu(h, both[:12], both[12:], of[DOWN][expert].T)
            row = row + scores[expert] / scores[ids].sum() * y
        expected.append(row)
    y = torch.stack(expected)
    y.backward(inputs["grad"].double())
    assert list(OP.truth(case, 0, False)) == ["y"]
    assert OP.yardstick is not None
    implementation = OP.yardstick(case)
    found = implementation.run(inputs)
    implementation.backward(found, inputs)
    assert isinstance(found, Tensor)
    assert inputs["x"].grad is not None
    assert x.grad is not None
    for name, rows, values in (("y", found, y), ("x", inputs["x"].grad, x.grad)):
        right = OP.truth(case, 0, True)[name]
        assert len(right.rows) == 4
        torch.testing.assert_close(right.values, values[right.rows].detach())
        torch.testing.assert_close(rows.double(), values, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, layer_in_plain_pytorch(case, inputs["x"], inputs["topk_ids"]))


def _noting(events: list[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append(name)
        return call(*args, **kwargs)

    return noted


def _events(rank: int, size: int) -> dict[str, list[str]]:
    """What a call of each provider does, in order."""
    events: list[str] = []
    for kind, name in (
        (AllToAllDispatcher, "dispatch"),
        (AllToAllDispatcher, "dispatch_async"),
        (Pending, "wait"),
        (MLP, "forward"),
    ):
        setattr(kind, name, _noting(events, name, getattr(kind, name)))
    case = OP.make_case(
        Shape({**SIZES, "P": size}), torch.bfloat16, torch.device("cpu"), "balanced", 0
    )
    found = {}
    for name in BY_GROUP:
        own = dataclasses.replace(case, group=dist.new_group())
        implementation = PROVIDERS[name].builders[OP.name](own)
        events.clear()
        with torch.inference_mode():
            implementation.run(case.inputs[0])
        found[name] = list(events)
    return found


def test_shared_experts_are_computed_while_tokens_travel_or_after() -> None:
    for found in run_ranks(2, _events):
        assert found["process_group_overlap"] == ["dispatch_async", "forward", "wait"]
        assert found["process_group_in_turn"] == ["dispatch", "forward"]


def _rows(rank: int, size: int, spoil: Callable[[int], None]) -> list[dict[str, Any]]:
    spoil(rank)
    return [row for rows in run_rank(OP, SETTINGS) for row in rows]


def other_bits(rank: int) -> None:
    """What begins and ends apart brings other weights on one rank."""
    begin = AllToAllDispatcher.dispatch_async

    def dispatch_async(self: Any, *args: Any) -> Pending[Dispatched]:
        pending = begin(self, *args)

        def finish() -> Dispatched:
            found = pending.wait()
            return dataclasses.replace(found, topk_weights=found.topk_weights * (1 + 2**-7))

        return Pending(finish) if rank == 1 else pending

    AllToAllDispatcher.dispatch_async = dispatch_async  # type: ignore[method-assign, assignment]


def other_experts(rank: int) -> None:
    """The second rank has its experts in another order."""
    for name in BY_GROUP:
        build: Builder = PROVIDERS[name].builders[OP.name]

        def spoilt(case: Case, build: Builder = build) -> Implementation:
            order = torch.tensor([*range(4), 5, 4, 6, 7])
            weights = {**case.weights, DOWN: case.weights[DOWN][order]}
            return build(dataclasses.replace(case, weights=weights))

        PROVIDERS[name] = dataclasses.replace(PROVIDERS[name], builders={OP.name: spoilt})


def test_other_bits_than_in_turn_have_no_time() -> None:
    for rows in run_ranks(2, _rows, other_bits):
        assert [row["direction"] for row in rows[::2]] == list(DIRECTIONS)
        for overlapping, in_turn in zip(rows[::2], rows[1::2], strict=True):
            assert "y has not the bits that the layer yields in turn" in overlapping["note"]
            assert overlapping["ms"] is None
            assert in_turn["note"] == in_turn["void"] == ""
            assert in_turn["ms"] > 0


def other_gradients(rank: int) -> None:
    """What the second rank's shared experts add to the gradient of x is lost."""
    forward = MLP.forward
    if rank == 1:
        MLP.forward = lambda self, x: forward(self, x.detach())  # type: ignore[method-assign]


def test_wrong_gradients_have_no_time() -> None:
    for rows in run_ranks(2, _rows, other_gradients):
        assert len(rows) == 2 * len(DIRECTIONS)
        for row in rows:
            alone = row["direction"] == "forward"
            assert ("error of x" in row["void"]) == (row["ms"] is None) == (not alone)


def test_wrong_experts_have_no_time() -> None:
    for rows in run_ranks(2, _rows, other_experts):
        assert [row["provider"] for row in rows] == 2 * list(BY_GROUP)
        for row in rows:
            assert "error of y" in row["void"]
            assert row["ms"] is None
