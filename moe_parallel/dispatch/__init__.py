"""Token dispatch: on one device, and by all-to-all between the ranks of Expert Parallelism."""

from moe_parallel.dispatch.protocol import (
    TRANSPORTS,
    Dispatched,
    LocalDispatcher,
    TokenDispatcher,
)

__all__ = ["TRANSPORTS", "Dispatched", "LocalDispatcher", "TokenDispatcher"]
