"""Checkpoints of Hugging Face models whose MoE layers have been replaced."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_kernels.ops._checks import check_flag
from moe_parallel.checkpoint.agreement import (
    CheckpointError,
    is_coordinator,
    on_all_ranks,
    on_no_rank,
)
from moe_parallel.checkpoint.pieces import StoredTensor, piece_bytes
from moe_parallel.checkpoint.state import check_names
from moe_parallel.config import check_positive
from moe_parallel.integrations._names import FORMATS, Part, parts
from moe_parallel.integrations._safetensors import Entry, stored_tensors, write_files
from moe_parallel.module_names import plain_name
from moe_parallel.tensors import local_tensor

LOAD_FIRST = "Give them memory and values first."
MAKE_FIRST = (
    "Give them memory first, with model.to_empty(device=...), and then buffers that no checkpoint "
    "has their values, with model.init_weights()."
)
OneOrMore = nn.Module | Iterable[nn.Module]


def check_module(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a module; got {type(model).__name__}")


def _stages(caller: str, model: Any) -> list[nn.Module]:
    """A model, or the stages of one, as a list; a TypeError for anything else."""
    if isinstance(model, nn.Module):
        return [model]
    found = list(model) if isinstance(model, Iterable) else []
    wrong = [part for part in found if not isinstance(part, nn.Module)]
    if wrong or not isinstance(model, Iterable):
        inside = f" with {type(wrong[0]).__name__} in it" if wrong else ""
        raise TypeError(
            f"{caller}: model must be a module, or a list of this rank's stages of one; got "
            f"{type(model).__name__}{inside}"
        )
    return found


def _folder(caller: str, directory: Any) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"{caller}: directory must be the path of a folder; got {type(directory).__name__}"
        )
    return Path(directory)


def state_of(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The tensors of a model, or of stages of one, by their names in the whole."""
    state: dict[str, Tensor] = {}
    for model in models:
        for name, tensor in model.state_dict().items():
            if state.setdefault(plain_name(name), tensor) is not tensor:
                raise CheckpointError(
                    "stages of a model must name their tensors as the whole model does; two of "
                    f"one rank have {plain_name(name)}"
                )
    return state


def check_memory(caller: str, state: Mapping[str, Tensor], remedy: str) -> None:
    """A ValueError if any of ``state`` is on the meta device, where nothing can be read or kept."""
    for name, tensor in state.items():
        if local_tensor(tensor).is_meta:
            raise ValueError(
                f"{caller}: weights must not be on the meta device; {name} is. {remedy}"
            )


def layers_of(models: Sequence[nn.Module]) -> dict[str, Any]:
    """The replaced layers by name."""
    from moe_parallel.integrations._layers import TransformersMoE

    return {
        plain_name(name): module
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, TransformersMoE)
    }


def _named_parts(name: str, layer: Any, names: str) -> Iterator[tuple[str, Part]]:
    """``(name in the checkpoint, part)`` for the layer called ``name`` in the model."""
    block = name
    if names == "checkpoint":
        block = name.removesuffix("mlp") + layer.family.published_block
    for part in parts(layer, names):
        yield f"{block}.{part.name}", part


def to_hf_state_dict(model: nn.Module, names: str = "checkpoint") -> Iterator[tuple[str, Tensor]]:
    """The model's weights under the names, and in the layout, of transformers.

    One tensor at a time: a sharded tensor is gathered when its turn comes, so that no more than one
    of the model's tensors is whole. On a sharded model every rank must go through the whole of it.

    Args:
        model: a model whose layers :func:`replace_moe_layers` replaced, sharded or not.
        names: "checkpoint" for those of published checkpoints, which every version of transformers
            and other engines read; "module" for those of the transformers module's own
            ``state_dict()``.

    Yields:
        ``(name, tensor)``, contiguous, detached, on the model's device. Of tied weights the
        "checkpoint" has one.

    Raises:
        ValueError: other ``names``.
        TypeError: model is not a module.
    """
    check_module("to_hf_state_dict", model)
    if names not in FORMATS:
        raise ValueError(f"to_hf_state_dict: names must be one of {FORMATS}; got {names!r}")
    state = state_of([model])
    if names == "checkpoint":
        for name in tied_names(model):
            state.pop(name, None)
    yield from renamed([model], state, names)


