"""Checkpoints of Hugging Face models whose MoE layers have been replaced."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_parallel.checkpoint.agreement import on_all_ranks, on_coordinator
from moe_parallel.integrations._names import FORMATS, Part, parts
from moe_parallel.integrations._safetensors import Entry, stored_tensors, write_files
from moe_parallel.module_names import plain_name


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def _layers(model: nn.Module) -> dict[str, Any]:
    """The replaced layers by name."""
    from moe_parallel.integrations._layers import TransformersMoE

    return {
        plain_name(name): module
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
    """
    if names not in FORMATS:
        raise ValueError(f"to_hf_state_dict: names must be one of {FORMATS}; got {names!r}")
    state = _state(model)
    if names == "checkpoint":
        for name in _tied(model):
            state.pop(name, None)
    yield from _renamed(state, _layers(model), names)


def _renamed(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Any], names: str
) -> Iterator[tuple[str, Tensor]]:
    """``tensors``, with those that go by our names of the replaced ``layers`` as transformers'."""
    for name, tensor in tensors.items():
        owner = _owner(name, layers)
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        named = [] if owner is None else _named_parts(owner, layers[owner], names)
        ours = [(other, part) for other, part in named if f"{owner}.{part.ours}" == name]
        for published, part in ours:
            yield published, part.of(whole).contiguous()
        if not ours:
            yield name, whole.contiguous()


def _owner(name: str, layers: Mapping[str, Any]) -> str | None:
    """The name of the replaced layer that the tensor called ``name`` belongs to."""
    end = name.find(".mlp.")
    owner = name[: end + len(".mlp")] if end >= 0 else ""
    return owner if owner in layers else None


def _tied(model: nn.Module) -> list[str]:
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
    """
    given = tensors.items() if isinstance(tensors, Mapping) else tensors
    _fill(model, given, strict, "load_hf_state_dict")


def load_hf_checkpoint(model: nn.Module, directory: str | Path, *, strict: bool = True) -> None:
    """Fill a model with replaced layers from the files of a checkpoint of transformers, in place.

    Each rank reads of each tensor what it has a part of, a piece at a time, and on a sharded model
    no more than that. Every rank calls it.

    Args:
        model: a model whose layers :func:`replace_moe_layers` replaced, sharded or not.
        directory: with safetensors files, by either kind of names of :func:`to_hf_state_dict`.
        strict: insist that the model has a place for every tensor, and every weight is there.

    Raises:
        CheckpointError: the files are missing or damaged, or not of this model; on all ranks alike.
            Nothing has been written then, unless a file could not be read in its middle.
    """
    directory = Path(directory)
    stored = on_all_ranks(lambda: stored_tensors(directory))
    name = "load_hf_checkpoint"
    on_all_ranks(lambda: _fill(model, stored.items(), strict, name, write=False))
    on_all_ranks(lambda: _fill(model, stored.items(), strict, name))


@torch.no_grad()
def _fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Any]],
    strict: bool,
    caller: str,
    write: bool = True,
) -> None:
    """Check that ``tensors``, anything of a shape that slices yield tensors of, fit; write them."""
    state = _state(model)
    targets = {name: (name, Part(name, name)) for name in state}
    layers = _layers(model)
    for owner, layer in layers.items():
        for names in FORMATS:
            for published, part in _named_parts(owner, layer, names):
                targets[published] = (f"{owner}.{part.ours}", part)
    written = dict.fromkeys(state, 0)
    for name, value in tensors:
        if name not in targets:
            if strict:
                raise KeyError(f"{caller}: the model has no place for {name}")
            continue
        ours, part = targets[name]
        expected = part.shape(state[ours].shape)
        if list(value.shape) != expected:
            raise ValueError(f"{caller}: {name} must be {expected}; got {list(value.shape)}")
        if write:
            part.write(value, state[ours])
        written[ours] += value.numel()
    tied = _tied(model)
    missing = [
        name for name, count in written.items() if count < state[name].numel() and name not in tied
    ]
    if strict and missing:
        raise ValueError(
            f"{caller}: {len(missing)} weights were not given, or not in full, such as "
            f"{', '.join(missing[:3])}"
        )


def save_hf_checkpoint(
    model: nn.Module, directory: str | Path, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a checkpoint that ``from_pretrained`` of plain transformers reads.

    Every rank calls it, and writes what it holds, a piece at a time: no rank holds a whole tensor
    of a sharded model. Files get their names when all of them are complete; an interrupted save
    leaves ``*.partial`` and what was in the directory.

    Args:
        model: a transformers model whose layers :func:`replace_moe_layers` replaced.
        directory: on a file system that all ranks share; made if it is missing.
        max_shard_bytes: start another file before one exceeds this (a larger tensor has its own).

    Raises:
        CheckpointError: a rank could not write; on all ranks alike.
    """
    directory = Path(directory)
    state, layers = _state(model), _layers(model)
    for name in _tied(model):
        state.pop(name, None)
    entries = []
    for name, tensor in state.items():
        owner = _owner(name, layers)
        named = [] if owner is None else _named_parts(owner, layers[owner], "checkpoint")
        ours = [
            Entry(other, tensor, part) for other, part in named if f"{owner}.{part.ours}" == name
        ]
        entries += ours or [Entry(name, tensor, Part(name, name))]
    write_files(entries, directory, max_shard_bytes)
    on_coordinator(lambda: _save_configs(model, directory))


def redirect_save_pretrained(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model with replaced layers write what transformers reads.

    On the model and on those of its parts that could be saved by themselves, such as the base model
    of one with a head: on the object, for its class belongs to transformers.
    """
    for part in model.modules():
        if callable(getattr(part, "save_pretrained", None)) and _layers(part):
            # A partial of the model, not a method or closure: a deep copy gets its own.
            part.save_pretrained = functools.partial(_save_pretrained, part)  # type: ignore[assignment]


def _save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *args: Any,
    **options: Any,
) -> Any:
    """``save_pretrained`` of transformers, given weights by the names it knows.

    With all its options but ``distributed_checkpoint``, and with a ``state_dict`` by either kind of
    names. On a sharded model every rank calls it; rank 0 writes, and holds the whole model in
    memory: :func:`save_hf_checkpoint` holds pieces of tensors.

    Raises:
        ValueError: ``distributed_checkpoint=True``.
    """
    if options.get("distributed_checkpoint"):
        raise ValueError(
            "save_pretrained: distributed_checkpoint must be False once replace_moe_layers has "
            "replaced layers, for it would write names that transformers does not know. Use "
            "save_hf_checkpoint(model, directory), on every rank."
        )
    save = type(model).save_pretrained
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are saved
        return save(model, save_directory, is_main_process, state_dict, *args, **options)
    source = _state(model) if state_dict is None else state_dict
    is_sharded = any(isinstance(value, DTensor) for value in source.values())
    writes = is_main_process and not (is_sharded and dist.get_rank() > 0)
    tied = _tied(model)
    kept: dict[str, Tensor] = {}
    if writes or is_sharded:
        for name, tensor in _renamed(source, _layers(model), "module"):
            if writes and name not in tied:
                kept[name] = tensor.cpu()
    return save(model, save_directory, writes, kept, *args, **options)


def _save_configs(model: Any, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    # The class may have been renamed by FSDP; transformers knows the one it defines.
    names = [
        cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers")
    ]
    config.architectures = names[:1]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
