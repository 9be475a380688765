"""Tensors to and from files in bounded pieces, in the format of torch.distributed.checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe_parallel.checkpoint.agreement import CheckpointError, describe, summary
from moe_parallel.checkpoint.pieces import (
    StoredTensor,
    boxes,
    common_piece_bytes,
    copy_box,
    piece_bytes,
    slices_of,
)
from moe_parallel.tensors import local_tensor
from moe_parallel.torch_internals import data_offset, local_region, storage_extents, stored_at

METADATA = ".metadata"  # of torch.distributed.checkpoint; it has an id of its own in each save


def write(tensors: Mapping[str, Tensor], folder: Path, most_bytes: int) -> None:
    """Write every rank's part of ``tensors``, and what all have once. Collective.

    Args:
        most_bytes: of a piece; where shards are small, pieces are smaller.

    Raises:
        CheckpointError: a rank could not write.
    """
    size = common_piece_bytes(tensors.values(), most_bytes)
    _run(
        "written",
        lambda: dcp.save(
            dict(tensors),
            storage_writer=_PieceWriter(folder),
            planner=_PiecePlanner(size),
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
            storage_reader=_PieceReader(folder, piece_bytes(tensors.values())),
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


class _PiecePlanner(SavePlanner):
    """Plans to write every tensor in pieces, so that neither writing nor reading holds more."""

    def __init__(self, size: int) -> None:
        self._piece_bytes = size
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
        inside = [begin - first for begin, first in zip(chunk.offsets, start, strict=True)]
        return local[slices_of(inside, chunk.sizes)]


class _PieceWriter(dcp.FileSystemWriter):
    """Writes one file a rank and keeps no more than a piece of it; the base class keeps more."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                piece = planner.resolve_data(item)
                assert isinstance(piece, Tensor)
                piece = piece.resolve_conj().resolve_neg()
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


class _PieceReader(dcp.FileSystemReader):
    """Reads no more than ``size`` bytes of a stored piece at a time, for the mesh that wrote it may
    have had larger shards; the base class reads all of it."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(folder)
        self._folder, self._size = folder, size
        self._stored: dict[str, Any] = {}

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._stored = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        scratch = torch.empty(self._size, dtype=torch.uint8)
        for name, items in by_file.items():
            path = self._folder / name
            with open(path, "rb", buffering=0) as file:
                for item in items:
                    info = self.storage_data[item.storage_index]
                    tensor: TensorStorageMetadata = self._stored[item.storage_index.fqn]
                    chunk = tensor.chunks[item.storage_index.index or 0]
                    begin = data_offset(file, info.offset, info.length)
                    source = StoredTensor(
                        *(file, path, begin, tuple(chunk.sizes), tensor.properties.dtype), scratch
                    )
                    target = planner.resolve_tensor(item).detach()
                    copy_box(source, item.storage_offsets, target, self._size)
        done: Future[None] = Future()
        done.set_result(None)
        return done