def renamed(
    models: Sequence[nn.Module], tensors: Mapping[str, Tensor], names: str
) -> Iterator[tuple[str, Tensor]]:
    """``tensors``, with those that go by our names of the replaced layers as transformers'."""
    layers = layers_of(models)
    for name, tensor in tensors.items():
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        ours = _parts_of(name, layers, names)
        for published, part in ours:
            yield published, part.of(whole).contiguous()
        if not ours:
            yield name, whole.contiguous()


def _parts_of(name: str, layers: Mapping[str, Any], names: str) -> list[tuple[str, Part]]:
    """What the tensor called ``name`` is in a checkpoint, by name; [] if it is of no layer."""
    owner = _owner(name, layers)
    named = [] if owner is None else _named_parts(owner, layers[owner], names)
    return [(other, part) for other, part in named if f"{owner}.{part.ours}" == name]


def _owner(name: str, layers: Mapping[str, Any]) -> str | None:
    """The name of the replaced layer that the tensor called ``name`` belongs to."""
    end = name.find(".mlp.")
    owner = name[: end + len(".mlp")] if end >= 0 else ""
    return owner if owner in layers else None


def names_of(models: Sequence[nn.Module]) -> set[str]:
    """Every name that checkpoints of transformers have for the tensors of replaced layers."""
    return {
        published
        for owner, layer in layers_of(models).items()
        for names in FORMATS
        for published, _ in _named_parts(owner, layer, names)
    }


def tied_names(model: nn.Module) -> list[str]:
    """Names of parameters that have another name too, but for the first."""
    first = {plain_name(name) for name, _ in model.named_parameters()}
    every = (plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False))
    return [name for name in every if name not in first]


def load_hf_state_dict(
    model: nn.Module,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    strict: bool = True,
) -> None:
    """Copy weights named as in transformers into a model with replaced layers.

    Into a sharded model too: each rank writes what it holds, without communication, so each must
    be given every tensor (or may leave out those of which it has no part, with ``strict=False``).

    Args:
        model: a model whose layers :func:`replace_moe_layers` replaced.
        tensors: by either kind of names of :func:`to_hf_state_dict`, of any dtype and device.
        strict: insist that every name is known and that nothing of the model is left unwritten.

    Raises:
        KeyError: an unknown name, as soon as it comes.
        ValueError: a tensor of another shape, as soon as it comes; with ``strict``, at the end,
            weights that were not given.
        TypeError: arguments of another kind; a value that is not a dense tensor with data, as soon
            as it comes.
    """
    caller = "load_hf_state_dict"
    check_module(caller, model)
    check_flag(caller, "strict", strict)
    targets = Targets([model], caller)
    given: set[str] = set()
    for name, value in _pairs(caller, tensors):
        if name in targets.by_name:
            targets.check(name, value)
            targets.write(name, value)
            given.add(name)
        elif strict:
            raise KeyError(targets.no_place_for([name]))
    if strict:
        targets.check_complete(given)


def _pairs(caller: str, tensors: Any) -> Iterator[tuple[str, Tensor]]:
    """``(name, tensor)``, or a TypeError where something else comes."""
    requirement = (
        f"{caller}: tensors must be a mapping of names to tensors, or (name, tensor) pairs"
    )
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{requirement}; got {type(tensors).__name__}")
    for pair in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(
                f"{requirement}; got {type(tensors).__name__} with {_brief(pair)} in it"
            )
        yield pair[0], pair[1]


