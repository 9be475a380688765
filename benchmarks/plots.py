"""Results as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.providers import MACHINE, OWN
from benchmarks.tables import grouped, number

Row = dict[str, Any]
OUR_COLORS = ("#c0392b", "#e67e22", "#f1948a", "#922b21")
COLORS = ("#2c3e50", "#2980b9", "#16a085", "#8e44ad", "#5d6d7e", "#7f8c8d", "#27ae60", "#b7950b")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One picture for each op, dtype, routing and direction: time over floor of every provider.

    Returns:
        The files written; none where nothing was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds: dict[tuple[str, str, str, str], dict[str, list[Row]]] = {}
    for (op, shape, dtype, routing, direction), group in grouped(rows).items():
        if any(row["over_floor"] for row in group):
            kinds.setdefault((op, dtype, routing, direction), {})[shape] = group
    written = []
    for kind, shapes in kinds.items():
        figure, axes = pyplot.subplots(
            figsize=(max(6.0, 2.2 * len(shapes) + 2), 4.5), layout="constrained"
        )
        _bars(axes, shapes)
        op, dtype, routing, direction = kind
        axes.set_title(f"{op}, {direction}, {dtype}, {routing} routing")
        path = folder / (re.sub(r"[^a-z0-9]+", "-", "-".join(kind)) + ".png")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


def _bars(axes: Any, shapes: dict[str, list[Row]]) -> None:
    names = [
        name
        for name in dict.fromkeys(row["provider"] for group in shapes.values() for row in group)
        if name not in MACHINE
    ]
    own = [name for name in names if name in OWN]
    others = [name for name in names if name not in OWN]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        ours = name in own
        colors, order = (OUR_COLORS, own) if ours else (COLORS, others)
        color = colors[order.index(name) % len(colors)]
        for index, group in enumerate(shapes.values()):
            found = [r["over_floor"] for r in group if r["provider"] == name and r["over_floor"]]
            if not found:
                continue
            x = index + (place - (len(names) - 1) / 2) * width
            axes.bar(x, found[0], width * 0.9, color=color, label=name)
            axes.text(x, found[0], number(found[0]), ha="center", va="bottom", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylabel("time over floor")
    axes.set_xticks(range(len(shapes)), [_wrapped(shape) for shape in shapes], fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)


def _wrapped(shape: str) -> str:
    """The first size above the rest."""
    first, _, rest = shape.partition(" ")
    return f"{first}\n{rest}"
