"""The end of a run as a picture and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm.checkpoint import Progress

SMOOTHED = 21  # steps


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw(
    path: Path, progress: Progress, levels: Mapping[str, float], heldout: float | None
) -> None:
    """Loss by step beside the n-gram levels, and the share of the tokens of every expert."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    steps = range(1, progress.step + 1)
    left.plot(steps, progress.losses, color="#bdc3c7", linewidth=0.8, label="training, each step")
    left.plot(steps, _smooth(progress.losses), color="#2980b9", label=f"mean of {SMOOTHED} steps")
    for (name, value), style in zip(levels.items(), ("--", ":", "-."), strict=False):
        left.axhline(value, color="black", linestyle=style, linewidth=1, label=name)
    if heldout is not None:
        left.plot([progress.step], [heldout], "o", color="#c0392b", label="held out")
    left.set_xlabel("step")
    left.set_ylabel("nats per byte")
    left.set_title("Loss")
    left.legend()

    shares = [[count / sum(layer) * len(layer) for count in layer] for layer in progress.load]
    image = right.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    right.set_xlabel("expert")
    right.set_ylabel("layer")
    right.set_yticks(range(len(shares)))
    right.set_title("Expert load since the start (1: the mean)")
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(path: Path, summary: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(partial, path)


def _smooth(values: list[float]) -> list[float]:
    """The mean of the steps around each; of fewer of them near the ends."""
    smooth = []
    for place in range(len(values)):
        reach = min(SMOOTHED // 2, place, len(values) - 1 - place)
        around = values[place - reach : place + reach + 1]
        smooth.append(sum(around) / len(around))
    return smooth
