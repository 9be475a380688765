"""Checkpoints that any number of ranks can continue from, and that are never half there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from lm.settings import Settings
from moe_parallel.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

FOLDER = "checkpoints"
KEEP = 2


@dataclass
class Progress:
    """How far a run is, and what it saw.

    Attributes:
        step: steps taken: the position in the data, which follows from the seed and the step.
        losses, norms, balances: of every step: nats per byte; norm of the gradient; load of the
            busiest expert over the mean load, averaged over the layers.
        heldout: step and nats per byte where it was measured.
        load: [layers][experts] tokens since the start.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    balances: list[float] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    load: list[list[int]] = field(default_factory=list)


def save(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    progress: Progress,
) -> Path:
    """Write ``out/checkpoints/step-N``: all ranks together, complete before it has that name."""
    extra = {
        "settings": settings.as_json(),
        "progress": asdict(progress),
        "rng": torch.get_rng_state(),
    }
    folder = out / FOLDER
    return save_checkpoint(folder, progress.step, model, optimizer, extra=extra, keep=KEEP)


def find(path: Path) -> Path:
    """The checkpoint at ``path``, or the last one in a run's folder."""
    for folder in (path, path / FOLDER):
        if found := latest_checkpoint(folder):
            return found
    try:
        read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"--resume: no checkpoint in {path}: {error}") from error
    return path


def read_about(checkpoint: Path) -> tuple[Settings, Progress]:
    """What a checkpoint says of its run."""
    extra = read_checkpoint(checkpoint).extra
    return Settings(**extra["settings"]), Progress(**extra["progress"])


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer, whatever number of ranks wrote the checkpoint."""
    info = load_checkpoint(checkpoint, model, optimizer)
    torch.set_rng_state(info.extra["rng"])
