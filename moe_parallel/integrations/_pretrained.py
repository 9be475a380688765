"""Hugging Face models with replaced MoE layers: their own methods that save and load."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys

from moe_parallel.checkpoint.agreement import all_gathered, from_coordinator, is_coordinator
from moe_parallel.integrations._checkpoint import (
    LOAD_FIRST,
    Targets,
    check_memory,
    layers_of,
    names_of,
    renamed,
    state_of,
    tied_names,
    write_weights,
)


def redirect_checkpoints(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model with replaced layers write what transformers reads, and
    ``load_state_dict`` take it, too: a ``Trainer`` resumes by these two.

    On the model and on those of its parts that could be saved by themselves, such as the base model
    of one with a head: on the object, for its class belongs to transformers. A PeftModel around it
    saves its adapters by itself.
    """
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and layers_of([part]):
            # A partial of the model, not a method or closure: a deep copy gets its own.
            part.save_pretrained = functools.partial(_save_pretrained, part)
            part.load_state_dict = functools.partial(_load_state_dict, part)


def _load_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
) -> Any:
    """``load_state_dict`` of torch, which also knows what checkpoints call the replaced layers.

    Raises:
        ValueError: tensors by such names with ``assign``, or of other shapes.
        RuntimeError: with ``strict``, tensors that the model has no place for, or lacks.
    """
    others = set(state_dict) - set(model.state_dict()) if isinstance(state_dict, Mapping) else set()
    if not others or others.isdisjoint(names_of([model])):
        return type(model).load_state_dict(model, state_dict, strict, assign)
    if assign:
        raise ValueError(
            "load_state_dict: assign must be False for weights by the names that transformers has "
            "for the replaced layers, which hold them in another layout"
        )
    targets = Targets([model], "load_state_dict")
    given = [name for name in state_dict if name in targets.by_name]
    for name in given:
        targets.check(name, state_dict[name])
    missing = targets.missing(given)
    unexpected = [name for name in state_dict if name not in targets.by_name]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"load_state_dict of {type(model).__name__}: missing {missing}, unexpected {unexpected}"
        )
    for name in given:
        targets.write(name, state_dict[name])
    return _IncompatibleKeys(missing, unexpected)


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
    names. On a sharded model every rank calls it, and all write together, each what it holds, to
    the directory that rank 0 was given.

    Raises:
        ValueError: ``distributed_checkpoint=True``.
        TypeError: a ``state_dict`` that is no mapping.
        CheckpointError: of a sharded model, what :func:`save_hf_checkpoint` raises.
    """
    if options.get("distributed_checkpoint"):
        raise ValueError(
            "save_pretrained: distributed_checkpoint must be False once replace_moe_layers has "
            "replaced layers, for it would write names that transformers does not know. Without it "
            "the ranks of a sharded model write together too."
        )
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise TypeError(
            "save_pretrained: state_dict must be a mapping of names to tensors; got "
            f"{type(state_dict).__name__}"
        )
    save = type(model).save_pretrained
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are saved
        return save(model, save_directory, is_main_process, state_dict, *args, **options)
    source = state_of([model]) if state_dict is None else dict(state_dict)
    if any(isinstance(value, DTensor) for value in source.values()):
        if any(all_gathered(is_main_process)):
            directory = Path(from_coordinator(str(save_directory)))
            _save_sharded(model, directory, source, *args, **options)
        return None
    kept: dict[str, Tensor] = {}
    if is_main_process:
        tied = tied_names(model)
        check_memory("save_pretrained", source, LOAD_FIRST)
        named = renamed([model], source, "module")
        kept = {name: tensor.cpu() for name, tensor in named if name not in tied}
    return save(model, save_directory, is_main_process, kept, *args, **options)


def _save_sharded(
    model: Any,
    directory: Path,
    state: Mapping[str, Tensor],
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    **hub: Any,
) -> None:
    """With the options of transformers, of which those about adapters do not matter here."""
    from transformers.utils.hub import convert_file_size_to_int

    names = "checkpoint" if save_original_format else "module"
    size = convert_file_size_to_int(max_shard_size)
    write_weights([model], state, directory, names, size, variant)
    if push_to_hub and is_coordinator():
        _push(directory, token, **hub)


def _push(
    directory: Path,
    token: str | bool | None,
    repo_id: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    **repository: Any,
) -> None:
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    created = api.create_repo(repo_id or directory.name, exist_ok=True, **repository)
    api.upload_folder(
        repo_id=created.repo_id,
        folder_path=directory,
        commit_message=commit_message,
        create_pr=create_pr,
    )
