"""The compiled part of the dispatch."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch


def extension() -> Any:
    """``moe_kernels._C``, loaded when a dispatcher needs it: what needs none works without it.

    Raises:
        ImportError: the extension of moe_kernels is missing, or does not load.
    """
    remedy = "Build it in this environment: pip install --no-build-isolation ."
    if importlib.util.find_spec("moe_kernels._C") is None:
        raise ImportError(
            f"AllToAllDispatcher: the compiled extension of moe_kernels is missing. {remedy}"
        )
    try:
        return importlib.import_module("moe_kernels._C")
    except ImportError as error:  # which moe_kernels goes without under MOE_KERNELS_BACKEND
        raise ImportError(
            "AllToAllDispatcher: the compiled extension of moe_kernels does not load with torch "
            f"{torch.__version__} ({error}). {remedy}"
        ) from error
