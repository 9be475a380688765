"""One outcome on every rank: what fails on one of them is the same error on all."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_SHOWN = 3  # problems in one message


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, or does not fit the model. All ranks raise it,
    with the same message."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_coordinator() -> bool:
    """Whether this rank does what is done once."""
    return rank() == 0


def all_gathered(value: Any) -> list[Any]:
    """The objects of all ranks, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered(value: Any) -> list[Any]:
    """The objects of all ranks on the coordinator; [] elsewhere."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size() if is_coordinator() else []
    dist.gather_object(value, values if is_coordinator() else None)
    return values


def from_coordinator(value: T) -> T:
    """The coordinator's object."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def on_all_ranks(work: Callable[[], T]) -> T:
    """What ``work``, which must not communicate, returns here.

    Raises:
        CheckpointError: it raised on some rank.
    """
    result: Any = None
    problem = None
    try:
        result = work()
    except Exception as error:
        problem = describe(error)
    raise_together(problem)
    return result


def on_coordinator(work: Callable[[], T]) -> T:
    """What ``work``, which must not communicate, returns on the coordinator.

    Raises:
        CheckpointError: it raised there.
    """
    return from_coordinator(on_all_ranks(lambda: work() if is_coordinator() else None))  # type: ignore[return-value]


def raise_together(problem: str | None) -> None:
    """Raise a CheckpointError on all ranks if any of them has a ``problem``."""
    problems = {i: found for i, found in enumerate(all_gathered(problem)) if found is not None}
    if problems:
        raise CheckpointError(summary(problems))


def check_same(caller: str, **arguments: Any) -> None:
    """Raise a CheckpointError on all ranks unless they were given equal ``arguments``. Collective.

    Where one rank decides for all, another's argument would be passed over in silence.
    """
    everyone = all_gathered(arguments)
    for name, first in everyone[0].items():
        for number, others in enumerate(everyone):
            if others[name] != first:
                raise CheckpointError(
                    f"{caller}: {name} must be the same on all ranks; got {first} on rank 0 and "
                    f"{others[name]} on rank {number}"
                )


def describe(error: BaseException) -> str:
    """An error in one line; of those that say what is to be done, no more than that."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def summary(problems: Mapping[int, str]) -> str:
    """What each rank says, equal messages once."""
    by_text: dict[str, list[int]] = {}
    for number, text in problems.items():
        by_text.setdefault(text, []).append(number)
    if len(by_text) == 1:
        text, ranks = next(iter(by_text.items()))
        everywhere = len(ranks) == (dist.get_world_size() if dist.is_initialized() else 1)
        return text if everywhere or ranks == [0] else f"rank {ranks[0]}: {text}"
    shown = [f"rank {ranks[0]}: {text}" for text, ranks in list(by_text.items())[:_SHOWN]]
    more = f" (and {len(by_text) - _SHOWN} others)" if len(by_text) > _SHOWN else ""
    return "; ".join(shown) + more


def on_no_rank(wanted: Sequence[str], present: Container[str]) -> list[str]:
    """Those of ``wanted``, the same on all ranks, that are not ``present`` on any. Collective."""
    found = torch.tensor([name in present for name in wanted], dtype=torch.uint8)
    if dist.is_initialized() and wanted:
        found = found.to(collective_device())
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return [name for name, has in zip(wanted, found.tolist(), strict=True) if not has]


def collective_device() -> torch.device:
    """Where tensors of the default group's collectives live: the CPU where it can."""
    if not dist.is_initialized() or "gloo" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
