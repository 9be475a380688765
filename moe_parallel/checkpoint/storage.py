"""Tensors to and from files in bounded pieces, in the format of torch.distributed.checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe_parallel.checkpoint.agreement import CheckpointError, describe, summary
from moe_parallel.tensors import local_tensor
from moe_parallel.torch_internals import local_region, storage_extents, stored_at

PIECE_BYTES = 2**25
Box = tuple[tuple[int, ...], tuple[int, ...]]  # start and shape


def write(tensors: Mapping[str, Tensor], folder: Path, piece_bytes: int) -> None:
    """Write every rank's part of ``tensors``, and what all have once. Collective.

    Raises:
        CheckpointError: a rank could not write.
    """
    _run(
        "written",
        lambda: dcp.save(
            dict(tensors),
            storage_writer=_PieceWriter(folder),
            planner=_PiecePlanner(piece_bytes),
            no_dist=not dist.is_initialized(),
        ),
    )


def read(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill every rank's part of ``tensors`` in place, wherever it was written. Collective.

    Raises:
        CheckpointError: a rank could not read. What others have read stays.
    """
    _run(
        "read",
        lambda: dcp.load(
            dict(tensors),
            storage_reader=dcp.FileSystemReader(folder),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not dist.is_initialized(),
        ),
    )


def read_sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and dtype of every tensor of a checkpoint.

    Raises:
        CheckpointError: it has no readable metadata, or its files are missing or too short.
    """
    try:
        metadata: Metadata = dcp.FileSystemReader(folder).read_metadata()
        extents = storage_extents(metadata)
    except Exception as error:
        raise CheckpointError(
            f"{folder} is damaged: its .metadata cannot be read ({describe(error)})"
        ) from error
    for name, size in extents.items():
        path = folder / name
        actual = path.stat().st_size if path.exists() else None
        if actual is None or actual < size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise CheckpointError(
                f"{folder} is damaged: {name} must have {size} bytes; it {found}. Load another "
                "checkpoint, or copy this one again."
            )
    return {
        key: (value.size, value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


def _run(done: str, work: Any) -> None:
    try:
        work()
    except CheckpointException as error:  # of all ranks alike; not an Exception
        found = {rank: describe(cause) for rank, (cause, _) in error.failures.items()}
        raise CheckpointError(f"the checkpoint could not be {done}: {summary(found)}") from error


def boxes(start: tuple[int, ...], shape: tuple[int, ...], elements: int) -> Iterator[Box]:
    """Cut a box into boxes of at most ``elements``, along its first dimensions."""
    for dim, size in enumerate(shape):
        inner = 1
        for other in shape[dim + 1 :]:
            inner *= other
        if size <= 1 and dim + 1 < len(shape):
            continue
        length = max(1, elements // max(inner, 1))
        if length >= size:
            break
        for first in range(0, size, length):
            count = min(length, size - first)
            part_start = (*start[:dim], start[dim] + first, *start[dim + 1 :])
            part = (*shape[:dim], count, *shape[dim + 1 :])
            yield from boxes(part_start, part, elements)
        return
    yield start, shape


class _PiecePlanner(SavePlanner):
    """Plans to write every tensor in pieces, so that neither writing nor reading holds more."""

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._default = dcp.DefaultSavePlanner(
            flatten_state_dict=False, flatten_sharded_tensors=False
        )
        self._tensors: dict[str, Tensor] = {}

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._default.set_up_planner(state_dict, storage_meta, is_coordinator)
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, tensor in self._tensors.items():
            start, shape = local_region(tensor)
            if 0 in shape and tensor.numel() > 0:
                continue  # uneven shards may be empty
            properties = TensorProperties(dtype=tensor.dtype)
            for part_start, part in boxes(start, shape, self._piece_bytes // tensor.itemsize):
                offsets = torch.Size(part_start)
                chunk = ChunkStorageMetadata(offsets, torch.Size(part))
                items.append(
                    WriteItem(
                        index=MetadataIndex(key, offsets),
                        type=WriteItemType.SHARD,
                        tensor_data=TensorWriteData(chunk, properties, tensor.size()),
                    )
                )
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return self._default.create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor = self._tensors[write_item.index.fqn]
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        start, _ = local_region(tensor)
        local = local_tensor(tensor).detach()
        slices = [
            slice(begin - first, begin - first + size)
            for begin, first, size in zip(chunk.offsets, start, chunk.sizes, strict=True)
        ]
        return local[tuple(slices)]


class _PieceWriter(dcp.FileSystemWriter):
    """Writes one file a rank and keeps no more than a piece of it; the base class keeps more."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                piece = planner.resolve_data(item)
                assert isinstance(piece, Tensor)
                # torch.save writes the whole storage: that of a view is larger
                whole = piece.untyped_storage().nbytes() == piece.nbytes and piece.is_contiguous()
                piece = (
                    piece.cpu()
                    if whole
                    else piece.to("cpu").clone(memory_format=torch.contiguous_format)
                )
                offset = file.tell()
                torch.save(piece, file)
                length = file.tell() - offset
                results.append(WriteResult(item.index, length, stored_at(name, offset, length)))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
