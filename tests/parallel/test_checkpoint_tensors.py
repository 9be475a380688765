"""Checkpoints of unusual tensors: every dtype, shape, stride and way to share or shard them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from moe_parallel.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from moe_parallel.checkpoint.pieces import StoredTensor, boxes, copy_box, piece_bytes
from tests.parallel.checkpoint_cases import drawn, equal, whole
from tests.parallel.ranks import run_ranks

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.uint16,
    torch.int8,
    torch.bool,
]


class Unusual(nn.Module):
    """Tensors that checkpoints may meet, with values drawn from ``seed``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        values = drawn(f"unusual {seed}", (6, 10)) * 100
        self.matrix = nn.Parameter(values.clone())
        self.scalar = nn.Parameter(values[0, 0].clone())
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.transposed = nn.Parameter(values.clone().t())
        self.every_second = nn.Parameter(values.clone()[:, ::2])
        self.frozen = nn.Parameter(values[0].clone(), requires_grad=False)
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        nn.init.constant_(self.one.weight, seed)
        nn.init.constant_(self.one.bias, seed)
        nn.init.constant_(self.other.bias, seed)
        self.other.weight = self.one.weight
        for dtype in DTYPES:
            self.register_buffer(str(dtype).replace("torch.", "of "), values.to(dtype))
        self.register_buffer("conjugate", torch.complex(values, values + 1).conj())
        self.register_buffer("kept aside", values.clone(), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


def bits(tensor: Tensor) -> Tensor:
    """All that a tensor holds, in a dtype that can be compared."""
    return tensor.detach().resolve_conj().contiguous().flatten().view(torch.uint8)


def unusual(seed: int) -> tuple[Unusual, torch.optim.Optimizer]:
    """A model that has taken a step, and its optimizer, which has the frozen parameter too."""
    model = Unusual(seed)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.1 * seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter) * seed
    optimizer.step()
    return model, optimizer


def test_unusual_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = unusual(1)
    path = save_checkpoint(tmp_path / "größe 大小 %s [a]*", 1, model, optimizer, piece_bytes=64)
    other, others = unusual(2)
    aside = other.get_buffer("kept aside").clone()
    load_checkpoint(path, torch.compile(other), others)  # its names begin with _orig_mod
    found = other.tensors()
    for name, value in model.tensors().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(bits(found[name]), bits(value)), name
    assert torch.equal(other.get_buffer("kept aside"), aside)
    assert other.other.weight is other.one.weight
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        state, expected = others.state.get(theirs, {}), optimizer.state.get(ours, {})
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert state[key].device == value.device
            assert equal(state[key], value), key
    assert [group["lr"] for group in others.param_groups] == [0.1] * len(others.param_groups)


