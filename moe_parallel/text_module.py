"""What a model says about itself: its parts, its kind, its options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

from torch import nn

_NAMES = ("language_model", "text_model", "text_decoder")


def is_module(module: Any) -> TypeGuard[nn.Module]:
    """Whether ``module`` is PyTorch's own, not something that stands in for one."""
    return issubclass(type(module), nn.Module)


def get_text_module(model: Any) -> Any:
    """The first of ``language_model``, ``text_model`` and ``text_decoder`` that is a module of
    ``model``, else ``model`` itself; one level deep."""
    for name in _NAMES:
        child = getattr(model, name, None)
        if isinstance(child, nn.Module):
            return child
    return model


def inner_model(model: Any) -> Any:
    """``model.model``, if there is one, else ``model``."""
    inner = getattr(model, "model", None)
    return model if inner is None else inner


def mtp_layers(model: Any) -> Any:
    """The container of the blocks of multi-token prediction, or None."""
    return getattr(getattr(model, "mtp", None), "layers", None)


def block_containers(model: Any, backbone: Any) -> Iterator[Any]:
    """``backbone.layers`` and ``model.mtp.layers``, where they exist."""
    for container in (getattr(backbone, "layers", None), mtp_layers(model)):
        if container is not None:
            yield container


def blocks_of(container: Any) -> list[Any]:
    """The blocks in a container that has ``children`` or ``named_children``, or in a list."""
    blocks = _listed(container, "children")
    return blocks if blocks else [block for _, block in _listed(container, "named_children")]


def named_blocks(container: Any) -> list[tuple[str, Any]]:
    """The blocks in a container with their names, or with their numbers where it has no names."""
    named = _listed(container, "named_children")
    return named if named else [(str(i), b) for i, b in enumerate(_listed(container, "children"))]


def _listed(container: Any, method: str) -> list[Any]:
    if method == "children" and isinstance(container, (list, tuple)):
        return list(container)
    found = getattr(container, method, None)
    found = found() if callable(found) else None
    return list(found) if isinstance(found, Iterable) else []


def moe_config_of(model: Any, inner: Any, text_module: Any) -> Any:
    """The ``moe_config`` of the inner model, its text module or the outer model.

    Raises:
        AttributeError: none of them has one.
    """
    for owner in (inner, text_module, model):
        config = getattr(owner, "moe_config", None)
        if config is not None:
            return config
    raise AttributeError(
        f"{type(model).__name__} has no moe_config: neither the model, nor its .model, nor the "
        "text module there. Set it to the MoEConfig of its MoE layers; replace_moe_layers does so "
        "for a model of transformers."
    )


def _is_selective_ac(value: Any) -> bool:
    """Whether an ``activation_checkpointing`` option asks for the selective mode."""
    return isinstance(value, str) and value.lower().replace("-", "_") == "selective"


def _is_deepseek_v4_model(model: Any) -> bool:
    """Whether the model, or its ``.model``, is configured as a DeepSeek-V4."""
    owners = (model, getattr(model, "model", None))
    types = (getattr(getattr(owner, "config", None), "model_type", None) for owner in owners)
    return "deepseek_v4" in types


def _module_weights_are_tied(a: Any, b: Any) -> bool:
    """Whether both modules exist and their ``weight`` is one object."""
    weight = getattr(a, "weight", None)
    return weight is not None and weight is getattr(b, "weight", None)
