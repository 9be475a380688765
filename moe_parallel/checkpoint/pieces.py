"""Tensors in bounded pieces, so that files and memory exchange no more than that at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from moe_parallel.checkpoint.agreement import CheckpointError, all_gathered
from moe_parallel.tensors import local_tensor

PIECE_BYTES = 2**23  # at most
_LEAST = 16  # bytes of the widest element
# Of the largest shard that one piece may be. Up to four are in memory together: what others sent,
# the rows made of it, a contiguous copy, and one on the CPU.
_SHARE = 4
Box = tuple[tuple[int, ...], tuple[int, ...]]  # start and shape


class Sliced(Protocol):
    """Anything of a shape that slices yield tensors of."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, slices: Any) -> Tensor: ...


def piece_bytes(tensors: Iterable[Tensor], most: int = PIECE_BYTES) -> int:
    """The size of pieces that is small beside the largest of this rank's shards of ``tensors``."""
    largest = max((local_tensor(tensor).nbytes for tensor in tensors), default=0)
    return max(_LEAST, min(most, largest // _SHARE)) if largest else most


def common_piece_bytes(tensors: Iterable[Tensor], most: int = PIECE_BYTES) -> int:
    """The least :func:`piece_bytes` of all ranks, which have to cut copies alike. Collective."""
    return min(all_gathered(piece_bytes(tensors, most)))


def boxes(
    start: Sequence[int], shape: Sequence[int], elements: int, within: Sequence[int] | None = None
) -> Iterator[Box]:
    """Cut a box into boxes of at most ``elements``, along its first dimensions.

    Args:
        within: the shape of the contiguous tensor that the box is a part of; then no box reaches
            over more than ``elements`` from its first to its last.
    """
    start, shape = tuple(start), tuple(shape)
    for dim, size in enumerate(shape):
        inner = math.prod((shape if within is None else within)[dim + 1 :])
        if size <= 1 and dim + 1 < len(shape):
            continue
        length = max(1, elements // max(inner, 1))
        if length >= size:
            break
        for first in range(0, size, length):
            count = min(length, size - first)
            part_start = (*start[:dim], start[dim] + first, *start[dim + 1 :])
            part = (*shape[:dim], count, *shape[dim + 1 :])
            yield from boxes(part_start, part, elements, within)
        return
    yield start, shape


def slices_of(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))


def copy_box(source: Sliced, start: Sequence[int], target: Tensor, most_bytes: int) -> None:
    """Copy the box of ``source`` that begins at ``start`` and is shaped as ``target``, in pieces of
    ``most_bytes`` of ``source``."""
    if target.numel() == 0:
        return
    itemsize = getattr(source, "dtype", target.dtype).itemsize
    for first, shape in boxes(start, target.shape, most_bytes // itemsize, source.shape):
        inside = [a - b for a, b in zip(first, start, strict=True)]
        target[slices_of(inside, shape)].copy_(source[slices_of(first, shape)])


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file, of which slices are read when they are asked for.

    Attributes:
        file: open, without a buffer.
        begin: position of the first byte.
        scratch: memory to read into, if what a slice reads fits; the next slice overwrites it.
            Allocated anew each time, pieces can leave holes in the heap that the next does not fit.
    """

    file: BinaryIO
    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scratch: Tensor | None = None

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        """What ``slices``, with a start and a stop in every dimension, cut out: not empty. Reads
        all of the file between its first and its last element."""
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        first = sum(cut.start * stride for cut, stride in zip(slices, strides, strict=True))
        shape = [cut.stop - cut.start for cut in slices]
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        itemsize = self.dtype.itemsize
        size = count * itemsize
        if self.scratch is not None and size <= self.scratch.numel():
            values = self.scratch[:size]
        else:
            values = torch.empty(size, dtype=torch.uint8)
        self.file.seek(self.begin + first * itemsize)
        left = values.numpy().data
        while left:
            got = self.file.readinto(left)  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(f"{self.path} is damaged: it ends before its tensors do")
            left = left[got:]
        return values.view(self.dtype).as_strided(shape, strides)
