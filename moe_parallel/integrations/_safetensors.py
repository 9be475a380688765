"""Safetensors files that all ranks write together, and read their own parts of.

The sizes of all tensors are known beforehand, and so is the place of every byte: each rank writes
what it holds to its place. Where a rank's part is not in one stretch of the file, the ranks that
have the rest send it a slab of whole rows at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_parallel.checkpoint.agreement import (
    CheckpointError,
    describe,
    on_coordinator,
    raise_together,
    rank,
)
from moe_parallel.checkpoint.storage import boxes
from moe_parallel.integrations._names import PIECE_BYTES, Part

PARTIAL = ".partial"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint: its name there, and what part of which of the model's it is."""

    name: str
    tensor: Tensor
    part: Part

    @property
    def shape(self) -> list[int]:
        return self.part.shape(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.tensor.itemsize


def write_files(entries: Sequence[Entry], directory: Path, max_bytes: int) -> None:
    """Write all ``entries``, in files of at most ``max_bytes`` (a larger one has its own).

    Collective: with the same entries, in the same order, on every rank. The files have other names
    until all are complete.

    Raises:
        CheckpointError: a rank could not write; what was in the directory before is still there.
    """
    files = _split(entries, max_bytes)
    places = on_coordinator(lambda: _create(files, directory))
    writer = _Writer()
    for (name, members), place in zip(files.items(), places, strict=True):
        writer.open(directory / (name + PARTIAL))
        for entry in members:
            _write_entry(entry, place[entry.name], writer)
        writer.close()
    raise_together(writer.problem)
    on_coordinator(lambda: _publish(files, directory))


def _split(entries: Sequence[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """The entries of every file by its name, wider dtypes first, which aligns them."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if entry.tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{entry.name} must have a dtype of safetensors; got {entry.tensor.dtype}"
            )
        if groups[-1] and size + entry.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = ["model.safetensors"] if len(groups) == 1 else names
    ordered = [sorted(group, key=lambda entry: -entry.tensor.itemsize) for group in groups]
    return dict(zip(names, ordered, strict=True))


def _create(files: dict[str, list[Entry]], directory: Path) -> list[dict[str, int]]:
    """Make the files, with headers and in full length. Returns where each tensor begins."""
    directory.mkdir(parents=True, exist_ok=True)
    places = []
    for name, entries in files.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": _DTYPES[entry.tensor.dtype],
                "shape": entry.shape,
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        with (directory / (name + PARTIAL)).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(begin + offset)
        places.append({e.name: begin + header[e.name]["data_offsets"][0] for e in entries})
    return places


def _publish(files: dict[str, list[Entry]], directory: Path) -> None:
    """Give complete files their names, and leave no other model beside them."""
    for name in files:
        os.replace(directory / (name + PARTIAL), directory / name)
    index = directory / INDEX
    if len(files) > 1:
        weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
        total = sum(entry.nbytes for entries in files.values() for entry in entries)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        partial = directory / (INDEX + PARTIAL)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, index)
    else:
        index.unlink(missing_ok=True)
    for old in [*directory.glob("model-*-of-*.safetensors"), directory / "model.safetensors"]:
        if old.name not in files:
            old.unlink(missing_ok=True)


class _Writer:
    """Writes to places in a file. After a failure it does nothing, so that the other ranks, which
    wait for this one's share of the communication, come to the end too."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._buffers: dict[str, Tensor] = {}
        self._path = Path()
        self._descriptor: int | None = None

    def open(self, path: Path) -> None:
        self._path = path

    def buffer(self, use: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Memory for one use at a time, kept for the next: what is freed is not always returned."""
        size = math.prod(shape) * like.itemsize
        found = self._buffers.get(use)
        if found is None or found.numel() < size or found.device != like.device:
            found = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8, device=like.device)
            self._buffers[use] = found
        return found[:size].view(like.dtype).view(*shape)

    def write(self, place: int, values: Tensor) -> None:
        if not values.is_contiguous():
            values = self.buffer("own", values, values.shape).copy_(values)
        if self.problem is not None:
            return
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY)
            data = values.cpu().flatten().view(torch.uint8).numpy().data
            while data:
                written = os.pwrite(self._descriptor, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            self.problem = f"{self._path}: {describe(error)}"

    def close(self) -> None:
        if self._descriptor is None:
            return
        try:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
        except OSError as error:
            self.problem = self.problem or f"{self._path}: {describe(error)}"
        self._descriptor = None


def _write_entry(entry: Entry, place: int, writer: _Writer) -> None:
    """Write this rank's part of a tensor whose file has it at ``place``; all ranks join in."""
    tensor, part, shape = entry.tensor, entry.part, entry.shape
    if not isinstance(tensor, DTensor):
        if rank() == _turn(entry, dist.get_world_size() if dist.is_initialized() else 1):
            _write_rows(*_required(part, tensor), shape, place, writer)
        return
    gathered, supported = _gathered_mesh_dim(tensor, part)
    if not supported:
        _write_entry(Entry(entry.name, tensor.full_tensor(), part), place, writer)
        return
    mesh = tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        copies = mesh.size(dim)
        if placement.is_replicate() and mesh.get_local_rank(dim) != _turn(entry, copies):
            return  # another copy's turn
    found = part.overlap(tensor)
    if found is None:
        return
    if gathered is None:
        _write_rows(*found, shape, place, writer)
    else:
        mesh_dim, axis = gathered
        _gather_rows(*found, shape, axis, place, writer, mesh.get_group(mesh_dim))


def _turn(entry: Entry, copies: int) -> int:
    """Which of several copies of a tensor is written: not always the same rank's."""
    return sum(entry.name.encode()) % copies


def _required(part: Part, tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    found = part.overlap(tensor)
    return (tensor[:0].flatten(), ()) if found is None else found


def _gathered_mesh_dim(tensor: DTensor, part: Part) -> tuple[tuple[int, int] | None, bool]:
    """The mesh dimension over which rows of the file are spread, and the axis of the rows.

    Returns:
        ``((mesh dimension, axis) or None, True)``; ``(None, False)`` for what this file does not
        write in parts: the caller needs the whole tensor.
    """
    axes = part.axes(tensor.dim())
    found = None
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard:
            return None, False
        is_expert = part.expert is not None and placement.dim == 0
        if is_expert or (not part.row and axes[0] == placement.dim):
            continue  # whole rows
        size = tensor.device_mesh.size(dim)
        shared = sum(p.is_shard(placement.dim) for p in tensor.placements) > 1
        cut = part.columns is not None and placement.dim == tensor.dim() - 1
        if found is not None or shared or cut or tensor.shape[placement.dim] % size:
            return None, False
        found = (dim, axes.index(placement.dim))
    return found, True


def _write_rows(
    view: Tensor,
    slices: tuple[slice, ...],
    shape: Sequence[int],
    place: int,
    writer: _Writer,
) -> None:
    """Write ``view``, one stretch of the tensor of ``shape`` that ``slices`` cut out, in pieces."""
    if view.numel() == 0:
        return
    start = tuple(cut.start for cut in slices)
    for begin, size in boxes((0,) * view.dim(), tuple(view.shape), PIECE_BYTES // view.itemsize):
        piece = view[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))]
        at = [s + b for s, b in zip(start, begin, strict=True)]
        writer.write(place + _offset(at, shape) * view.itemsize, piece)


def _gather_rows(
    view: Tensor,
    slices: tuple[slice, ...],
    shape: Sequence[int],
    axis: int,
    place: int,
    writer: _Writer,
    group: Any,
) -> None:
    """As :func:`_write_rows` where each rank of ``group`` has a part of every row: in turn they
    receive a slab of rows, whole along ``axis``, and write it."""
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    inner = math.prod(shape[axis:])
    slabs = boxes(
        (0,) * axis, tuple(view.shape[:axis]), max(1, PIECE_BYTES // view.itemsize // inner)
    )
    for turn, (begin, size) in enumerate(slabs):
        cut = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
        size_of = [*size, *view.shape[axis:]]
        piece = writer.buffer("own", view, size_of).copy_(view[cut])
        target = turn % ranks
        # As bytes: whatever the dtype, every backend carries them. Gathering would copy once more.
        if own != target:
            dist.send(piece.view(torch.uint8), group=group, group_dst=target)
            continue
        received = writer.buffer("received", view, [ranks, *size_of])
        received[own].copy_(piece)
        for source in range(ranks):
            if source != own:
                dist.recv(received[source].view(torch.uint8), group=group, group_src=source)
        size_of[axis] *= ranks
        rows = torch.cat(list(received), axis, out=writer.buffer("rows", view, size_of))
        at = [s.start + b for s, b in zip(slices, begin, strict=False)]
        offset = _offset([*at, *[0] * (len(shape) - axis)], shape)
        writer.write(place + offset * view.itemsize, rows)


def _offset(index: Sequence[int], shape: Sequence[int]) -> int:
    """The position of an element in a contiguous tensor."""
    position = 0
    for i, size in zip(index, shape, strict=True):
        position = position * size + i
    return position


class StoredTensor:
    """A tensor in a safetensors file, of which slices are read when they are asked for."""

    def __init__(self, file: Path, name: str, shape: Sequence[int]) -> None:
        self._file, self._name = file, name
        self.shape = tuple(shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        from safetensors import safe_open

        # opened anew, or what was read before would stay mapped
        with safe_open(self._file, "pt") as file:
            if not self.shape:
                return file.get_tensor(self._name)
            return file.get_slice(self._name)[slices].clone()


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint in the format of transformers, by name.

    Raises:
        CheckpointError: there is none, or a file of it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if (directory / INDEX).exists():
        try:
            weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{directory / INDEX} is damaged: {describe(error)}") from error
        files = sorted({directory / name for name in weight_map.values()})
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory} must have safetensors files, or {INDEX}; it has neither. "
            "save_hf_checkpoint and save_pretrained write them."
        )
    found = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    found[name] = StoredTensor(path, name, file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error
    return found
