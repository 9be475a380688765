"""Finding the language model inside a multimodal one."""

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
