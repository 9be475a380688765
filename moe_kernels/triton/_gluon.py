"""Copies of Gluon under one name each: Triton 3.9 calls them otherwise than releases before it."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma


def _named(module: object, *names: str) -> Any:
    """The first of the names that the module has."""
    return next(found for name in names if (found := getattr(module, name, None)) is not None)


tma_load = _named(tma, "async_load", "async_copy_global_to_shared")
tma_store = _named(tma, "async_store", "async_copy_shared_to_global")
copy_async = _named(async_copy, "async_load", "async_copy_global_to_shared")
