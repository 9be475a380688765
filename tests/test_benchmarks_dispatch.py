"""The benchmark of ops on ranks: rows of two processes, and that what is wrong does not count."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import ranks, results, tables
from benchmarks.cli import main
from benchmarks.ops import OPS
from benchmarks.providers import LIMITS, OWN, PROVIDERS
from benchmarks.providers.dispatch import _transport
from benchmarks.rank_runner import run_rank
from benchmarks.registry import Case, Implementation, Inputs, Output, Provider, Shape
from benchmarks.runner import Settings
from moe_parallel.dispatch import TRANSPORTS
from tests.parallel.ranks import run_ranks

OP = OPS["dispatch"]
TINY = ("T=1,H=16,E=8,K=3", "T=6,H=16,E=8,K=3")
SETTINGS = Settings(torch.device("cpu"), shapes=TINY[1:], seconds=0.0, max_rounds=2)


def rows_of(found: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in found if all(row[k] == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dispatch") / "out.json"
    arguments = ["run", "dispatch", "--device", "cpu", "--ranks", "2", "--shape", *TINY]
    code = main([*arguments, "--seconds", "0", "--rounds", "2", "--out", str(out)])
    assert code == 0
    return out


def test_every_transport_is_a_provider() -> None:
    assert set(TRANSPORTS) < set(OWN)
    for name in (*TRANSPORTS, "torch_all_to_all", "gloo_rows"):
        assert "dispatch" in PROVIDERS[name].builders


def test_rows_are_complete(measured: Path) -> None:
    found = results.read(measured)
    names = {name for name, why in found["providers"].items() if not why}
    assert {"process_group", "torch_all_to_all", "gloo_rows", "copy_limit"} <= names
    assert found["ranks"]["2"] == ranks.placement(2)
    for direction in OP.directions["cpu"]:
        for tokens in (1, 6):
            rows = rows_of(found["rows"], direction=direction, sizes=sizes(tokens))
            assert {row["provider"] for row in rows} == names
            for row in rows:
                assert row["void"] == ""
                if tokens == 1:  # a latency: nothing to compare it with
                    assert row["floor_ms"] is row["over_floor"] is None
                else:
                    floor = 1e3 * row["bytes"] / row["copy_bandwidth"]
                    assert row["over_floor"] == pytest.approx(row["ms"] / floor)
                    if row["provider"] == "copy_limit":  # it does what the floor counts
                        assert row["ms_min"] >= 0.999 * row["floor_ms"]
                if row["provider"] == "copy_limit" and tokens == 1:
                    assert row["note"] == "there is nothing to copy"
                    continue
                assert row["note"] == ""
                assert 0 < row["ms_min"] <= row["ms"]
                assert row["rounds"] == 2
                assert (row["error"] is None) == (row["provider"] in LIMITS)
                assert row["error"] is None or row["error"] < 5e-3
    assert {row["sizes"]["T"] for row in found["rows"]} == {1, 6}


def test_a_resumed_run_does_what_is_left(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text(measured.read_text())
    before = results.read(out)["rows"]
    shapes = ("--shape", *TINY, "T=2,H=16,E=8,K=3")
    arguments = ["run", "dispatch", "--device", "cpu", "--ranks", "2", *shapes, "--out", str(out)]
    assert main([*arguments, "--resume", "--rounds", "0"]) == 0
    after = results.read(out)["rows"]
    assert after[: len(before)] == before
    for row in after[len(before) :]:
        assert row["shape"] == "T2 H16 E8 K3 P2"
        assert row["note"] == row["void"] == ""
        assert (row["ms"], row["rounds"]) == (None, 0)  # checked and not timed
    assert {row["provider"] for row in after[len(before) :]} == {row["provider"] for row in before}


def sizes(tokens: int) -> dict[str, int]:
    return {"T": tokens, "H": 16, "E": 8, "K": 3, "P": 2}


def test_report_of_ranks(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(measured), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    latency = next(line for line in text.splitlines() if line.startswith("| T1 H16 E8 K3 P2 "))
    rows = rows_of(json.loads(measured.read_text())["rows"], sizes=sizes(1), direction="forward")
    assert latency.count(" us |") == sum(row["ms"] is not None for row in rows) >= 3
    assert len(list(tmp_path.rglob("*.png"))) == 2  # a direction each
    wire = rows_of(json.loads(measured.read_text())["rows"], sizes=sizes(6))[0]["wire_bytes"]
    ratio = f"{wire['per_expert_copy'] / wire['once_per_rank']:.2f}"
    assert any(
        line.startswith("| T6 H16 E8 K3 P2 bf16 | balanced |") and line.endswith(f"| {ratio} |")
        for line in text.splitlines()
    )


def make_case(
    monkeypatch: pytest.MonkeyPatch, routing: str, rank: int = 0, dtype: torch.dtype = torch.float32
) -> Case:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    return OP.make_case(Shape(sizes(6)), dtype, torch.device("cpu"), routing, 0)


def test_the_costs_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks' 6 tokens go to experts 0, 1 and 2, all of the first rank."""
    case = make_case(monkeypatch, "one", dtype=torch.bfloat16)
    # Sent: 6 rows each; rank 1's alone leave their rank: 3 on average. Every one is copied once
    # there and those 3 back, two accesses each; the sum reads 6 rows and writes 6.
    assert OP.cost(case)["forward"].bytes == (2 * (6 + 3) + 6 + 6) * 16 * 2
    assert OP.cost(case)["backward"].bytes == OP.cost(case)["forward"].bytes
    details = OP.details(case)
    assert (details["rows_sent"], details["rows_to_others"]) == (6, 3)
    assert details["copies_to_others"] == 9
    wire = details["wire_bytes"]
    assert wire["once_per_rank"] == 3 * (2 * 16 * 2 + 3 * (4 + 2))
    assert wire["per_expert_copy"] == 9 * 2 * 16 * 2 + 8 * 8 / 2


