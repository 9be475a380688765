"""Safetensors files that all ranks write together, and read their own parts of.

The sizes of all tensors are known beforehand, and so is the place of every byte: each rank writes
what it holds to its place. Where a rank's part is not in one stretch of the file, the ranks that
have the rest send it a slab of whole rows at a time.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_parallel.checkpoint.agreement import (
    CheckpointError,
    describe,
    gathered,
    is_coordinator,
    on_coordinator,
    raise_together,
    rank,
)
from moe_parallel.checkpoint.folders import sync_folder
from moe_parallel.checkpoint.pieces import StoredTensor, boxes, common_piece_bytes, slices_of
from moe_parallel.integrations._names import Part

PARTIAL = ".partial"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
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


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the files, and who fills it.

    Attributes:
        ranks: those that write it together: all that share one with shards, or one that has it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ranks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_files(
    entries: Sequence[Entry], directory: Path, max_bytes: int, variant: str | None = None
) -> None:
    """Write the ``entries`` of all ranks, in files of at most ``max_bytes`` (a larger one has its
    own). Collective; ranks that have the same names must have equal tensors there.

    The files have other names until all are complete.

    Args:
        variant: as in ``from_pretrained``: a part of the names of the files.

    Raises:
        CheckpointError: a rank could not write; what was in the directory before is still there.
    """
    own = {entry.name: entry for entry in entries}
    described = gathered([(e.name, tuple(e.shape), e.tensor.dtype, _mesh(e)) for e in entries])
    files = on_coordinator(lambda: _split(_slots(described), max_bytes, variant))
    places = on_coordinator(lambda: _create(files, directory))
    writer = _Writer(common_piece_bytes(entry.tensor for entry in entries))
    for (name, slots), place in zip(files.items(), places, strict=True):
        writer.open(directory / (name + PARTIAL))
        for slot in slots:
            if rank() in slot.ranks:
                _write_entry(own[slot.name], slot, place[slot.name], writer)
        writer.close()
    try:
        raise_together(writer.problem)
    except CheckpointError:
        if is_coordinator():
            _clear(directory)
        raise
    on_coordinator(lambda: _publish(files, directory, variant))


def _mesh(entry: Entry) -> tuple[int, ...] | None:
    """The ranks that share a tensor; None for those of a plain one."""
    tensor = entry.tensor
    return tuple(tensor.device_mesh.mesh.flatten().tolist()) if is_sharded(tensor) else None


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor)


def _slots(described: Sequence[Sequence[tuple[Any, ...]]]) -> list[_Slot]:
    """What to write of all that the ranks have, each once."""
    holders: dict[str, list[int]] = {}
    first: dict[str, tuple[Any, ...]] = {}
    for number, entries in enumerate(described):
        for name, *about in entries:
            first.setdefault(name, tuple(about))
            holders.setdefault(name, []).append(number)
            if first[name][:2] != tuple(about[:2]):
                raise CheckpointError(
                    f"all ranks must have the same under the name {name}; ranks "
                    f"{holders[name][0]} and {number} have {first[name][:2]} and {tuple(about[:2])}"
                )
    slots = []
    for name, (shape, dtype, mesh) in first.items():
        if dtype not in _DTYPES:
            raise CheckpointError(f"{name} must have a dtype of safetensors; got {dtype}")
        some = holders[name]
        slots.append(_Slot(name, shape, dtype, mesh or (some[_turn(name, len(some))],)))
    return slots


def _split(slots: Sequence[_Slot], max_bytes: int, variant: str | None) -> dict[str, list[_Slot]]:
    """The slots of every file by its name, wider dtypes first, which aligns them."""
    groups: list[list[_Slot]] = [[]]
    size = 0
    for slot in slots:
        if groups[-1] and size + slot.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(slot)
        size += slot.nbytes
    stem = _stem(variant)
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = [f"{stem}.safetensors"] if len(groups) == 1 else names
    ordered = [sorted(group, key=lambda slot: -slot.dtype.itemsize) for group in groups]
    return dict(zip(names, ordered, strict=True))


def _stem(variant: str | None) -> str:
    return "model" if variant is None else f"model.{variant}"


def _create(files: Mapping[str, list[_Slot]], directory: Path) -> list[dict[str, int]]:
    """Make the files, with headers and in full length. Returns where each tensor begins."""
    directory.mkdir(parents=True, exist_ok=True)
    _clear(directory)
    places = []
    for name, slots in files.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for slot in slots:
            header[slot.name] = {
                "dtype": _DTYPES[slot.dtype],
                "shape": slot.shape,
                "data_offsets": [offset, offset + slot.nbytes],
            }
            offset += slot.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        with (directory / (name + PARTIAL)).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(begin + offset)
        places.append({s.name: begin + header[s.name]["data_offsets"][0] for s in slots})
    return places


def _clear(directory: Path) -> None:
    """Remove what an interrupted save has left."""
    for path in directory.glob(f"model*{PARTIAL}"):
        path.unlink()


def _publish(files: Mapping[str, list[_Slot]], directory: Path, variant: str | None) -> None:
    """Give complete files their names, and leave no other model beside them."""
    index = directory / INDEX
    index = index if variant is None else index.with_suffix(f".{variant}.json")
    # before files of one model stand beside those of another, nothing says that they are one
    index.unlink(missing_ok=True)
    for name in files:
        os.replace(directory / (name + PARTIAL), directory / name)
    if len(files) > 1:
        weight_map = {slot.name: name for name, slots in files.items() for slot in slots}
        total = sum(slot.nbytes for slots in files.values() for slot in slots)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        partial = index.with_name(index.name + PARTIAL)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, index)
    stem = _stem(variant)
    shards = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    for old in directory.iterdir():
        if shards.fullmatch(old.name) and old.name not in files:
            old.unlink(missing_ok=True)
    sync_folder(directory)


class _Writer:
    """Writes to places in a file. After a failure it does nothing, so that the other ranks, which
    wait for this one's share of the communication, come to the end too."""

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
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
            found = torch.empty(max(size, self.piece_bytes), dtype=torch.uint8, device=like.device)
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


