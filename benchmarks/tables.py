"""Results as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.providers import LIMITS, OWN
from benchmarks.providers.moe_overlap import IN_TURN, OVERLAP

Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, str, str, str]:
    """What must be equal for two rows to compete."""
    return row["op"], row["shape"], row["dtype"], row["routing"], row["direction"]


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str, str, str], list[Row]]:
    """Competing rows together, in the order measured."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def fastest(group: Sequence[Row]) -> Row | None:
    """The best of ours, by minima."""
    own = [row for row in group if row["provider"] in OWN and row["ms_min"]]
    return min(own, key=lambda row: row["ms_min"], default=None)


def lead(group: Sequence[Row]) -> float | None:
    """How many times faster ours is than the fastest other, by minima; None without either."""
    ours = fastest(group)
    others = [r["ms_min"] for r in group if r["provider"] not in (*OWN, *LIMITS) and r["ms_min"]]
    return min(others) / ours["ms_min"] if ours and others else None


def vs_best_peer(row: Row, group: Sequence[Row]) -> float | None:
    """How many times as fast as the fastest other library, by minima: above 1 is ahead of all.

    Libraries are measured against the others, this package's implementations among them.
    """
    if not row["ms_min"] or row["provider"] in LIMITS:
        return None
    own = row["provider"] in OWN
    peers = [
        other["ms_min"]
        for other in group
        if other["ms_min"]
        and other["provider"] not in (*LIMITS, row["provider"])
        and not (own and other["provider"] in OWN)
    ]
    return min(peers) / row["ms_min"] if peers else None


def table(group: Sequence[Row]) -> str:
    """One shape, all providers. "of ours" is the minimum over that of the fastest of ours."""
    op, shape, dtype, routing, direction = key(group[0])
    floor = group[0]["floor_ms"]
    unit, scale = ("ms", 1.0) if floor else ("us", 1e3)
    limit = f"floor {number(floor)} ms" if floor else "latency: no floor"
    ours = fastest(group)
    lines = [
        f"{op} {shape}{_crowded(group)} {dtype} {routing} {direction} ({limit})",
        "",
        f"| provider | {unit} | min | rounds | of ours | over floor | TFLOP/s | GB/s | peak MiB "
        "| error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in group:
        if row["ms"] is None:
            reason = f"void: {row['void']}" if row["void"] else row["note"] or "-"
            cells = [reason, *[""] * 6]
        else:
            cells = [number(row["ms"] * scale), number(row["ms_min"] * scale), str(row["rounds"])]
            cells.append(number(row["ms_min"] / ours["ms_min"]) if ours else "-")
            cells += [number(row[name]) for name in ("over_floor", "tflops", "gbs")]
        peak, error = row["peak_bytes"], row["error"]
        cells.append("" if peak is None else number(peak / 2**20))
        cells.append("" if error is None else f"{error:.1e}")
        lines.append("| " + " | ".join([row["provider"], *cells]) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """One line a shape and direction: every provider's time, our best against the best other."""
    parts = []
    by_kind: dict[tuple[str, str, str, str], dict[str, list[Row]]] = {}
    for (op, shape, dtype, routing, direction), group in grouped(rows).items():
        by_kind.setdefault((op, dtype, routing, direction), {})[shape] = group
    for (op, dtype, routing, direction), shapes in by_kind.items():
        names = list(dict.fromkeys(row["provider"] for g in shapes.values() for row in g))
        columns = ["shape", *names, "floor", "ours over floor", "best other / ours"]
        lines = [
            f"### {op}, {direction}, {dtype}, {routing} routing (ms, median)",
            "",
            "| " + " | ".join(columns) + " |",
            "| " + " | ".join("---" for _ in columns) + " |",
        ]
        for shape, group in shapes.items():
            of = {row["provider"]: row for row in group}
            cells = [shape + _crowded(group)]
            for name in names:
                row = of.get(name)
                voided = "void" if row and row["void"] else "-"
                cells.append(_time(row) if row and row["ms"] else voided)
            ours, ratio = fastest(group), lead(group)
            cells.append(number(group[0]["floor_ms"]))
            cells.append(number(ours["over_floor"]) if ours else "-")
            cells.append(f"{ratio:.2f}" if ratio else "-")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if wire := on_the_wire(rows):
        parts.append(wire)
    if overlap := gains(rows):
        parts.append(overlap)
    return "\n\n".join(parts)


def _crowded(group: Sequence[Row]) -> str:
    return " OVERSUBSCRIBED" * bool(group[0].get("oversubscribed"))


def _time(row: Row) -> str:
    """In milliseconds; a latency, which has no floor, in microseconds."""
    return number(row["ms"]) if row["floor_ms"] else f"{number(1e3 * row['ms'])} us"


def on_the_wire(rows: Sequence[Row]) -> str:
    """What leaves a rank in a forward pass, for ops on ranks; "" where there is none."""
    lines = []
    for (_, shape, dtype, routing, _), group in grouped(rows).items():
        sizes = group[0].get("wire_bytes")
        if sizes is None:
            continue
        once, copies = sizes["once_per_rank"], sizes["per_expert_copy"]
        cells = [f"{shape} {dtype}", routing, number(once / 2**20), number(copies / 2**20)]
        lines.append("| " + " | ".join([*cells, f"{copies / once:.2f}" if once else "-"]) + " |")
    if not lines:
        return ""
    columns = ("shape", "routing", "once a rank", "a copy an expert", "copies / once")
    head = [
        "### MiB that leave a rank, there and back, with a token sent once to each rank or expert",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    return "\n".join([*head, *dict.fromkeys(lines)])


def gains(rows: Sequence[Row]) -> str:
    """How many times as fast a layer is that overlaps, for each transport; "" where none does."""
    lines: dict[str, dict[str, str]] = {}
    for (_, shape, dtype, routing, direction), group in grouped(rows).items():
        of = {row["provider"]: row for row in group if row["ms"]}
        for name, row in of.items():
            transport = name.removesuffix(OVERLAP)
            other = of.get(transport + IN_TURN)
            if transport != name and other is not None:
                label = f"{shape}{_crowded(group)} {dtype} | {routing} | {direction}"
                gain = [f"{other[time] / row[time]:.2f}" for time in ("ms", "ms_min")]
                lines.setdefault(label, {})[transport] = " / ".join(gain)
    if not lines:
        return ""
    transports = list(dict.fromkeys(name for line in lines.values() for name in line))
    columns = ("shape", "routing", "direction", *transports)
    head = [
        "### Time in turn over time with overlap, medians / minima",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    cells = {label: [line.get(name, "-") for name in transports] for label, line in lines.items()}
    return "\n".join([*head, *(f"| {' | '.join([label, *of])} |" for label, of in cells.items())])


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