@pytest.mark.parametrize("routing", ["balanced", "zipf", "uniform"])
def test_ranks_agree_on_what_is_sent(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [make_case(monkeypatch, routing, rank) for rank in range(2)]
    for first, second in zip(cases[0].inputs, cases[1].inputs, strict=True):
        assert torch.equal(first["rows"], second["rows"])
        assert torch.equal(first["slots"], second["slots"])
        assert not torch.equal(first["x"], second["x"])
        for rank, inputs in enumerate((first, second)):
            for owner in range(2):
                mine = inputs["topk_ids"] // 4 == owner
                assert int(inputs["rows"][rank, owner]) == int(mine.any(1).sum())
                assert int(inputs["slots"][rank, owner]) == int(mine.sum())


def test_large_batches_are_skewed_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert OP.routings(Shape({**sizes(4096)})) == ("balanced", "zipf")
    assert OP.routings(Shape({**sizes(256)})) == ("balanced",)
    assert main(["list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out.split("\ndispatch\n")[1]
    assert "\n  routing: balanced, zipf\n" in listed
    assert "\n  gloo_rows: available\n" in listed


def test_truth_and_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops over tokens and their experts."""
    case = make_case(monkeypatch, "uniform")
    inputs = case.inputs[0]
    truth = OP.truth(case, 0, True)
    x, weights, grad = (inputs[name].detach().double() for name in ("x", "topk_weights", "grad"))
    expected = {name: torch.zeros_like(value) for name, value in (("y", x), ("x", x))}
    expected["topk_weights"] = torch.zeros_like(weights)
    for token in range(6):
        for slot, expert in enumerate(inputs["topk_ids"][token].tolist()):
            factor = 0.5 + expert / 8
            expected["y"][token] += weights[token, slot] * factor * x[token]
            expected["x"][token] += weights[token, slot] * factor * grad[token]
            expected["topk_weights"][token, slot] = factor * float(x[token] @ grad[token])
    for name, right in truth.items():
        torch.testing.assert_close(right.values, expected[name][right.rows])
    assert OP.yardstick is not None
    implementation = OP.yardstick(case)
    y = implementation.run({**inputs, **case.check})
    implementation.backward(y, inputs)
    found = {"y": y, "x": inputs["x"].grad, "topk_weights": inputs["topk_weights"].grad}
    for name, value in found.items():
        assert isinstance(value, Tensor)
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def changed(change: Callable[[Output, Inputs], Output], exchanges: bool) -> Provider:
    """A right provider, its output changed on rank 1."""

    def build(case: Case) -> Implementation:
        assert OP.yardstick is not None
        build_right = PROVIDERS["process_group"].builders["dispatch"]
        right = build_right(case) if exchanges else OP.yardstick(case)

        def run(inputs: Inputs) -> Output:
            y = right.run(inputs if exchanges else {**inputs, **case.check})
            return change(y, inputs) if dist.get_rank() == 1 else y

        return Implementation(run)

    return Provider("other", {"dispatch": build})


def scaled(y: Output, inputs: Inputs) -> Output:
    assert isinstance(y, Tensor)
    return y * 1.02


def without_a_row(y: Output, inputs: Inputs) -> Output:
    assert isinstance(y, Tensor)
    return y * (torch.arange(len(y)) != 4)[:, None]


def failing(y: Output, inputs: Inputs) -> Output:
    raise NotImplementedError("not on this rank")


def slow(y: Output, inputs: Inputs) -> Output:
    time.sleep(0.01)
    return y


class FailingLate:
    """After the calls of warming up, of which there are two and two for each set of inputs."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, y: Output, inputs: Inputs) -> Output:
        self.calls += "factors" not in inputs
        if self.calls > 2 + 2 * 8 + 3:
            raise MemoryError("in a turn")
        return y


def _run_with(
    rank: int, size: int, change: Callable[..., Output], exchanges: bool, timeout: float
) -> list[dict[str, Any]]:
    PROVIDERS["other"] = changed(change, exchanges)
    settings = dataclasses.replace(
        SETTINGS,
        providers=("other", "process_group"),
        directions=("forward",),
        max_rounds=6,
        timeout=timeout,
    )
    return [row for rows in run_rank(OP, settings) for row in rows]


@pytest.mark.parametrize(
    ("change", "exchanges", "void", "note"),
    [
        (scaled, True, "rank 1: error of y", ""),
        (without_a_row, True, "rank 1: error of y", ""),
        (failing, False, "", "rank 1: NotImplementedError: not on this rank"),
        (FailingLate(), False, "", "rank 1: MemoryError: in a turn"),
        pytest.param(
            failing,
            True,
            "",
            "rank 0: DistBackendError.*rank 1: NotImplementedError: not on this rank",
            marks=pytest.mark.slow,  # rank 0 waits for rank 1 until its time is up
        ),
    ],
)
def test_what_is_wrong_on_one_rank_has_no_time(
    change: Callable[..., Output], exchanges: bool, void: str, note: str
) -> None:
    both = run_ranks(2, _run_with, change, exchanges, 4.0 if note else 60.0)
    assert [row["ms"] for row in both[0]] == [row["ms"] for row in both[1]]
    rows = rows_of(both[0], provider="other")
    assert rows
    for row in rows:
        assert not row["unsupported"]
        assert row["void"].startswith(void)
        assert bool(row["void"]) == bool(void)
        assert re.fullmatch(note, row["note"])
        assert (row["peak_bytes"] is not None) == (bool(void) or isinstance(change, FailingLate))
        assert row["ms"] is row["ms_min"] is row["over_floor"] is None
    for row in rows_of(both[0], provider="process_group"):
        assert row["ms"] > 0
        assert row["void"] == row["note"] == ""
        assert row["rounds"] >= 3


def test_the_slowest_rank_counts() -> None:
    for rows in run_ranks(2, _run_with, slow, False, 60.0):
        (row,) = rows_of(rows, provider="other")
        assert row["ms"] >= row["ms_min"] >= 10.0


def _unknown(rank: int, size: int) -> list[dict[str, Any]]:
    PROVIDERS["other"] = Provider("other", {"dispatch": _transport("no_such_transport")})
    settings = dataclasses.replace(SETTINGS, providers=("other",), directions=("forward",))
    return [row for rows in run_rank(OP, settings) for row in rows]


def test_a_transport_that_refuses_is_no_failure() -> None:
    for row in run_ranks(2, _unknown)[0]:
        assert row["unsupported"]
        assert "transport must be one of auto, process_group" in row["note"]
        assert row["ms"] is None


def _misdirected(rank: int, size: int) -> list[str]:
    """Experts that take the other rank's tokens for their own."""
    right = PROVIDERS["process_group"].builders["dispatch"]

    def build(case: Case) -> Implementation:
        factors = case.check["factors"]
        swapped = dataclasses.replace(case, check={"factors": factors.roll(len(factors) // 2)})
        implementation = right(swapped)
        return Implementation(lambda i: implementation.run({**i, **swapped.check}))

    PROVIDERS["other"] = Provider("other", {"dispatch": build})
    settings = dataclasses.replace(SETTINGS, providers=("other",), directions=("forward",))
    return [row["void"] for rows in run_rank(OP, settings) for row in rows]


def test_experts_of_the_wrong_rank_are_noticed() -> None:
    for voids in run_ranks(2, _misdirected):
        assert voids
        assert all("error of y" in void for void in voids)


def _ends(connection: Connection, message: Any) -> None:
    if message is None:
        os._exit(3)
    connection.send(message)


def test_a_dead_rank_is_named() -> None:
    context = multiprocessing.get_context("fork")
    connections, processes = [], []
    for message in (("rows", [{"a": 1}]), None, ("failed", "ValueError: no")):
        # the first rank's rows come first
        if connections:
            connections[0].poll(10)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_ends, args=(theirs, message))
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    received: Iterator[Any] = ranks._received(connections, processes)
    assert next(received) == [{"a": 1}]
    with pytest.raises(ranks.RanksFailed) as error:
        list(received)
    for process in processes:
        process.join()
    text = str(error.value)
    assert "3 of 3 ranks failed" in text  # the first ended without saying that it was done
    assert "rank 1 died: exit code 3" in text
    assert "rank 2 failed: ValueError: no" in text


def test_other_numbers_of_ranks_go_on_where_some_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on_ranks = ranks.run_on_ranks

    def failing(op: Any, settings: Settings, count: int) -> Iterator[Any]:
        if count == 2:
            raise ranks.RanksFailed("1 of 2 ranks failed\nrank 1 died: exit code 3")
        yield from run_on_ranks(op, settings, count)

    monkeypatch.setattr(ranks, "run_on_ranks", failing)
    out = tmp_path / "out.json"
    options = ["--ranks", "2", "1", "--seconds", "0", "--rounds", "1", "--out", str(out)]
    provider = ["--provider", "process_group"]
    code = main(["run", "dispatch", "--device", "cpu", "--shape", TINY[0], *provider, *options])
    assert code == 1
    assert {row["sizes"]["P"] for row in results.read(out)["rows"]} == {1}
    assert "dispatch: 1 of 2 ranks failed" in capsys.readouterr().err


def _rank(connection: Connection) -> None:
    threading.Thread(target=ranks._end_with_the_parent, daemon=True).start()
    connection.send("started")
    time.sleep(60)


def _command(connection: Connection) -> None:
    process = multiprocessing.get_context("fork").Process(target=_rank, args=(connection,))
    process.start()
    time.sleep(0.5)
    os._exit(0)  # as if killed: it ends nobody


def test_ranks_end_with_the_command_that_started_them() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    command = context.Process(target=_command, args=(theirs,))
    command.start()
    theirs.close()
    assert ours.recv() == "started"
    assert ours.poll(20)
    with pytest.raises(EOFError):  # nobody is left who could send
        ours.recv()
    command.join()


def test_oversubscription_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.ranks.cores", lambda: 8)
    assert ranks.placement(2) == {"threads": 4, "cores": 8, "oversubscribed": False}
    assert ranks.placement(16) == {"threads": 1, "cores": 8, "oversubscribed": True}
    assert ranks.placement(2, 5)["oversubscribed"]
    monkeypatch.setattr("benchmarks.ranks.run_on_ranks", lambda *arguments: iter(()))
    arguments = ["run", "dispatch", "--device", "cpu", "--out", str(tmp_path), "--ranks"]
    assert main([*arguments, "2", "16"]) == 0
    printed = capsys.readouterr().out
    assert "2 ranks x 4 threads on 8 cores\n" in printed
    assert "16 ranks x 1 threads on 8 cores: OVERSUBSCRIBED" in printed


def test_tables_say_that_ranks_share_cores(measured: Path) -> None:
    rows = rows_of(json.loads(measured.read_text())["rows"], sizes=sizes(6))
    for over in (True, False):
        text = tables.summary([row | {"oversubscribed": over} for row in rows])
        text += tables.table([row | {"oversubscribed": over} for row in rows[:4]])
        assert text.count("T6 H16 E8 K3 P2 OVERSUBSCRIBED ") == 3 * over


def test_a_gpu_for_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = dataclasses.replace(SETTINGS, device=torch.device("cuda"))
    assert ranks.impossible(OP, settings, 2) == "2 ranks need a GPU each; found 1"
    assert ranks.impossible(OP, settings, 1) == ""
    monkeypatch.setattr("benchmarks.ranks.impossible", lambda *arguments: "none here")
    assert main(["run", "dispatch", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "dispatch: none here\ndispatch: nothing was measured\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3"], "multiple of the number of ranks; got T1 H2048 E128 K8 and 3 ranks"),
        (["--ranks", "0"], "--ranks must be at least 1; got 0"),
        (["--shape", "K=200"], "K must be at most E = 128; got 200"),
        (["--shape", "P=4"], "got 'P=4'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "dispatch", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