def _write_entry(entry: Entry, slot: _Slot, place: int, writer: _Writer) -> None:
    """Write this rank's part of a tensor whose file has it at ``place``; all of the slot's ranks
    join in."""
    tensor, part, shape = entry.tensor, entry.part, slot.shape
    if not is_sharded(tensor):
        _write_rows(*_required(part, tensor), shape, place, writer)
        return
    spread, supported = _gathered_mesh_dim(tensor, part)
    if not supported:
        whole = tensor.full_tensor()
        if rank() == slot.ranks[_turn(slot.name, len(slot.ranks))]:
            _write_rows(*_required(part, whole), shape, place, writer)
        return
    mesh = tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        copies = mesh.size(dim)
        if placement.is_replicate() and mesh.get_local_rank(dim) != _turn(slot.name, copies):
            return  # another copy's turn
    found = part.overlap(tensor)
    if found is None:
        return
    if spread is None:
        _write_rows(*found, shape, place, writer)
    else:
        mesh_dim, axis = spread
        _gather_rows(*found, shape, axis, place, writer, mesh.get_group(mesh_dim))


def _turn(name: str, copies: int) -> int:
    """Which of several copies of a tensor is written: not always the same rank's."""
    return sum(name.encode()) % copies


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
    elements = writer.piece_bytes // view.itemsize
    for begin, size in boxes((0,) * view.dim(), view.shape, elements):
        piece = view[slices_of(begin, size)]
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
    rows = max(1, writer.piece_bytes // view.itemsize // inner)
    for turn, (begin, size) in enumerate(boxes((0,) * axis, view.shape[:axis], rows)):
        cut = slices_of(begin, size)
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
        slab = torch.cat(list(received), axis, out=writer.buffer("rows", view, size_of))
        at = [s.start + b for s, b in zip(slices, begin, strict=False)]
        offset = _offset([*at, *[0] * (len(shape) - axis)], shape)
        writer.write(place + offset * view.itemsize, slab)


def _offset(index: Sequence[int], shape: Sequence[int]) -> int:
    """The position of an element in a contiguous tensor."""
    position = 0
    for i, size in zip(index, shape, strict=True):
        position = position * size + i
    return position


def stored_tensors(directory: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint in the format of transformers, by name.

    Args:
        files: what closes the files in the end.

    Raises:
        CheckpointError: there is none, or a file of it is missing or damaged.
    """
    if (directory / WEIGHTS).exists():  # first, as in transformers
        paths = [directory / WEIGHTS]
    elif (directory / INDEX).exists():
        try:
            weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
            paths = sorted({directory / name for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory / INDEX} is damaged: {describe(error)}") from error
    else:
        paths = sorted(directory.glob("*.safetensors"))
        several = [path.name for path in paths if _OF_SEVERAL.search(path.name)]
        if several:
            raise CheckpointError(
                f"{directory} must have {INDEX} beside {several[0]}; it has not: writing it was "
                "interrupted. Save again, or load another checkpoint."
            )
    if not paths:
        raise CheckpointError(
            f"{directory} must have safetensors files, or {INDEX}; it has neither. "
            "save_hf_checkpoint and save_pretrained write them."
        )
    found: dict[str, StoredTensor] = {}
    for path in paths:
        found |= _stored_in(path, files)
    return found


def _stored_in(path: Path, files: ExitStack) -> dict[str, StoredTensor]:
    try:
        file = files.enter_context(path.open("rb", buffering=0))
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"it is damaged: its header must be in its {size} bytes")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    found = {}
    for name, about in header.items():
        if about["dtype"] not in dtypes:
            raise CheckpointError(
                f"{name} in {path} must have one of the dtypes {', '.join(dtypes)}; got "
                f"{about['dtype']}"
            )
        begin, end = (8 + length + offset for offset in about["data_offsets"])
        stored = StoredTensor(file, path, begin, tuple(about["shape"]), dtypes[about["dtype"]])
        if end - begin != stored.numel() * stored.dtype.itemsize or end > size:
            raise CheckpointError(
                f"{path} is damaged: {name} {list(stored.shape)}, from byte {begin} to {end}, must "
                f"be in its {size} bytes. Load another checkpoint, or copy this one again."
            )
        found[name] = stored
    return found
