"""One error on every rank: what one of them refuses, all do, and go on together."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from moe_parallel.mesh import MeshError, groups_of, is_mesh, pipeline_of, ranks_of_stage
from moe_parallel.text_module import is_module

# what a model, a mesh or a rank is refused with; other errors reach other ranks as a MeshError
_REFUSALS = (MeshError, ValueError, AssertionError, AttributeError, KeyError, ImportError)
# what some ranks may lack; the others work wherever a process group does
_NOT_EVERYWHERE = ("shared_memory", "cuda_ipc", "deepep")

Problem = tuple[type[Exception], str]


def _problem(error: Exception) -> Problem:
    kind = type(error) if type(error) in _REFUSALS else MeshError
    text = error.args[0] if kind is KeyError else error  # whose str is quoted
    return kind, str(text)


@contextmanager
def refused_together(mesh: Any) -> Iterator[None]:
    """What is refused within, on the ranks of one pipeline stage, is refused on those of all.

    Without a pipeline the ranks have equal models, and nothing is communicated.

    Raises:
        Exception: that of the first stage that has one, of its type and with its message, which
            names the stage.
    """
    stages = pipeline_of(mesh)
    if stages is None:
        yield
        return
    with refused_in(stages.get_group(), "in pipeline stage {}"):
        yield


@contextmanager
def refused_in(group: Any, place: str) -> Iterator[None]:
    """What is refused within, on one rank of ``group``, is refused on all of them.

    Args:
        place: what the message says of the rank, for its number.

    Raises:
        Exception: that of the first rank that has one, of its type and with its message.
    """
    problem: Problem | None = None
    cause = None
    try:
        yield
    except Exception as error:
        problem, cause = _problem(error), error
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    for number, found in enumerate(problems):
        if found is not None:
            kind, text = found
            raise kind(f"{text} ({place.format(number)})") from cause


def check_alike(
    mesh: Any, model: Any, moe_layers: Sequence[tuple[str, Any]], options: Mapping[str, Any]
) -> None:
    """The ranks of ``mesh``, which share parameters, must have the same model and options: else
    they wait for each other, or compute with each other's weights what neither was asked for.

    Collective: a reduction of two numbers, or one along each axis of a mesh of other making than
    :func:`build_meshes`.

    Raises:
        MeshError: they do not; on every rank.
    """
    if not is_mesh(mesh):
        return
    own = _description(model, moe_layers, options)
    digest = int.from_bytes(hashlib.sha256(repr(own).encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest]).to(mesh.device_type)
    groups = groups_of(mesh)
    for group in groups:
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    most, fewest = extremes.tolist()
    if most == -fewest:
        return
    problem: str | None = None
    for group in groups:
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (problem, own), group=group)
        problem = next((known for known, _ in found if known is not None), None)
        if problem is None:
            ranks = dist.get_process_group_ranks(group)
            problem = _difference({r: given for r, (_, given) in zip(ranks, found, strict=True)})
    raise MeshError(
        "parallelize_model: the ranks that share parameters must be given the same model and "
        f"options; {problem}"
    )


def _description(
    model: Any, moe_layers: Sequence[tuple[str, Any]], options: Mapping[str, Any]
) -> dict[str, str]:
    """What must be alike, by its name. Not the values of parameters, nor where they are."""
    found = {name: _shown(value) for name, value in options.items()}
    for name, parameter in model.named_parameters() if is_module(model) else ():
        kind = "trained" if parameter.requires_grad else "frozen"
        found[name] = f"{parameter.dtype} {list(parameter.shape)}, {kind}"
    for name, moe in moe_layers:
        for part in ("config", "backend"):
            settings = getattr(getattr(moe, "experts", None), part, None)
            if dataclasses.is_dataclass(settings):
                own = {f"block {name}'s {key}": _shown(v) for key, v in vars(settings).items()}
                own.pop(f"block {name}'s dispatcher_timeout", None)  # each waits as it likes
                found |= own
    return found


def _shown(value: Any) -> str:
    """A value in words that are the same on every rank."""
    if dataclasses.is_dataclass(value):
        return ", ".join(f"{key}={_shown(field)}" for key, field in vars(value).items())
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
    return repr(value) if plain else type(value).__name__


def _difference(by_rank: Mapping[int, dict[str, str]]) -> str | None:
    """The first in which a rank differs from the first one."""
    (first, own), *others = by_rank.items()
    for rank, given in others:
        for name in {**own, **given}:
            a, b = own.get(name, "missing"), given.get(name, "missing")
            if a != b:
                return f"{name} is {a} on rank {first}, and {b} on rank {rank}"
        if list(own) != list(given):
            return f"the parameters of ranks {first} and {rank} are not in the same order"
    return None


def check_transports(moe_layers: Sequence[tuple[str, Any]], ep_mesh: Any, moe_mesh: Any) -> None:
    """Have every layer's dispatcher made once, before its experts are sharded for it.

    Of the layers, given with the names of their blocks, those with the same settings are tried
    together. Where a transport is asked for that a rank may lack, all ranks of the stage
    communicate: that of one group of ``ep_mesh`` may fail, and those of others not.

    Raises:
        Exception: that of the first rank that has one, of its type and with its message, which
            names the rank.
    """
    if not is_mesh(ep_mesh):
        return
    makers: dict[Any, Any] = {}
    for _, moe in moe_layers:
        settings = getattr(moe.experts, "dispatcher_settings", None)
        if isinstance(settings, dict):
            makers.setdefault(tuple(settings.items()), moe.experts.build_token_dispatcher)
    problem: tuple[int, Problem] | None = None
    cause = None
    for settings, build in makers.items():
        try:
            build(ep_mesh)
        except Exception as error:
            if not any(value in _NOT_EVERYWHERE for _, value in settings):
                raise
            problem, cause = (dist.get_rank(), _problem(error)), error
            break
    if not any(value in _NOT_EVERYWHERE for settings in makers for _, value in settings):
        return
    for group in groups_of(ranks_of_stage(ep_mesh, moe_mesh)):
        problems: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
        problem = next((found for found in problems if found is not None), None)
    if problem is not None:
        rank, (kind, text) = problem
        raise kind(f"{text} (on rank {rank})") from cause
