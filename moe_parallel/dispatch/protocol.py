"""How tokens get to the experts and back: the protocol, and the dispatcher of one device.

T tokens, H hidden size, K experts a token, E experts, U tokens received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

T_co = TypeVar("T_co", covariant=True)

ALL_TO_ALL_TRANSPORTS = ("process_group", "shared_memory", "cuda_ipc")  # of AllToAllDispatcher
TRANSPORTS = (*ALL_TO_ALL_TRANSPORTS, "deepep")


@dataclass(frozen=True)
class Dispatched:
    """What a rank's experts have to do.

    Attributes:
        x: [U, H], the tokens that have an expert here, each once.
        topk_ids: [U, K], ids in [0, E / ranks) of this rank's experts; -1 where the slot's expert
            is elsewhere.
        topk_weights: [U, K], routing weights of those slots.
        handle: to be given to ``combine``; a plain value, so any number may be in flight.
        num_rows: an upper bound, known on the host, of the ids that are not -1; None if unknown.
        extra: [U, ...], what travelled with each token, if anything did.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    handle: Any
    num_rows: int | None
    extra: Tensor | None = None


@dataclass(frozen=True)
class Pending(Generic[T_co]):
    """An exchange that has begun.

    Attributes:
        finish: ends it.
    """

    finish: Callable[[], T_co]

    def wait(self) -> T_co:
        """What the exchange brings; once."""
        return self.finish()


class TokenDispatcher(Protocol):
    """Takes tokens to the ranks of their experts and brings the results back, differentiably."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        """Send each of the tokens ``x [T, H]`` to the owners of the experts ``topk_ids [T, K]``.

        An id of -1 or E has no owner. Differentiable in ``x`` and ``topk_weights [T, K]``.
        """
        ...

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """``[T, H]``: for each token the sum of its rows in the ranks' ``y [U, H]``."""
        ...


class OverlappingDispatcher(TokenDispatcher, Protocol):
    """One whose exchanges begin and end apart, so that something else is computed in between."""

    def dispatch_async(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Pending[Dispatched]:
        """Begin ``dispatch``; the ranks begin and wait in the same order."""
        ...

    def combine_async(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        """Begin ``combine``."""
        ...


class LocalDispatcher:
    """Every expert is here: tokens stay where they are."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        return Dispatched(x, topk_ids, topk_weights, handle=None, num_rows=None)

    def combine(self, y: Tensor, handle: None) -> Tensor:
        return y
