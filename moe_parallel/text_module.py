"""What a model says about itself: its language model, its kind, its options."""

from __future__ import annotations

from typing import Any

from torch import nn

_NAMES = ("language_model", "text_model", "text_decoder")


def get_text_module(model: Any) -> Any:
    """The first of ``language_model``, ``text_model`` and ``text_decoder`` that is a module of
    ``model``, else ``model`` itself; one level deep."""
    for name in _NAMES:
        child = getattr(model, name, None)
        if isinstance(child, nn.Module):
            return child
    return model


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
    if a is None or b is None:
        return False
    weight = getattr(a, "weight", None)
    return weight is not None and weight is getattr(b, "weight", None)
