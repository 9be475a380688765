"""Replaying a router's choices: of an earlier pass, or of an inference engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def is_recomputing() -> bool:
    """Whether this forward is the one that activation checkpointing repeats inside backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RoutingReplay:
    """Records the experts a gate chooses, or makes it choose given ones.

    Only the discrete choice is replayed: the gate weighs the given experts with its own scores, so
    gradients stay live. A forward repeated by activation checkpointing is not recorded again, and
    in a replay takes the choices in the order of the forwards; run backward inside the ``with``.

    Example::

        with gate.routing_replay.record() as choices:
            model(batch)
        with gate.routing_replay.replay(choices):
            model(batch).sum().backward()
    """

    def __init__(self) -> None:
        self._record: list[Tensor] | None = None
        self._forward: Iterator[Tensor] | None = None
        self._recompute: Iterator[Tensor] | None = None

    @contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """Collect one ``[T, K]`` int64 tensor of chosen experts a forward."""
        self._record = []
        try:
            yield self._record
        finally:
            self._record = None

    @contextmanager
    def replay(self, choices: Sequence[Tensor]) -> Iterator[None]:
        """Use ``choices``, ``[T, K]`` ids in [0, E), one a forward, in order."""
        self._forward, self._recompute = iter(choices), iter(choices)
        try:
            yield
        finally:
            self._forward = self._recompute = None

    def given_ids(self) -> Tensor | None:
        """The choice to use in this forward, or None for the gate's own."""
        choices = self._recompute if is_recomputing() else self._forward
        if choices is None:
            return None
        ids = next(choices, None)
        if ids is None:
            raise RuntimeError(
                "RoutingReplay: the gate ran more often than choices were given; "
                "replay() needs one [T, K] tensor for each forward."
            )
        return ids

    def note(self, ids: Tensor) -> None:
        """Keep ``ids [T, K]``, the choice of this forward, while recording."""
        if self._record is not None and not is_recomputing():
            self._record.append(ids)
