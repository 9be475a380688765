"""Writing checkpoints."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from moe_parallel.checkpoint import folders
from moe_parallel.checkpoint.agreement import (
    CheckpointError,
    check_same,
    gathered,
    is_coordinator,
    on_all_ranks,
    on_coordinator,
)
from moe_parallel.checkpoint.optimizers import (
    OPTIMIZER,
    OptimizerState,
    check_optimized_alike,
    groups_of,
    merge,
    optimizer_state,
)
from moe_parallel.checkpoint.pieces import PIECE_BYTES
from moe_parallel.checkpoint.state import (
    MODEL,
    ModelState,
    check_names,
    gate_tensors,
    model_state,
)
from moe_parallel.checkpoint.storage import read_sizes, write

TRAINING = "training.pt"
_SHARED = "the folder of checkpoints must be on a file system that all ranks share"
T = TypeVar("T")


def save_checkpoint(
    folder: str | Path,
    step: int,
    model_parts: nn.Module | Iterable[nn.Module],
    optimizers: Optimizer | Iterable[Optimizer] = (),
    schedulers: Any = (),
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Path:
    """Write ``folder/step-N``, from which any number of ranks can go on. Collective.

    Saved are parameters and persistent buffers, the routers' correction biases and the load since
    their last update, the state and options of the optimizers, the schedulers, and ``extra``. Each
    rank writes what it has of a sharded tensor; of copies one rank writes one. Until all have, the
    folder is called ``step-N.partial``: an interrupted save leaves the checkpoints before it.

    Args:
        folder: of all checkpoints of a run, the same on every rank; on a file system that all
            share.
        step: number of steps taken.
        model_parts: the model, or this rank's stages of it, with the names of the whole model.
        optimizers, schedulers: one or several; schedulers have a ``state_dict()``, the same on
            every rank.
        extra: anything else, the same on every rank, that ``torch.load(weights_only=True)`` reads.
        keep: how many checkpoints to keep; the oldest are removed once this one is complete. None
            for all.
        piece_bytes: of the largest piece that is written at a time. Two are in memory beside the
            model, and together less than its largest shard: pieces are at most a quarter of that.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: names or state that cannot be saved, or a failure to write; on all ranks
            alike. The earlier checkpoints are all there.
    """
    model, optim = on_all_ranks(lambda: _collect(step, keep, piece_bytes, model_parts, optimizers))
    folder = on_all_ranks(lambda: Path(folder))
    check_same("save_checkpoint", folder=folder, step=step, keep=keep)
    check_names(model.tensors)
    check_optimized_alike(model.names.values(), optim.options())
    tensors = {MODEL + name: tensor for name, tensor in model.tensors.items()}
    tensors |= gate_tensors(model.gates)
    tensors |= {OPTIMIZER + name: tensor for name, tensor in optim.tensors.items()}
    states = gathered(OptimizerState(scalars=optim.scalars, groups=optim.groups))
    training = on_all_ranks(
        lambda: _pack(states, as_list(schedulers), extra) if is_coordinator() else b""
    )
    with ExitStack() as lock:
        partial = on_coordinator(lambda: _begin(folder, step, lock))
        try:
            on_all_ranks(lambda: _check_shared(partial))
            write(tensors, partial, piece_bytes)
            final = on_coordinator(lambda: _finish(partial, step, training))
        except CheckpointError:  # of all ranks: none is writing any more
            if is_coordinator():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if keep is not None:
            on_coordinator(lambda: folders.prune(folder, keep))
    return final


def as_list(value: Any, kind: type | None = None) -> list[Any]:
    """``value``, one or several, as a list."""
    if value is None:
        return []
    one = hasattr(value, "state_dict") if kind is None else isinstance(value, kind)
    return [value] if one else list(value)


def _collect(
    step: int,
    keep: int | None,
    piece_bytes: int,
    model_parts: Any,
    optimizers: Any,
) -> tuple[ModelState, OptimizerState]:
    for name, value, least in (("step", step, 0), ("piece_bytes", piece_bytes, 16)):
        if not isinstance(value, int) or value < least:
            raise CheckpointError(
                f"save_checkpoint: {name} must be an integer of at least {least}; got {value!r}"
            )
    if keep is not None and (not isinstance(keep, int) or keep < 1):
        raise CheckpointError(f"save_checkpoint: keep must be at least 1, or None; got {keep!r}")
    model = model_state(as_list(model_parts, nn.Module))
    return model, optimizer_state(groups_of(as_list(optimizers, Optimizer), model.names))


def _pack(
    states: list[OptimizerState], schedulers: list[Any], extra: Mapping[str, Any] | None
) -> bytes:
    merged = merge(states)
    packed = io.BytesIO()
    content = {
        "scalars": merged.scalars,
        "groups": merged.groups,
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "extra": dict(extra or {}),
    }
    torch.save(content, packed)
    packed.seek(0)
    try:
        torch.load(packed, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            "extra, and the state of schedulers and optimizer groups, must be numbers, strings, "
            f"tensors and containers of them; torch.load(weights_only=True) says: {error}"
        ) from error
    return packed.getvalue()


def _begin(folder: Path, step: int, lock: ExitStack) -> Path:
    lock.enter_context(folders.writing(folder))
    return folders.begin(folder, step)


def _check_shared(partial: Path) -> None:
    if not partial.is_dir():
        raise CheckpointError(f"{_SHARED}; {partial}, made by rank 0, is not there")


def _finish(partial: Path, step: int, training: bytes) -> Path:
    try:  # a rank may have found a folder of this name on a disk of its own
        read_sizes(partial)
    except CheckpointError as error:
        raise CheckpointError(f"{_SHARED}, with all that they wrote; {error}") from error
    with (partial / TRAINING).open("wb") as file:
        file.write(training)
        file.flush()
        os.fsync(file.fileno())
    return folders.commit(partial, {"step": step})
