"""Token dispatch: on one device, and by all-to-all between the ranks of Expert Parallelism."""

from moe_parallel.dispatch.all_to_all import AllToAllDispatcher, Handle
from moe_parallel.dispatch.building import build_dispatcher
from moe_parallel.dispatch.deepep import DeepEPDispatcher, DeepEPHandle
from moe_parallel.dispatch.protocol import (
    TRANSPORTS,
    Dispatched,
    LocalDispatcher,
    Pending,
    TokenDispatcher,
)

__all__ = [
    "TRANSPORTS",
    "AllToAllDispatcher",
    "DeepEPDispatcher",
    "DeepEPHandle",
    "Dispatched",
    "Handle",
    "LocalDispatcher",
    "Pending",
    "TokenDispatcher",
    "build_dispatcher",
]
