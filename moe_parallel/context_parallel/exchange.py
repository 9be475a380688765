"""What context parallel ranks send each other, and on which stream."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.torch_internals import all_gather, reduce_scatter

Works = Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class Transfer:
    """Communication in flight. Its tensors must live until :meth:`wait`."""

    works: Sequence[Any]
    stream: torch.cuda.Stream | None

    def wait(self) -> None:
        """Whoever uses the results afterwards, on the current stream, has them."""
        with _on(self.stream):
            for work in self.works:
                work.wait()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@dataclass(frozen=True)
class Ranks:
    """The ranks that share sequences.

    Attributes:
        stream: where a GPU communicates, while the current stream computes; None for the current
            one. A CPU has none.
    """

    group: dist.ProcessGroup
    stream: torch.cuda.Stream | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return self.group.size()

    def _start(self, begin: Works) -> Transfer:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with _on(self.stream):
            return Transfer(begin(), self.stream)

    def shift(self, send: Tensor, receive: Tensor, tag: int) -> Transfer:
        """To the next rank, and from the one before. Transfers of one tag arrive in order."""
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self._start(
            lambda: dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, send, group=self.group, tag=tag, group_peer=following),
                    dist.P2POp(dist.irecv, receive, group=self.group, tag=tag, group_peer=before),
                ]
            )
        )

    def gather(self, own: Tensor, everything: Tensor) -> Transfer:
        """``own`` of every rank into ``everything [P, ...]``."""
        flat = everything.flatten()
        return self._start(lambda: [all_gather(flat, own.flatten(), self.group)])

    def scatter_sum(self, everything: Tensor, own: Tensor) -> Transfer:
        """The sum over ranks of ``everything [P, ...]``, at each rank's index, into ``own``."""
        flat = everything.flatten()
        return self._start(lambda: [reduce_scatter(own.flatten(), flat, self.group)])

    def swap(self, send: Tensor, receive: Tensor) -> Transfer:
        """``send[p]`` to rank p and ``receive[p]`` from it."""
        return self._start(
            lambda: [
                dist.all_to_all_single(
                    receive.flatten(), send.flatten(), group=self.group, async_op=True
                )
            ]
        )


def pack(*tensors: Tensor) -> Tensor:
    """All of ``tensors`` as one message."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def unpack(message: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors of these shapes in a message of :func:`pack`, as views."""
    parts = message.split([math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def bits(value: float) -> int:
    """A float as an integer that is equal for equal values alone."""
    found: int = struct.unpack("q", struct.pack("d", value))[0]
    return found


def agree(
    ranks: Ranks, what: str, facts: dict[str, int], error: Exception | None, device: torch.device
) -> None:
    """Raise on every rank, or on none: ``error`` of this one, another's, or facts that differ.

    One small collective, and on a GPU a synchronisation.

    Raises:
        RuntimeError: another rank has an error, which says there what it is.
        ValueError: the facts are not those of the first rank.
    """
    own = torch.tensor([int(error is not None), *facts.values()], device=device)
    everyone = own.new_empty(ranks.size, own.numel())
    ranks.gather(own, everyone).wait()
    if error is not None:
        raise error
    found = everyone.tolist()
    if wrong := [rank for rank, (failed, *_) in enumerate(found) if failed]:
        raise RuntimeError(f"{what}: the arguments of rank {wrong[0]} of the group are wrong")
    for index, name in enumerate(facts, start=1):
        values = [row[index] for row in found]
        if len(set(values)) > 1:
            raise ValueError(
                f"{what}: {name} must be equal on all ranks of the context parallel group; "
                f"got {values}"
            )
