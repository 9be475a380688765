"""Names of modules and parameters, free of what wraps them."""

from __future__ import annotations

# What wrappers around a module put into the names below them.
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


def plain_name(name: str) -> str:
    """``name`` without the wrappers of activation checkpointing and torch.compile."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)
