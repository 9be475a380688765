"""Results as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.providers import LIMITS, OURS

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


def lead(group: Sequence[Row]) -> float | None:
    """How many times faster ours is than the fastest other, by minima; None without either."""
    ours = [r["ms_min"] for r in group if r["provider"] == OURS and r["ms_min"]]
    others = [r["ms_min"] for r in group if r["provider"] not in (OURS, *LIMITS) and r["ms_min"]]
    return min(others) / ours[0] if ours and others else None


def table(group: Sequence[Row]) -> str:
    """One shape, all providers."""
    op, shape, dtype, routing, direction = key(group[0])
    floor = f"floor {number(group[0]['floor_ms'])} ms"
    lines = [
        f"{op} {shape} {dtype} {routing} {direction} ({floor})",
        "",
        "| provider | ms | min | rounds | over floor | TFLOP/s | GB/s | peak MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in group:
        if row["ms"] is None:
            reason = f"void: {row['void']}" if row["void"] else row["note"] or "-"
            cells = [reason, *[""] * 5]
        else:
            columns = ("ms", "ms_min", "rounds", "over_floor", "tflops", "gbs")
            cells = [number(row[name]) for name in columns]
        peak, error = row["peak_bytes"], row["error"]
        cells.append("" if peak is None else number(peak / 2**20))
        cells.append("" if error is None else f"{error:.1e}")
        lines.append("| " + " | ".join([row["provider"], *cells]) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """One line a shape and direction: every provider's time, ours against the best other."""
    parts = []
    by_kind: dict[tuple[str, str, str, str], dict[str, list[Row]]] = {}
    for (op, shape, dtype, routing, direction), group in grouped(rows).items():
        by_kind.setdefault((op, dtype, routing, direction), {})[shape] = group
    for (op, dtype, routing, direction), shapes in by_kind.items():
        names = list(dict.fromkeys(row["provider"] for g in shapes.values() for row in g))
        columns = ["shape", *names, "floor", f"{OURS} over floor", "best other / ours"]
        lines = [
            f"### {op}, {direction}, {dtype}, {routing} routing (ms, median)",
            "",
            "| " + " | ".join(columns) + " |",
            "| " + " | ".join("---" for _ in columns) + " |",
        ]
        for shape, group in shapes.items():
            of = {row["provider"]: row for row in group}
            cells = [shape]
            for name in names:
                row = of.get(name)
                voided = "void" if row and row["void"] else "-"
                cells.append(number(row["ms"]) if row and row["ms"] else voided)
            own, ratio = of.get(OURS), lead(group)
            cells.append(number(group[0]["floor_ms"]))
            cells.append(number(own["over_floor"]) if own and own["ms"] else "-")
            cells.append(f"{ratio:.2f}" if ratio else "-")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
