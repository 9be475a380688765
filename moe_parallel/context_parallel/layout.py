"""Which part of a sequence a rank holds, and which parts of it see each other.

P ranks, a sequence of L tokens, L / P of them on each rank. In the balanced order the sequence is
cut into 2 P chunks, and rank r holds chunk r, then chunk 2 P - 1 - r: under a causal mask an early
chunk sees little and a late one much, so that every rank has the same work. Without it rank r holds
the r-th of P consecutive parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

EVERYTHING = slice(None)


def chunk_order(ranks: int, balanced: bool) -> list[int]:
    """The chunks of the sequence in the order of the ranks: what rank 0 holds, then rank 1, ..."""
    if not balanced:
        return list(range(ranks))
    return [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]


def chunks_of(rank: int, ranks: int, balanced: bool) -> list[int]:
    """The chunks that a rank holds, in its order."""
    held = 2 if balanced else 1
    return chunk_order(ranks, balanced)[held * rank : held * (rank + 1)]


def positions_of(rank: int, ranks: int, length: int, balanced: bool) -> Tensor:
    """[length] where in the sequence the ``length`` tokens of a rank are."""
    chunks = torch.tensor(chunks_of(rank, ranks, balanced))
    size = length // len(chunks)
    return (chunks[:, None] * size + torch.arange(size)).flatten()


class Visible(NamedTuple):
    """A rank's queries, and keys of one rank that they see: all of them, or those not later."""

    queries: slice
    keys: slice
    causal: bool


def visible(
    rank: int, source: int, ranks: int, length: int, causal: bool, balanced: bool
) -> Visible | None:
    """What the ``length`` queries of ``rank`` see of the keys of ``source``; None for nothing."""
    if not causal:
        return Visible(EVERYTHING, EVERYTHING, False)
    if source == rank:
        return Visible(EVERYTHING, EVERYTHING, True)
    if not balanced:
        return Visible(EVERYTHING, EVERYTHING, False) if source < rank else None
    half = length // 2
    if source < rank:  # both chunks are later than the source's first and earlier than its second
        return Visible(EVERYTHING, slice(0, half), False)
    return Visible(slice(half, length), EVERYTHING, False)  # and here both keys are in between


class Piece(NamedTuple):
    """A part of the work of a rank that knows all keys.

    Attributes:
        queries: of this rank.
        keys: ``(rank, keys of that rank)``, one after the other.
        causal: query i sees key j for j <= i.
        mask: [queries, keys] bool, True where a query sees a key; None if all do.
    """

    queries: slice
    keys: list[tuple[int, slice]]
    causal: bool
    mask: Tensor | None


def pieces(
    rank: int, ranks: int, length: int, causal: bool, balanced: bool, window: int | None
) -> list[Piece]:
    """The work of a rank; the first piece needs its own keys alone unless there is a window."""
    if window is not None:
        return _window_pieces(rank, ranks, length, balanced, window)
    found = []
    for sources in ([rank], range(rank), range(rank + 1, ranks)):
        seen = [(s, visible(rank, s, ranks, length, causal, balanced)) for s in sources]
        keys = [(source, block.keys) for source, block in seen if block is not None]
        if keys:
            block = next(block for _, block in seen if block is not None)
            found.append(Piece(block.queries, keys, block.causal, None))
    return found


def _window_pieces(rank: int, ranks: int, length: int, balanced: bool, window: int) -> list[Piece]:
    """A piece for each of the rank's chunks, with the chunks before it that its window reaches."""
    held = chunks_of(rank, ranks, balanced)
    size = length // len(held)
    order = chunk_order(ranks, balanced)
    found = []
    for place, chunk in enumerate(held):
        start = chunk * size
        first = max(0, start - window + 1) // size
        keys = []
        for seen in range(first, chunk + 1):
            source, part = divmod(order.index(seen), len(held))
            keys.append((source, slice(part * size, (part + 1) * size)))
        distance = torch.arange(start, start + size)[:, None] - torch.arange(
            first * size, start + size
        )
        queries = slice(place * size, (place + 1) * size)
        found.append(Piece(queries, keys, False, (distance >= 0) & (distance < window)))
    return found


def to_sequence_order(parts: Iterable[Tensor], dim: int, balanced: bool) -> Tensor:
    """The parts of all ranks, in the order of the ranks, as the sequence along ``dim``."""
    parts = list(parts)
    if balanced:
        heads, tails = zip(*(part.chunk(2, dim) for part in parts), strict=True)
        parts = [*heads, *reversed(tails)]
    return torch.cat(parts, dim)


def part_of_sequence(sequence: Tensor, rank: int, ranks: int, dim: int, balanced: bool) -> Tensor:
    """What ``rank`` holds of a sequence along ``dim``, in memory of its own."""
    held = chunks_of(rank, ranks, balanced)
    chunks = sequence.chunk(len(held) * ranks, dim)
    return torch.cat([chunks[chunk] for chunk in held], dim)
