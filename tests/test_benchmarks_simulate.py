"""The model of the exchange between GPUs: its traffic by counting, its times by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import simulate
from benchmarks.cli import main
from benchmarks.network import (
    SENDINGS,
    TRANSPORTS,
    Layer,
    Link,
    Machine,
    Software,
    with_settings,
)

# Latencies alone, and bytes alone: all else takes no time.
NONE = {"launch": 0.0, "sync": 0.0, "collective": 0.0, "nvlink_peer": 0.0, "rdma_peer": 0.0}
SLOW_START = Machine(
    4, Link(2e-6, 1e30), Link(7e-6, 1e30), 1e30, **{**NONE, "rdma_write": 0.0, "nvlink_peer": 1e-6}
)
SLOW_LINKS = Machine(4, Link(0.0, 100e9), Link(0.0, 10e9), 1e30, **NONE, rdma_write=0.0)


def counted(layer: Layer, node: int, gpus: int) -> dict[str, tuple[float, float, float]]:
    """Rows of one token of GPU 0 by kind, averaged over every choice of experts."""
    each = layer.experts // gpus
    totals = {name: [0, 0, 0] for name in SENDINGS}
    choices = list(itertools.combinations(range(layer.experts), layer.top_k))
    for choice in choices:
        ranks = [expert // each for expert in choice]
        for name, targets in (("per copy", ranks), ("per rank", sorted(set(ranks)))):
            for rank in targets:
                totals[name][0 if rank == 0 else 1 if rank < node else 2] += 1
        for far in {rank // node for rank in ranks}:
            there = {rank for rank in ranks if rank // node == far}
            entry = far * node  # where the row arrives: the GPU of the same place
            totals["per node"][2] += far > 0
            totals["per node"][1] += len(there - {entry})
    return {
        name: tuple(layer.tokens * total / len(choices) for total in of)  # type: ignore[misc]
        for name, of in totals.items()
    }


@pytest.mark.parametrize(("gpus", "node"), [(1, 4), (2, 4), (4, 4), (4, 2), (8, 2), (8, 4)])
def test_traffic_is_that_of_every_choice_of_experts(gpus: int, node: int) -> None:
    layer = Layer(tokens=10, hidden=1, experts=8, top_k=3)
    expected = counted(layer, node, gpus)
    for name, sending in SENDINGS.items():
        found = sending(layer, Machine(gpus_per_node=node), gpus)
        _, nvlink, rdma = expected[name]
        own = expected["per copy" if name == "per copy" else "per rank"][0]
        assert (found.own, found.nvlink, found.rdma) == pytest.approx((own, nvlink, rdma))


def test_small_messages_cost_latency_alone() -> None:
    layer = Layer(tokens=1, hidden=8, experts=8, top_k=2)
    one_node = {
        name: t.estimate(layer, SLOW_START, 4, "dispatch") for name, t in TRANSPORTS.items()
    }
    # counts and rows: a latency and three peers each
    assert one_node["process_group"].seconds == pytest.approx(2 * 2e-6 + 2 * 3 * 1e-6)
    assert one_node["process_group"].bottleneck == "nvlink messages"
    assert one_node["cuda_ipc"].seconds == pytest.approx(2 * 2e-6)
    assert one_node["cuda_ipc"].bottleneck == "latency"
    assert one_node["deepep_low_latency"].seconds == pytest.approx(2e-6)
    combine = TRANSPORTS["process_group"].estimate(layer, SLOW_START, 4, "combine")
    assert combine.seconds == pytest.approx(2e-6 + 3 * 1e-6)
    two_nodes = TRANSPORTS["deepep"].estimate(layer, SLOW_START, 8, "dispatch")
    assert two_nodes.seconds == pytest.approx(2 * 7e-6)


def test_large_messages_cost_their_bytes_alone() -> None:
    # 1,000 tokens, one expert each, of 8 on 8 GPUs: an eighth to each GPU
    layer = Layer(tokens=1000, hidden=500_000, experts=8, top_k=1)
    row = 2 * 500_000.0
    for name in ("process_group", "torch_all_to_all", "deepep_low_latency"):
        time = TRANSPORTS[name].estimate(layer, SLOW_LINKS, 8, "combine")
        assert time.seconds == pytest.approx(500 * row / 10e9, rel=1e-6)
        assert time.bottleneck == "rdma bytes"
    # NVLink alone: three of four GPUs' rows, of an expert each on four GPUs
    time = TRANSPORTS["cuda_ipc"].estimate(layer, SLOW_LINKS, 4, "combine")
    assert time.seconds == pytest.approx(750 * row / 100e9, rel=1e-6)
    assert time.bottleneck == "nvlink bytes"
    # ids and weights travel in dispatch alone
    time = TRANSPORTS["cuda_ipc"].estimate(layer, SLOW_LINKS, 4, "dispatch")
    assert time.seconds == pytest.approx(750 * (row + 8) / 100e9, rel=1e-9)


def test_the_slower_link_counts() -> None:
    """All of a token's experts on its node's neighbour: once by RDMA, then on by NVLink."""
    layer = Layer(tokens=1000, hidden=500_000, experts=8, top_k=8)
    row = 2 * 500_000.0
    deepep = TRANSPORTS["deepep"]
    slow_rdma = deepep.estimate(layer, SLOW_LINKS, 8, "combine")
    assert slow_rdma.seconds == pytest.approx(1000 * row / 10e9, rel=1e-6)
    fast_rdma = with_settings(SLOW_LINKS, {"rdma.bandwidth": 100e9})
    # 8 GPUs less the two that rows arrive at
    assert deepep.estimate(layer, fast_rdma, 8, "combine").seconds == pytest.approx(
        6000 * row / 100e9, rel=1e-6
    )


def test_memory_and_software() -> None:
    machine = Machine(4, Link(1e-30, 1e30), Link(1e-30, 1e30), 1e9, **NONE, rdma_write=0.0)
    layer = Layer(tokens=100, hidden=500, experts=4, top_k=4)
    # every token goes to all four GPUs; combine reads 400 rows and writes 100
    times = {
        way: TRANSPORTS["process_group"].estimate(layer, machine, 4, way) for way in simulate.WAYS
    }
    assert times["combine"].parts["memory"] == pytest.approx(500 * 1000 / 1e9)
    assert times["dispatch"].parts["memory"] == pytest.approx(2 * 400 * (1000 + 32) / 1e9)
    own = Software(call=3e-6, row=1e-9)
    time = TRANSPORTS["cuda_ipc"].estimate(layer, machine, 4, "dispatch", own)
    assert time.seconds == pytest.approx(3e-6 + 400e-9)


# Microseconds of dispatch and combine that DeepEP publishes for its low-latency kernels (128
# tokens, H 7168, 8 experts a token, fp8 dispatch, H800): docs/dispatch-model.md.
PUBLISHED = {16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}


def test_the_assumptions_come_near_published_times() -> None:
    layer = Layer(tokens=128, hidden=7168, experts=256, top_k=8, fp8_dispatch=True)
    machine = with_settings(Machine(), {"nvlink.bandwidth": 160e9})
    for gpus, published in PUBLISHED.items():
        for way, expected in zip(simulate.WAYS, published, strict=True):
            time = TRANSPORTS["deepep_low_latency"].estimate(layer, machine, gpus, way)
            assert 1e6 * time.seconds == pytest.approx(expected, rel=0.12)


# GB/s a GPU to all nodes, its own among them, of its normal kernels with 8 GPUs a node (8K tokens).
BANDWIDTH = {16: (90, 81), 32: (61, 61)}


def test_the_assumptions_come_near_published_bandwidth() -> None:
    layer = Layer(tokens=8192, hidden=7168, experts=256, top_k=8, fp8_dispatch=True)
    for gpus, published in BANDWIDTH.items():
        nodes = gpus // 8
        for way, expected in zip(simulate.WAYS, published, strict=True):
            sent = layer.tokens * nodes * layer.hit(nodes) * layer.row_bytes(way)
            time = TRANSPORTS["deepep"].estimate(layer, Machine(), gpus, way)
            assert sent / time.seconds / 1e9 == pytest.approx(expected, rel=0.06)


def rows_of(transport: str, ranks: int, call: float, row: float, sent: list[float]) -> list[Any]:
    return [
        {
            "op": "dispatch",
            "direction": "forward",
            "routing": "balanced",
            "provider": transport,
            "ranks": ranks,
            "rows_sent": count,
            "ms_min": 1e3 * (call + row * count),
        }
        for count in sent
    ]


def test_costs_of_calls_and_rows_are_found_again() -> None:
    rows = rows_of("process_group", 2, 80e-6, 3e-6, [2.0, 32.0, 500.0, 8000.0])
    rows += rows_of("shared_memory", 2, 0.0, 2e-7, [2.0, 32.0, 500.0])
    rows += rows_of("copy_limit", 2, 1.0, 1.0, [2.0, 32.0])
    first, second = simulate.fit(rows)
    assert (first.transport, second.transport) == ("process_group", "shared_memory")
    assert (first.call, first.row) == pytest.approx((80e-6, 3e-6), rel=1e-6)
    assert (second.call, second.row) == pytest.approx((0.0, 2e-7), abs=1e-12)
    assert first.error == pytest.approx(0.0, abs=1e-6)
    falling = simulate.fit(rows_of("process_group", 2, 1e-3, -1e-5, [1.0, 50.0, 90.0]))
    assert falling[0].call >= 0 <= falling[0].row


def test_measured_costs_replace_assumed_ones() -> None:
    """A machine whose software costs are known: what is found from its times gives them again."""
    layer, machine = Layer(4096, 2048, 128, 8), Machine()
    own = {"dispatch": Software(40e-6, 2e-9), "combine": Software(40e-6, 2e-9)}
    transport = TRANSPORTS["cuda_ipc"]
    points = []
    for tokens in (16, 256, 4096):
        size = Layer(tokens, 2048, 128, 8)
        seconds = sum(
            transport.estimate(size, machine, 4, way, own[way]).seconds for way in simulate.WAYS
        )
        sent = SENDINGS[transport.sending](size, machine, 4).all
        points += rows_of("cuda_ipc", 4, seconds, 0.0, [sent])
    found = simulate.measured_software(simulate.fit(points), layer, machine)["cuda_ipc"]
    total = sum(transport.estimate(layer, machine, 8, way, own[way]).seconds for way in found)
    again = sum(transport.estimate(layer, machine, 8, way, found[way]).seconds for way in found)
    assert again == pytest.approx(total, rel=1e-3)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "measured.json"
    rows = rows_of("process_group", 2, 80e-6, 3e-6, [2.0, 8000.0])
    common = {"shape": "", "ms": 1.0, "tflops": None, "over_floor": None, "peak_bytes": 0}
    common |= {"error": 0.0, "void": "", "note": "", "sizes": {"H": 2048, "E": 128, "K": 8}}
    common |= {"dtype": "bf16", "rounds": 1, "gbs": None, "floor_ms": None}
    header = {"op": "dispatch", "date": "", "commit": {"hash": "abc", "dirty": False}}
    header |= {"device": {"type": "cpu", "name": "a CPU"}, "threads": 1}
    header |= {"versions": {}, "limits": {}, "providers": {}}
    results.write_text(json.dumps({**header, "rows": [{**row, **common} for row in rows]}))
    out = tmp_path / "out"
    assert main(["simulate", "--results", str(results), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "dispatch.md").read_text().startswith(printed[:100])
    assert (out / "dispatch.png").read_bytes().startswith(b"\x89PNG")
    assert "Measured on a CPU (commit abc)" in printed
    assert "| process_group | 2 | 80 | 3,000 | 0% |" in printed
    titles = [line for line in printed.splitlines() if line.startswith("###")]
    assert len(titles) == 3
    assert all("simulated, not measured" in title for title in titles)
    for gpus in (8, 1024):
        assert f"\n| {gpus} | {gpus} |" in printed
    # once to a rank, and once to a node, send less between nodes
    line = next(line for line in printed.splitlines() if line.startswith("| 16 | ") and "/" in line)
    copy, rank, node = (float(cell.split("/")[1].replace(",", "")) for cell in line.split("|")[2:5])
    assert copy > rank > node


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12"], "got 12"),
        (["--set", "speed=3"], "rdma.bandwidth"),
        (["--set", "nvlink.latency=fast"], "NAME=NUMBER"),
        (["--set", "memory=0"], "must be positive"),
        (["--set", "launch=inf"], "must be positive and finite; got inf"),
        (["--set", "gpus_per_node=0.5"], "gpus_per_node must be a whole number; got 0.5"),
        (["--results", "."], ". cannot be read"),
        (["--tokens", "0"], "at least 1"),
        (["--shape", "E=4"], "K must be at most E = 4"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
