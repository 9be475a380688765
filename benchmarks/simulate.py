"""What the exchange of tokens should cost on 8 to 1024 GPUs: tables and a plot of the model.

Measured costs come from a results file of ``run dispatch``; the rest is assumed, as
docs/dispatch-model.md says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.network import (
    SENDINGS,
    TRANSPORTS,
    Layer,
    Machine,
    Software,
    expert_parallel,
    possible,
)
from benchmarks.providers import LIMITS
from benchmarks.tables import number

Row = dict[str, Any]
WAYS = ("dispatch", "combine")
HOST_RANKS = (2, 4, 8, 16, 32)
LABEL = "simulated, not measured"


@dataclass(frozen=True)
class Fit:
    """Measured round trips of one transport on so many ranks: ``call + row * rows`` seconds.

    Attributes:
        error: largest difference from a measured time, relative to it.
    """

    transport: str
    ranks: int
    call: float
    row: float
    error: float


def fit(rows: Iterable[Row]) -> list[Fit]:
    """Costs of a call and of a row sent, from forward passes of a results file."""
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        measured = row["op"] == "dispatch" and row["direction"] == "forward" and row["ms_min"]
        if measured and row["routing"] == "balanced" and row["provider"] not in LIMITS:
            of = points.setdefault((row["provider"], row["ranks"]), [])
            of.append((row["rows_sent"], row["ms_min"] / 1e3))
    return [_fit(name, ranks, found) for (name, ranks), found in points.items() if len(found) > 1]


def _fit(transport: str, ranks: int, points: Sequence[tuple[float, float]]) -> Fit:
    """Least squares of relative errors; neither cost is negative."""
    sent, seconds = torch.tensor(points, dtype=torch.float64).T
    columns = torch.stack([torch.ones_like(sent), sent], 1) / seconds[:, None]
    ones = torch.ones_like(sent)[:, None]
    call, row = torch.linalg.lstsq(columns, ones).solution.flatten().tolist()
    if min(call, row) < 0:
        kept = 1 if call < 0 else 0
        only = float(torch.linalg.lstsq(columns[:, kept : kept + 1], ones).solution)
        call, row = (0.0, only) if kept else (only, 0.0)
    error = float(((call + row * sent) / seconds - 1).abs().max())
    return Fit(transport, ranks, call, row, error)


def measured_software(
    fits: Iterable[Fit], layer: Layer, machine: Machine
) -> dict[str, dict[str, Software]]:
    """Of transports measured on GPUs: what is left of a call and a row without the links.

    Half of a round trip each for dispatch and combine. Of several numbers of ranks the largest.
    """
    found: dict[str, dict[str, Software]] = {}
    for one in sorted(fits, key=lambda one: one.ranks):
        transport = TRANSPORTS.get(one.transport)
        if transport is None or not possible(transport, layer, machine, one.ranks):
            continue
        sent = SENDINGS[transport.sending](layer, machine, one.ranks).all
        software = {}
        for way in WAYS:
            parts = transport.estimate(layer, machine, one.ranks, way, Software(0.0)).parts
            by_row = sum(s for part, s in parts.items() if "bytes" in part or part == "memory")
            fixed = sum(parts.values()) - by_row
            call, row = one.call / 2 - fixed, one.row / 2 - by_row / sent
            software[way] = Software(max(0.0, call), max(0.0, row))
        found[one.transport] = software
    return found


def host_ranks(fits: Sequence[Fit], layer: Layer) -> str:
    """CPU ranks of one host: measured costs, and what they come to with more ranks."""
    largest = max(found.ranks for found in fits)
    more = [n for n in HOST_RANKS if n > largest and layer.experts % n == 0]
    columns = ["transport", "ranks", "us a call", "ns a row", "worst error of the fit"]
    columns += [f"{n} ranks, ms" for n in more]
    lines = []
    for found in fits:
        cells = [found.transport, str(found.ranks), number(1e6 * found.call)]
        cells += [number(1e9 * found.row), f"{found.error:.0%}"]
        for ranks in more:
            call = found.call * (ranks - 1) / max(1, found.ranks - 1)
            sent = layer.tokens * ranks * layer.hit(ranks)
            cells.append(number(1e3 * (call + sent * found.row)))
        lines.append(cells)
    return _table(columns, lines)


def tables(
    layers: Sequence[Layer],
    machine: Machine,
    gpus: Sequence[int],
    software: Mapping[str, Mapping[str, Software]],
) -> str:
    """The whole model as markdown."""
    parts = []
    for layer in layers:
        parts += [
            f"### {_title(layer)}: dispatch + combine, us ({LABEL})",
            _times(layer, machine, gpus, software),
            "What takes the most of it, by the number of GPUs:",
            _bottlenecks(layer, machine, gpus, software),
        ]
    parts += [
        f"### {_title(layers[-1])}: MiB that a GPU sends in a dispatch, NVLink / RDMA ({LABEL})",
        _bytes(layers[-1], machine, gpus),
    ]
    return "\n\n".join(parts)


def _title(layer: Layer) -> str:
    kind = "fp8 dispatch, bf16 combine" if layer.fp8_dispatch else "bf16"
    return f"T{layer.tokens} H{layer.hidden} E{layer.experts} K{layer.top_k} {kind}"


def _times(
    layer: Layer,
    machine: Machine,
    gpus: Sequence[int],
    software: Mapping[str, Mapping[str, Software]],
) -> str:
    lines = []
    for count in gpus:
        ranks = expert_parallel(layer, count)
        cells = [str(count), str(ranks)]
        for name, transport in TRANSPORTS.items():
            if not possible(transport, layer, machine, count):
                cells.append("-")
                continue
            times = [
                transport.estimate(layer, machine, ranks, way, software.get(name, {}).get(way))
                for way in WAYS
            ]
            cells.append(" + ".join(f"{1e6 * time.seconds:,.0f}" for time in times))
        lines.append(cells)
    return _table(["GPUs", "that share the experts", *TRANSPORTS], lines)


def _bottlenecks(
    layer: Layer,
    machine: Machine,
    gpus: Sequence[int],
    software: Mapping[str, Mapping[str, Software]],
) -> str:
    lines = []
    for name, transport in TRANSPORTS.items():
        cells = [name]
        for way in WAYS:
            found = []
            for count in gpus:
                if possible(transport, layer, machine, count):
                    own = software.get(name, {}).get(way)
                    ranks = expert_parallel(layer, count)
                    time = transport.estimate(layer, machine, ranks, way, own)
                    found.append((time.bottleneck, count))
            spans = []
            for part, group in groupby(found, key=lambda pair: pair[0]):
                counts = [count for _, count in group]
                span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
                spans.append(f"{part} ({span})")
            cells.append(", ".join(spans) or "-")
        lines.append(cells)
    return _table(["transport", *WAYS], lines)


def _bytes(layer: Layer, machine: Machine, gpus: Sequence[int]) -> str:
    size = layer.row_bytes("dispatch") / 2**20
    lines = []
    for count in gpus:
        ranks = expert_parallel(layer, count)
        cells = [str(count)]
        for sending in SENDINGS.values():
            traffic = sending(layer, machine, ranks)
            cells.append(f"{number(size * traffic.nvlink)} / {number(size * traffic.rdma)}")
        lines.append(cells)
    return _table(["GPUs", *SENDINGS], lines)


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def draw(
    layers: Sequence[Layer],
    machine: Machine,
    gpus: Sequence[int],
    software: Mapping[str, Mapping[str, Software]],
    path: Path,
) -> None:
    """Dispatch and combine over the number of GPUs, a picture for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(layers), figsize=(5.5 * len(layers), 4.5), layout="constrained", squeeze=False
    )
    for panel, layer in zip(axes[0], layers, strict=True):
        for name, transport in TRANSPORTS.items():
            counts = [n for n in gpus if possible(transport, layer, machine, n)]
            times = []
            for count in counts:
                ranks = expert_parallel(layer, count)
                both = (
                    transport.estimate(layer, machine, ranks, way, software.get(name, {}).get(way))
                    for way in WAYS
                )
                times.append(1e6 * sum(time.seconds for time in both))
            panel.plot(counts, times, marker="o", markersize=4, label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(gpus, [str(count) for count in gpus], fontsize=8)
        panel.set_xlabel("GPUs")
        panel.set_ylabel("dispatch + combine, us")
        panel.set_title(f"{_title(layer)}\n{LABEL}", fontsize=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
