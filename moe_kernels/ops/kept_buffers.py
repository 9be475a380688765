"""Large CPU buffers that are kept between calls."""

from __future__ import annotations

import importlib


def free_kept_buffers() -> int:
    """Give the large CPU buffers that no tensor uses any more back to the system.

    Gradients and activations of 16 MiB and more are kept when they are freed, for the next step: to
    fetch such memory from the system anew takes as long as computing what goes there. Kept and used
    buffers together never exceed 1.5 times what was in use at once, and one that no call has asked
    for in a minute goes when the next one of that size is asked for or freed. Calls with few tokens
    need none, so nothing goes in a server that only decodes. Call this when training is over and
    the process goes on, or after a long prompt.
    ``MOE_KERNELS_KEEP_BUFFERS=0`` in the environment keeps none.

    Returns:
        How many bytes they had.
    """
    return int(importlib.import_module("moe_kernels._C").free_kept_buffers())