def _brief(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def load_hf_checkpoint(model: OneOrMore, directory: str | Path, *, strict: bool = True) -> None:
    """Fill a model with replaced layers from the files of a checkpoint of transformers, in place.

    Each rank reads of each tensor what it has a part of, a piece at a time, and on a sharded model
    no more than that. Every rank calls it.

    Args:
        model: a model whose layers :func:`replace_moe_layers` replaced, sharded or not; or this
            rank's stages of one, with the names of the whole model.
        directory: with safetensors files, by either kind of names of :func:`to_hf_state_dict`.
        strict: insist that the model has a place for every tensor, and every weight is there.

    Raises:
        CheckpointError: the files are missing or damaged, or not of this model, or an argument is
            of another kind; on all ranks alike. Nothing has been written then, unless a file could
            not be read in its middle.
    """
    caller = "load_hf_checkpoint"
    with ExitStack() as files:

        def open_all() -> tuple[dict[str, StoredTensor], Targets]:
            models = _stages(caller, model)
            check_flag(caller, "strict", strict)
            stored = stored_tensors(_folder(caller, directory), files)
            return stored, Targets(models, caller)

        stored, targets = on_all_ranks(open_all)
        given = {name: value for name, value in stored.items() if name in targets.by_name}

        def check() -> None:
            for name, value in given.items():
                targets.check(name, value)
            if strict:
                targets.check_complete(given)

        def fill() -> None:
            for name, value in given.items():
                targets.write(name, value)

        on_all_ranks(check)
        unknown = on_no_rank(list(stored), targets.by_name)
        if strict and unknown:
            raise CheckpointError(targets.no_place_for(unknown))
        on_all_ranks(fill)


class Targets:
    """Where in a model, or in stages of it, the tensors of a checkpoint belong.

    Attributes:
        by_name: the name of a tensor of the model, and which part of it, by every name that a
            checkpoint may have.
    """

    def __init__(self, models: Sequence[nn.Module], caller: str) -> None:
        self._caller = caller
        self._state = state_of(models)
        check_memory(caller, self._state, MAKE_FIRST)
        self._tied = {name for model in models for name in tied_names(model)}
        self._piece_bytes = piece_bytes(self._state.values())
        self._scratch = torch.empty(self._piece_bytes, dtype=torch.uint8)
        self.by_name = {name: (name, Part(name, name)) for name in self._state}
        for owner, layer in layers_of(models).items():
            for names in FORMATS:
                for published, part in _named_parts(owner, layer, names):
                    self.by_name[published] = (f"{owner}.{part.ours}", part)

    def check(self, name: str, value: Tensor | StoredTensor) -> None:
        """Raise unless ``value`` can be copied to where ``name`` belongs in the model."""
        if not isinstance(value, StoredTensor):
            self._check_dense(name, value)
        expected = self._shape(name)
        if list(value.shape) != expected:
            raise ValueError(f"{self._caller}: {name} must be {expected}; got {list(value.shape)}")

    def _shape(self, name: str) -> list[int]:
        ours, part = self.by_name[name]
        return part.shape(self._state[ours].shape)

    def _check_dense(self, name: str, value: Any) -> None:
        found = None
        if not isinstance(value, Tensor):
            found = type(value).__name__
        elif isinstance(value, DTensor):
            found = "a DTensor; give full_tensor()"
        elif value.is_meta or value.is_nested or value.is_quantized or value.is_complex():
            found = f"one of {value.dtype} on {value.device}" + ", nested" * value.is_nested
        elif value.layout != torch.strided:
            found = f"one of layout {value.layout}"
        if found is not None:
            raise TypeError(
                f"{self._caller}: {name} must be a dense tensor of real numbers; got {found}"
            )

    @torch.no_grad()
    def write(self, name: str, value: Tensor | StoredTensor) -> None:
        ours, part = self.by_name[name]
        if isinstance(value, StoredTensor):
            value = replace(value, scratch=self._scratch)
        part.write(value, self._state[ours], self._piece_bytes)

    def missing(self, given: Collection[str]) -> list[str]:
        """The model's tensors that what has the names ``given`` does not fill."""
        written: Counter[str] = Counter()
        for name in given:
            written[self.by_name[name][0]] += math.prod(self._shape(name))
        return [
            name
            for name, tensor in self._state.items()
            if written[name] < tensor.numel() and name not in self._tied
        ]

    def check_complete(self, given: Collection[str]) -> None:
        """A ValueError if what has the names ``given`` does not fill every tensor of the model."""
        missing = self.missing(given)
        if missing:
            raise ValueError(
                f"{self._caller}: {len(missing)} weights were not given, or not in full, such as "
                f"{', '.join(missing[:3])}"
            )

    def no_place_for(self, names: Sequence[str]) -> str:
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        return f"{self._caller}: the model has no place for {names[0]}{more}"


def save_hf_checkpoint(
    model: OneOrMore,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint that ``from_pretrained`` of plain transformers reads.

    Every rank calls it, and writes what it holds, a piece at a time: no rank holds a whole tensor
    of a sharded model. Files get their names when all of them are complete; an interrupted save
    leaves ``*.partial`` and what was in the directory.

    Args:
        model: a transformers model whose layers :func:`replace_moe_layers` replaced; or this rank's
            stages of one, with the names of the whole model, each with its ``config``.
        directory: on a file system that all ranks share; made if it is missing.
        max_shard_bytes: start another file before one exceeds this (a larger tensor has its own).

    Raises:
        CheckpointError: a rank could not write, or ranks have other values under one name, or an
            argument is of another kind; on all ranks alike.
    """
    caller = "save_hf_checkpoint"

    def check() -> tuple[list[nn.Module], dict[str, Tensor], Path]:
        models = _stages(caller, model)
        check_positive(caller, "max_shard_bytes", max_shard_bytes)
        return models, state_of(models), _folder(caller, directory)

    models, state, folder = on_all_ranks(check)
    write_weights(models, state, folder, "checkpoint", max_shard_bytes)


def write_weights(
    models: Sequence[Any],
    state: Mapping[str, Tensor],
    directory: Path,
    names: str,
    max_shard_bytes: int,
    variant: str | None = None,
) -> None:
    """As :func:`save_hf_checkpoint`, of the tensors ``state`` of ``models``. Collective."""

    def check() -> None:
        check_memory("save_hf_checkpoint", state, LOAD_FIRST)
        if is_coordinator():
            _configured(models)

    on_all_ranks(check)
    layers = layers_of(models)
    tied = {name for model in models for name in tied_names(model)}
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    check_names(state)
    entries = []
    for name, tensor in state.items():
        ours = [Entry(other, tensor, part) for other, part in _parts_of(name, layers, names)]
        entries += ours or [Entry(name, tensor, Part(name, name))]
    write_files(entries, directory, max_shard_bytes, variant)
    on_all_ranks(lambda: _save_configs(models, directory) if is_coordinator() else None)


def _configured(models: Sequence[Any]) -> Any:
    """The first of ``models`` with a configuration of transformers."""
    for model in models:
        if hasattr(model, "config"):
            return model
    raise CheckpointError(
        "a model, or a stage of one, must have the config of transformers as its attribute "
        f"config; rank 0 has {[type(model).__name__ for model in models]}"
    )


def _save_configs(models: Sequence[Any], directory: Path) -> None:
    model = _configured(models)
    config = copy.deepcopy(model.config)
    # The class may have been renamed by FSDP; transformers knows the one it defines.
    classes = [
        cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers")
    ]
    config.architectures = classes[:1] or config.architectures
    dtypes = [parameter.dtype for parameter in model.parameters()]
    config.dtype = dtypes[0] if dtypes else config.dtype
    config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
