"""The compiled part of the dispatch."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def extension() -> Any:
    """``moe_kernels._C``, loaded when a dispatcher needs it: what needs none works without it.

    Raises:
        ImportError: moe_kernels was installed without its extension.
    """
    if importlib.util.find_spec("moe_kernels._C") is None:
        raise ImportError(
            "AllToAllDispatcher: the compiled extension of moe_kernels is missing. Build it in "
            "this environment: pip install --no-build-isolation ."
        )
    return importlib.import_module("moe_kernels._C")
