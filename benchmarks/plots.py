"""Results as pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.providers import DENSE, MACHINE, OWN
from benchmarks.tables import grouped, number

Row = dict[str, Any]
OUR_COLORS = ("#c0392b", "#e67e22", "#f1948a", "#922b21")
COLORS = ("#2c3e50", "#2980b9", "#16a085", "#8e44ad", "#5d6d7e", "#7f8c8d", "#27ae60", "#b7950b")


Kind = tuple[str, str, str, str]  # op, dtype, routing, direction
Shapes = dict[str, list[Row]]
MOST = 12  # shapes in a picture
SCALING = {"T": "tokens", "E": "experts", "I": "intermediate size"}
FEWEST = 4  # points that make a curve


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Pictures for each op, dtype, routing and direction.

    Time over floor of every provider, by shape; where flops count, TFLOP/s against the dense
    product's; and TFLOP/s over a size where shapes differ in that alone.

    Returns:
        The files written; none where nothing was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written: list[Path] = []

    def save(kind: Kind, name: str, width: float, paint: Callable[[Any], None]) -> None:
        figure, axes = pyplot.subplots(figsize=(width, 4.5), layout="constrained")
        paint(axes)
        op, dtype, routing, direction = kind
        axes.set_title(f"{op}, {direction}, {dtype}, {routing} routing")
        _legend(axes)
        path = folder / (
            re.sub(r"[^a-z0-9]+", "-", "-".join((*kind, name)).lower()).strip("-") + ".png"
        )
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)

    for kind, shapes in _kinds(rows, "over_floor").items():
        for page, some in _pages(shapes):
            save(kind, page, max(6.0, 2.2 * len(some) + 2), partial(_bars, shapes=some))
    for kind, shapes in _kinds(rows, "tflops").items():
        limited = {
            shape: group
            for shape, group in shapes.items()
            if any(row["provider"] == DENSE and row["tflops"] for row in group)
        }
        for page, some in _pages(limited):
            save(
                kind,
                f"tflops{page}",
                max(6.0, 2.2 * len(some) + 2),
                partial(_bars, shapes=some, value="tflops"),
            )
        for letter, fixed, groups in _scaling(shapes):
            save(
                kind,
                f"over-{letter.lower()}-{fixed}",
                7.0,
                partial(_curves, letter=letter, fixed=fixed, groups=groups),
            )
    return written


def _kinds(rows: Sequence[Row], value: str) -> dict[Kind, Shapes]:
    kinds: dict[Kind, Shapes] = {}
    for (op, shape, dtype, routing, direction), group in grouped(rows).items():
        if any(row[value] for row in group):
            kinds.setdefault((op, dtype, routing, direction), {})[shape] = group
    return kinds


def _pages(shapes: Shapes) -> Iterator[tuple[str, Shapes]]:
    """As many as a picture holds, with the picture's number if there are several."""
    items = list(shapes.items())
    for start in range(0, len(items), MOST):
        page = str(start // MOST + 1) if len(items) > MOST else ""
        yield page, dict(items[start : start + MOST])


def _scaling(shapes: Shapes) -> Iterator[tuple[str, str, list[list[Row]]]]:
    """Shapes that differ in one size: its letter, the others, and their rows, small to large."""
    families: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for shape, group in shapes.items():
        sizes = group[0].get("sizes", {})
        for letter in SCALING:
            if letter in sizes:
                words = [word for word in shape.split() if word != f"{letter}{sizes[letter]}"]
                families.setdefault((letter, " ".join(words)), {})[sizes[letter]] = group
    for (letter, fixed), groups in families.items():
        if len(groups) >= FEWEST:
            yield letter, fixed, [groups[size] for size in sorted(groups)]


def _color(name: str, names: Sequence[str]) -> str:
    own = [other for other in names if other in OWN]
    others = [other for other in names if other not in (*OWN, *MACHINE)]
    colors, order = (OUR_COLORS, own) if name in OWN else (COLORS, others)
    return colors[order.index(name) % len(colors)]


def _curves(axes: Any, letter: str, fixed: str, groups: Sequence[Sequence[Row]]) -> None:
    names = list(dict.fromkeys(row["provider"] for group in groups for row in group))
    for name in names:
        points = [
            (row["sizes"][letter], row["tflops"])
            for group in groups
            for row in group
            if row["provider"] == name and row["tflops"]
        ]
        if not points:
            continue
        if name in MACHINE:
            axes.plot(*zip(*points, strict=True), color="black", linestyle="--", label=name)
        else:
            color = _color(name, names)
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"{letter}, {SCALING[letter]} ({fixed})")
    axes.set_ylabel("TFLOP/s")
    axes.set_ylim(bottom=0)


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)


def _bars(axes: Any, shapes: Shapes, value: str = "over_floor") -> None:
    names = [
        name
        for name in dict.fromkeys(row["provider"] for group in shapes.values() for row in group)
        if name not in MACHINE
    ]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        color = _color(name, names)
        for index, group in enumerate(shapes.values()):
            found = [row[value] for row in group if row["provider"] == name and row[value]]
            if not found:
                continue
            x = index + (place - (len(names) - 1) / 2) * width
            axes.bar(x, found[0], width * 0.9, color=color, label=name)
            axes.text(x, found[0], number(found[0]), ha="center", va="bottom", fontsize=7)
    if value == "over_floor":
        axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set_yscale("log")
        axes.set_ylabel("time over floor")
    else:
        for index, group in enumerate(shapes.values()):
            limit = next(row[value] for row in group if row["provider"] == DENSE and row[value])
            axes.hlines(limit, index - 0.45, index + 0.45, "black", "dashed", label=DENSE)
        axes.set_ylabel("TFLOP/s")
    axes.set_xticks(range(len(shapes)), [_wrapped(shape) for shape in shapes], fontsize=8)


def _wrapped(shape: str) -> str:
    """The first size above the rest."""
    first, _, rest = shape.partition(" ")
    return f"{first}\n{rest}"
