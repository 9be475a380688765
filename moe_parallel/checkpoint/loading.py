"""Reading checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from moe_parallel.checkpoint import folders
from moe_parallel.checkpoint.agreement import (
    CheckpointError,
    all_gathered,
    describe,
    on_all_ranks,
    on_no_rank,
)
from moe_parallel.checkpoint.optimizers import (
    OptimizerState,
    by_parameter,
    check_fits,
    check_optimized_alike,
    groups_of,
    restore,
    tensors_to_fill,
)
from moe_parallel.checkpoint.saving import TRAINING, as_list
from moe_parallel.checkpoint.state import (
    MASTER,
    MODEL,
    ModelState,
    empty_gate_tensors,
    model_state,
    set_gates,
)
from moe_parallel.checkpoint.storage import METADATA, read, read_sizes
from moe_parallel.tensors import local_tensor


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says beside tensors.

    Attributes:
        step: number of steps taken.
        extra: as given to :func:`save_checkpoint`.
        schedulers: their ``state_dict()``.
    """

    step: int
    extra: dict[str, Any] = field(default_factory=dict)
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    optimizer: OptimizerState = field(default_factory=OptimizerState, repr=False)


def read_checkpoint(checkpoint: str | Path) -> CheckpointInfo:
    """What a checkpoint says of its run, without its tensors; not collective.

    Raises:
        CheckpointError: ``checkpoint`` is not a complete checkpoint.
    """
    checkpoint = Path(checkpoint)
    folders.check_is_checkpoint(checkpoint)
    about = folders.read_json(checkpoint) or {}
    try:
        training = torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} is damaged: {TRAINING} cannot be read ({describe(error)})"
        ) from error
    optimizer = OptimizerState(scalars=training["scalars"], groups=training["groups"])
    return CheckpointInfo(about["step"], training["extra"], training["schedulers"], optimizer)


def load_checkpoint(
    checkpoint: str | Path,
    model_parts: nn.Module | Iterable[nn.Module],
    optimizers: Optimizer | Iterable[Optimizer] = (),
    schedulers: Any = (),
) -> CheckpointInfo:
    """Fill a model, in place, from a checkpoint that any number of ranks wrote. Collective.

    Each rank reads what it has a part of, a piece at a time. Tensors keep the model's dtypes, and
    those of optimizers theirs.

    Args:
        checkpoint: a folder that :func:`save_checkpoint` returned, the same on every rank;
            :func:`latest_checkpoint` finds the last one.
        model_parts: the model, or this rank's stages of it, sharded as this run wants.
        optimizers: those of the model's parameters, new or used; none to load the model alone. The
            groups may be cut otherwise than when saved, if what is one group now had equal options.
        schedulers: as many as were saved, or none.

    Returns:
        What the checkpoint says beside tensors: step, extra.

    Raises:
        CheckpointError: not a checkpoint, or not of this model and these optimizers: missing or
            unknown names, other shapes; on all ranks alike, and then nothing has been changed. Or a
            failure to read; then what was read stays.
    """
    info = on_all_ranks(lambda: read_checkpoint(checkpoint))
    checkpoint = Path(checkpoint)
    sizes = on_all_ranks(lambda: read_sizes(checkpoint))
    _check_one(checkpoint, info.step)
    optimizers, schedulers = on_all_ranks(
        lambda: (as_list(optimizers, Optimizer), as_list(schedulers))
    )
    saved = by_parameter(sizes)
    model = on_all_ranks(lambda: model_state(as_list(model_parts, nn.Module)))
    groups = on_all_ranks(lambda: groups_of(optimizers, model.names))

    def check() -> None:
        _check_model(model, sizes)
        check_fits(groups, info.optimizer, saved)
        _check_schedulers(schedulers, optimizers, info)

    on_all_ranks(check)
    _check_all_used(model, sizes)
    optimized = {name for group in groups for name in group.names}
    check_optimized_alike(model.names.values(), optimized)
    _check_schedulers_alike(len(schedulers) if optimizers else None)
    # with a pipeline, one of a frozen stage has no optimizer to give
    if any(all_gathered(bool(optimizers))):
        _check_all_optimized(optimized, info)

    gates = empty_gate_tensors(model.gates, sizes)
    tensors = {MODEL + name: tensor for name, tensor in model.tensors.items()} | gates
    dtypes = {name: sizes[MODEL + name][1] for name in model.tensors}
    with torch.no_grad():
        read(tensors | tensors_to_fill(groups, saved, dtypes), checkpoint)
    set_gates(model.gates, gates)
    restore(groups, info.optimizer, saved)
    for scheduler, state in zip(schedulers, info.schedulers, strict=False):
        scheduler.load_state_dict(state)
    return info


