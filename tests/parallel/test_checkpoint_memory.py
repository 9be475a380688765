"""Memory that checkpoints need beside the model: no more than its largest shard and a tenth."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from benchmarks.memory import PeakMemory
from moe_parallel.checkpoint import load_checkpoint, save_checkpoint
from moe_parallel.mesh import build_meshes, parallel_axis_names
from moe_parallel.parallelizer import parallelize_model
from moe_parallel.tensors import local_tensor
from tests.parallel.checkpoint_cases import MOE, Case, Run
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import ModelOptions

LARGE = ModelOptions(moe={**MOE, "dim": 512, "inter_dim": 64, "moe_inter_dim": 2048}, layers=3)
SMALL = ModelOptions(moe={**MOE, "dim": 256, "inter_dim": 64, "moe_inter_dim": 1024}, layers=2)


def grown(work: Callable[[], Any]) -> int:
    """Growth of the resident set, in bytes: all that there is, and what the system adds."""
    gc.collect()
    # freed memory that the allocator has kept would be used again unseen
    ctypes.CDLL(None).malloc_trim(0)
    with PeakMemory(torch.device("cpu")) as memory:
        work()
    assert memory.bytes is not None
    return memory.bytes


class _Mallinfo(ctypes.Structure):
    """What glibc says of its heaps, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated(work: Callable[[], Any]) -> int:
    """The peak of what ``work`` allocates, in bytes, seen at every call and return of a function.

    The resident set is no measure of little memory: it has what the system maps and the allocators
    keep.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    peak = 0

    def look(*event: Any) -> None:
        nonlocal peak
        found = mallinfo()
        peak = max(peak, found.uordblks + found.hblkhd)  # in heaps, and mapped one by one

    gc.collect()
    look()
    before = peak
    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return peak - before


def largest(model: Any) -> int:
    """Bytes of the largest shard."""
    return max(local_tensor(value).nbytes for value in model.parameters())


MEASURES = {"grown": grown, "allocated": allocated}


def _run(case: Case, folder: str) -> tuple[Run, Path]:
    """A run; and a small one that has met all that is imported and cached once."""
    warm = Run(Case(case.sizes))
    warm.step(1)
    path = save_checkpoint(f"{folder}/warm", 1, warm.parts, warm.optimizer)
    load_checkpoint(path, warm.parts, warm.optimizer)
    run = Run(case)
    run.step(1)
    return run, Path(folder) / "step-00000001"


def _save(rank: int, ranks: int, case: Case, folder: str, measure: str) -> tuple[int, int]:
    run, path = _run(case, folder)
    save = functools.partial(save_checkpoint, path.parent, 1, run.parts, run.optimizer)
    return MEASURES[measure](save), largest(run.parts[0])


def _load(rank: int, ranks: int, case: Case, folder: str, measure: str) -> tuple[int, int]:
    run, path = _run(case, folder)
    load = functools.partial(load_checkpoint, path, run.parts, run.optimizer)
    return MEASURES[measure](load), largest(run.parts[0])


def check(found: list[tuple[int, int]], least: int) -> None:
    for extra, shard in found:
        assert shard >= least, "too small to tell from what does not depend on it"
        assert extra < 1.1 * shard, (extra, shard)


def test_large_shards(tmp_path: Path) -> None:
    for work, sizes in ((_save, {"ep": 2}), (_load, {})):
        found = run_ranks(2, work, Case(sizes, LARGE), str(tmp_path), "grown", timeout=120)
        check(found, 2**24)


def test_small_shards(tmp_path: Path) -> None:
    """Written by ranks with larger shards, and smaller than the pieces of those."""
    saved = run_ranks(1, _save, Case({}, SMALL), str(tmp_path), "allocated")
    loaded = run_ranks(4, _load, Case({}, SMALL), str(tmp_path), "allocated")
    check(saved + loaded, 2**20)


def _hf(rank: int, ranks: int, folder: str, sizes: dict[str, int], measure: str) -> Any:
    from moe_parallel.integrations.transformers import (
        load_hf_checkpoint,
        replace_moe_layers,
        save_hf_checkpoint,
    )
    from tests.integrations.tiny_models import tiny_model

    world_mesh, moe_mesh = build_meshes(ep=max(1, ranks // 2))

    def model(**sizes: int) -> Any:
        made: Any = tiny_model("qwen3_moe", num_experts=4, **sizes)
        replace_moe_layers(made)
        axes = parallel_axis_names(world_mesh, moe_mesh)
        policy = MixedPrecisionPolicy()
        parallelize_model(made, world_mesh, moe_mesh, **axes, mp_policy=policy)
        return made

    def ways(used: Any, directory: str) -> list[Callable[[], Any]]:
        return [
            functools.partial(save_hf_checkpoint, used, directory, max_shard_bytes=2**26),
            functools.partial(load_hf_checkpoint, used, directory),
            functools.partial(used.save_pretrained, directory, max_shard_size=2**26),
        ]

    for work in ways(model(), f"{folder}/warm"):
        work()
    made = model(**sizes)
    return [(MEASURES[measure](work), largest(made)) for work in ways(made, f"{folder}/it")]


@pytest.mark.parametrize(
    ("ranks", "size"),
    [
        *((2, "large"), (4, "small")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "small"), (4, "large"))),
    ],
)
def test_checkpoints_of_transformers(ranks: int, size: str, tmp_path: Path) -> None:
    """On 2 ranks FSDP cuts the experts, on 4 Expert Parallelism does too."""
    pytest.importorskip("transformers")
    hidden, inner = (512, 4096) if size == "large" else (256, 1024)
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner}
    measure, least = ("grown", 2**24) if size == "large" else ("allocated", 2**20)
    found = run_ranks(ranks, _hf, str(tmp_path), sizes, measure, timeout=120)
    for each in found:
        check(each, least)
