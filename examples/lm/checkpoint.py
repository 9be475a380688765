"""Checkpoints that any number of ranks can continue from, and that are never half there."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from lm.cluster import Cluster
from lm.settings import Settings

FOLDER = "checkpoints"
PROGRESS = "progress.json"
PARTIAL = ".partial"
KEEP = 2
# By the names of parameters, so that pipeline stages have entries of their own.
FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)


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
    cluster: Cluster,
) -> Path:
    """Write ``out/checkpoints/step-N``: all ranks together, complete before it has that name."""
    final = out / FOLDER / f"step-{progress.step:06d}"
    partial = final.with_name(final.name + PARTIAL)
    if cluster.rank == 0:
        for left in partial.parent.glob(f"*{PARTIAL}"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    cluster.barrier()
    state = _state(model, optimizer)
    dcp.save(state, checkpoint_id=partial)
    if cluster.rank == 0:
        about = {"settings": settings.as_json(), "progress": asdict(progress)}
        (partial / PROGRESS).write_text(json.dumps(about))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in _complete(out / FOLDER)[:-KEEP]:
            shutil.rmtree(old)
    cluster.barrier()
    return final


def find(path: Path) -> Path:
    """The checkpoint at ``path``, or the last one in a run's folder."""
    if (path / PROGRESS).exists():
        return path
    for folder in (path, path / FOLDER):
        if found := _complete(folder):
            return found[-1]
    raise ValueError(f"--resume: no checkpoint in {path}")


def read_about(checkpoint: Path) -> tuple[Settings, Progress]:
    """What a checkpoint says of its run."""
    about = json.loads((checkpoint / PROGRESS).read_text())
    progress = Progress(**about["progress"])
    progress.heldout = [(step, value) for step, value in progress.heldout]
    return Settings(**about["settings"]), progress


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer, whatever number of ranks wrote the checkpoint."""
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=FLATTENED,
    )
    torch.set_rng_state(state["rng"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FLATTENED)
    return {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state()}


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, in the order written: an earlier run may have got further."""
    found = [p for p in folder.glob("step-*") if (p / PROGRESS).exists()]
    complete = [p for p in found if re.fullmatch(r"step-\d+", p.name)]
    return sorted(complete, key=lambda p: (p / PROGRESS).stat().st_mtime_ns)