def test_expanded_tensors_are_saved_but_not_filled(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("wide", torch.arange(3.0).expand(4, 3))
    path = save_checkpoint(tmp_path, 1, model)
    before = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    with pytest.raises(CheckpointError, match=r"wide must have memory .* strides \[0, 1\]"):
        load_checkpoint(path, model)
    assert not model.weight.any()
    model.wide = torch.zeros(4, 3)
    load_checkpoint(path, model)
    assert torch.equal(model.weight, before)
    assert torch.equal(model.wide, torch.arange(3.0).expand(4, 3))


def test_another_dtype_is_the_models(tmp_path: Path) -> None:
    model = nn.Linear(30, 3)
    path = save_checkpoint(tmp_path, 1, model)
    for dtype in (torch.bfloat16, torch.float64):
        other = nn.Linear(30, 3, dtype=dtype)
        load_checkpoint(path, other)
        assert torch.equal(other.weight, model.weight.to(dtype))


def stepped(dtype: torch.dtype, steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(30, 3, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(steps):
        model(torch.ones(1, 30, dtype=dtype)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 1])
def test_another_dtype_is_the_optimizers(steps: int, tmp_path: Path) -> None:
    """State that had the dtype of its parameter has that of the new one; other state keeps its."""
    model, optimizer = stepped(torch.float32)
    kept = torch.full_like(model.bias, 1 + 2**-40, dtype=torch.float64)
    optimizer.state[model.bias]["kept"] = kept
    path = save_checkpoint(tmp_path, 1, model, optimizer)
    other, others = stepped(torch.bfloat16, steps)
    load_checkpoint(path, other, others)
    for name in ("exp_avg", "exp_avg_sq"):
        expected = optimizer.state[model.weight][name]
        assert torch.equal(others.state[other.weight][name], expected.bfloat16())
    assert torch.equal(others.state[other.bias]["kept"], kept)
    other(torch.ones(1, 30, dtype=torch.bfloat16)).sum().backward()
    others.step()


# --- shards ---------------------------------------------------------------------------------------

SHAPE = (7, 6, 5)
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "one after the other": (Shard(0), Shard(0)),
    "two dimensions": (Shard(2), Shard(0)),
    "copies": (Replicate(), Shard(1)),
    "copies inside": (Shard(1), Replicate()),
    "all copies": (Replicate(), Replicate()),
}


class Sharded(nn.Module):
    def __init__(self, layout: str, seed: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        mesh = mesh["a", "b"]
        value = drawn(f"sharded {seed}", SHAPE)
        self.cut = nn.Parameter(distribute_tensor(value, mesh, LAYOUTS[layout], src_data_rank=None))
        # more ranks than rows; no rows at all; one element
        for name, shape in (("few", (3, 2)), ("none", (0, 2)), ("one", (1,))):
            value = distribute_tensor(drawn(f"{name} {seed}", shape), mesh, [Shard(0)] * 2)
            setattr(self, name, nn.Parameter(value))
        scalar = distribute_tensor(drawn(f"scalar {seed}", ()), mesh, [Replicate()] * 2)
        self.scalar = nn.Parameter(scalar)


class TwoWays(nn.Module):
    """Cut by tensor parallelism first, and each of these parts over the ranks of another axis."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 12)
        with torch.no_grad():
            self.linear.weight.copy_(drawn(f"two ways {seed}", (12, 4)))
            self.linear.bias.copy_(drawn(f"two ways, bias {seed}", (12,)))


def two_ways(seed: int, first: bool) -> nn.Module:
    model = TwoWays(seed)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if first:
        parallelize_module(model.linear, mesh["tp"], ColwiseParallel())
    fully_shard(model, mesh=mesh["dp"] if first else init_device_mesh("cpu", (4,)))
    return model


def _sharded(rank: int, ranks: int, folder: str) -> None:
    for number, name in enumerate(LAYOUTS):
        model = Sharded(name, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        path = save_checkpoint(folder, number, model, optimizer, piece_bytes=48)
        for target in LAYOUTS:
            other = Sharded(target, 2)
            others = torch.optim.AdamW(other.parameters())
            load_checkpoint(path, other, others)
            for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(whole(theirs), whole(ours)), (name, target)
                for key, value in optimizer.state[ours].items():
                    assert equal(whole(others.state[theirs][key]), whole(value)), key
    for first in (True, False):
        path = save_checkpoint(folder, 20, two_ways(1, first), piece_bytes=48)
        for second in (True, False):
            loaded = two_ways(2, second)
            load_checkpoint(path, loaded)
            expected = TwoWays(1).state_dict()
            for key, value in loaded.state_dict().items():
                assert torch.equal(whole(value), expected[key]), (first, second, key)


def test_shards_of_any_layout(tmp_path: Path) -> None:
    run_ranks(4, _sharded, str(tmp_path), timeout=120)


# --- copies ---------------------------------------------------------------------------------------


def _copies(rank: int, ranks: int, folder: str) -> list[str]:
    """Plain tensors that several ranks have are to be equal, whatever they are."""
    messages = []
    for dtype in DTYPES:
        model = nn.Module()
        # the ranks have the same values, in another order
        values = (torch.arange(1000) % 3).view(10, 100)
        values = (values if rank == 0 else values.flip(1)).to(dtype)
        model.register_buffer("equal", torch.full((3, 4), 2.0).to(dtype).t())
        save_checkpoint(folder, 1, model)
        model.register_buffer("other", values)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(folder, 2, model)
        messages.append(str(caught.value))
    return messages


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    first, second = run_ranks(2, _copies, str(tmp_path))
    assert first == second
    assert all("must have the same under the name other" in text for text in first)


# --- pieces ---------------------------------------------------------------------------------------


def reach(shape: tuple[int, ...], within: tuple[int, ...]) -> int:
    """Elements from the first to the last of a box in a contiguous tensor."""
    strides = torch.empty(within, device="meta").stride()
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@pytest.mark.parametrize(
    ("start", "shape", "within"),
    [
        ((), (), ()),
        ((3,), (40,), (50,)),
        ((0, 0, 0), (5, 6, 7), (5, 6, 7)),
        ((1, 2, 3), (1, 3, 2), (5, 6, 7)),
        ((1, 0, 3), (3, 1, 1), (5, 1, 70)),
        ((0, 2), (0, 3), (4, 6)),
    ],
)
@pytest.mark.parametrize("elements", [1, 5, 13, 10**6])
def test_boxes_cover_and_are_small(
    start: tuple[int, ...], shape: tuple[int, ...], within: tuple[int, ...], elements: int
) -> None:
    for outer in (None, within):
        counts = torch.zeros(within, dtype=torch.int64)
        found = list(boxes(start, shape, elements, outer))
        for first, size in found:
            counts[tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))] += 1
            assert torch.Size(size).numel() <= elements
            if outer is not None and 0 not in size:
                assert reach(size, within) <= elements
        assert counts.max() <= 1
        assert counts.sum() == torch.Size(shape).numel()


class Watched(io.FileIO):
    longest = 0

    def readinto(self, buffer: Any) -> int:  # type: ignore[override]
        """As few bytes as a system may give at a time."""
        self.longest = max(self.longest, len(buffer))
        return super().readinto(buffer[:1000])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_a_stored_tensor_is_read_in_pieces(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = torch.arange(7 * 30 * 11).view(7, 30, 11).to(dtype)
    path = tmp_path / "file"
    path.write_bytes(b"heads" + bits(expected).numpy().tobytes())
    with Watched(path) as file:
        stored = StoredTensor(file, path, 5, (7, 30, 11), dtype)
        target = torch.zeros(5, 20, 4, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)
        copy_box(stored, (1, 7, 3), target, 700)
        assert torch.equal(target, expected[1:6, 7:27, 3:7])
        assert 300 < file.longest <= 700
        longer = StoredTensor(file, path, 5, (7, 30, 12), dtype)
        with pytest.raises(CheckpointError, match="file is damaged: it ends before"):
            copy_box(longer, (0, 0, 0), torch.zeros(7, 30, 12, dtype=dtype), 10**6)


def test_pieces_are_read_into_the_same_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(torch.arange(60.0).numpy().tobytes())
    with open(path, "rb", buffering=0) as file:
        scratch = torch.empty(100, dtype=torch.uint8)
        stored = StoredTensor(file, path, 0, (6, 10), torch.float32, scratch)
        for row in range(6):
            piece = stored[slice(row, row + 1), slice(0, 10)]
            assert piece.data_ptr() == scratch.data_ptr()
            assert torch.equal(piece, torch.arange(60.0).view(6, 10)[row : row + 1])
        whole = stored[slice(0, 6), slice(0, 10)]  # does not fit
        assert whole.data_ptr() != scratch.data_ptr()
        assert torch.equal(whole, torch.arange(60.0).view(6, 10))


def test_pieces_are_small_beside_a_shard() -> None:
    tensors = [torch.zeros(10), torch.zeros(1000)]
    assert piece_bytes(tensors) == 1000
    assert piece_bytes(tensors, 100) == 100
    assert piece_bytes([torch.zeros(1)]) == 16  # an element of any dtype
    assert piece_bytes([], 100) == 100
    assert piece_bytes([torch.zeros(2**26, device="meta")]) == 2**23
    mesh_free = torch.zeros(0)
    assert piece_bytes([mesh_free], 100) == 100
    assert not isinstance(mesh_free, DTensor)