def _check_one(checkpoint: Path, step: int) -> None:
    """All ranks have the same checkpoint, by whatever path. Collective.

    A folder that ranks list at different times, or of which one has a copy, may give them others.
    """
    names = (folders.ABOUT, METADATA)
    files = on_all_ranks(lambda: [(checkpoint / name).read_bytes() for name in names])
    digest = hashlib.sha256(b"".join(files)).hexdigest()
    everyone = all_gathered((digest, f"{checkpoint} (step {step})"))
    for number, (other, name) in enumerate(everyone):
        if other != everyone[0][0]:
            raise CheckpointError(
                f"all ranks must load the same checkpoint; rank 0 was given {everyone[0][1]}, rank "
                f"{number} another: {name}. Let one rank choose it, and broadcast its path."
            )


def _check_model(model: ModelState, sizes: Mapping[str, Any]) -> None:
    missing = [name for name in model.tensors if MODEL + name not in sizes]
    if missing:
        raise CheckpointError(
            f"the checkpoint must have all of the model; {_some(missing)} not in it"
        )
    for name, tensor in model.tensors.items():
        size, _ = sizes[MODEL + name]
        if size != tensor.shape:
            raise CheckpointError(
                f"{name} must be {list(tensor.shape)}, as in the model; the checkpoint has "
                f"{list(size)}"
            )
        local = local_tensor(tensor)
        if any(n > 1 and s == 0 for n, s in zip(local.shape, local.stride(), strict=True)):
            raise CheckpointError(
                f"{name} must have memory for each of its elements; it is expanded, with strides "
                f"{list(local.stride())}. Clone it."
            )


def _check_schedulers(
    schedulers: list[Any], optimizers: list[Optimizer], info: CheckpointInfo
) -> None:
    if schedulers and len(schedulers) != len(info.schedulers):
        raise CheckpointError(
            f"there must be as many schedulers as in the checkpoint, {len(info.schedulers)}; got "
            f"{len(schedulers)}"
        )
    for scheduler, state in zip(schedulers, info.schedulers, strict=False):
        rates, now = state.get("base_lrs"), getattr(scheduler, "base_lrs", None)
        if rates is not None and now is not None and len(rates) != len(now):
            raise CheckpointError(
                f"a scheduler must have as many groups as in the checkpoint, {len(rates)}; got "
                f"{len(now)}"
            )


def _check_schedulers_alike(given: int | None) -> None:
    """All ranks with optimizers are given as many schedulers. Collective."""
    counts = {count: rank for rank, count in enumerate(all_gathered(given)) if count is not None}
    if len(counts) > 1:
        (first, one), (second, other), *_ = counts.items()
        raise CheckpointError(
            f"all ranks must be given as many schedulers; rank {one} has {first}, rank {other} "
            f"{second}"
        )


def _check_all_used(model: ModelState, sizes: Mapping[str, Any]) -> None:
    """All tensors of the checkpoint's model are somewhere in the model. Collective."""
    masters = f".{MASTER}"
    saved = sorted(key for key in sizes if key.startswith(MODEL) and not key.endswith(masters))
    unused = on_no_rank([key.removeprefix(MODEL) for key in saved], set(model.tensors))
    if unused:
        raise CheckpointError(
            f"the model must have all of the checkpoint; {_some(unused)} not in it"
        )


def _check_all_optimized(names: set[str], info: CheckpointInfo) -> None:
    """All parameters with options in the checkpoint have an optimizer. Collective."""
    unused = on_no_rank(sorted(info.optimizer.options()), names)
    if unused:
        raise CheckpointError(
            f"the optimizers must have all parameters of the checkpoint's; {_some(unused)} not in "
            "them"
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 2} others" if len(names) > 2 else ""
    return ", ".join(names[:2]) + rest + (" is" if len(names) == 1 else " are")
