"""Memory that checkpoints need beside the model: no more than its largest shard and a tenth."""

from __future__ import annotations

import ctypes
import gc
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

PIECE = 2**21
LARGE = ModelOptions(moe={**MOE, "dim": 512, "inter_dim": 64, "moe_inter_dim": 2048}, layers=3)


def peak(work: Any, *args: Any, **options: Any) -> int:
    """Growth of the resident set, in bytes."""
    gc.collect()
    # freed memory that the allocator has kept would be used again unseen
    ctypes.CDLL(None).malloc_trim(0)
    with PeakMemory(torch.device("cpu")) as memory:
        work(*args, **options)
    assert memory.bytes is not None
    return memory.bytes


def largest(model: Any) -> int:
    """Bytes of the largest shard."""
    return max(local_tensor(value).nbytes for value in model.parameters())


def _dcp(rank: int, ranks: int, sizes: list[dict[str, int]], folder: str) -> list[tuple[int, ...]]:
    warm = Run(Case(sizes[0]))  # what is imported and cached once
    warm.step(1)
    path = save_checkpoint(f"{folder}/warm", 1, warm.parts, warm.optimizer)
    load_checkpoint(path, warm.parts, warm.optimizer)
    found = []
    for index, size in enumerate(sizes):
        run = Run(Case(size, LARGE))
        run.step(1)
        if index == 0:
            found.append((peak(_save, run, f"{folder}/large"), largest(run.parts[0])))
        found.append((peak(_load, run, f"{folder}/large/step-00000001"), largest(run.parts[0])))
    return found


def _save(run: Run, folder: str) -> None:
    save_checkpoint(folder, 1, run.parts, run.optimizer, piece_bytes=PIECE)


def _load(run: Run, path: str) -> None:
    load_checkpoint(path, run.parts, run.optimizer)


def check(found: list[list[tuple[int, ...]]]) -> None:
    for rank in found:
        for extra, shard in rank:
            assert shard >= 2**24, "too small to tell from noise"
            assert extra < 1.1 * shard, (extra, shard)


def test_checkpoints_need_less_than_a_shard(tmp_path: Path) -> None:
    check(run_ranks(2, _dcp, [{"ep": 2}, {}], str(tmp_path), timeout=120))


def _hf(rank: int, ranks: int, folder: str) -> list[tuple[int, ...]]:
    from moe_parallel.integrations import _names, _safetensors
    from moe_parallel.integrations.transformers import (
        load_hf_checkpoint,
        replace_moe_layers,
        save_hf_checkpoint,
    )
    from tests.integrations.tiny_models import tiny_model

    _names.PIECE_BYTES = _safetensors.PIECE_BYTES = PIECE
    world_mesh, moe_mesh = build_meshes(ep=ranks // 2)

    def model(**sizes: int) -> Any:
        made: Any = tiny_model("qwen3_moe", num_experts=4, **sizes)
        replace_moe_layers(made)
        axes = parallel_axis_names(world_mesh, moe_mesh)
        policy = MixedPrecisionPolicy()
        parallelize_model(made, world_mesh, moe_mesh, **axes, mp_policy=policy)
        return made

    warm = model()
    save_hf_checkpoint(warm, f"{folder}/warm")
    load_hf_checkpoint(warm, f"{folder}/warm")
    large = model(hidden_size=512, moe_intermediate_size=4096)
    path = f"{folder}/large"
    saved = peak(save_hf_checkpoint, large, path, max_shard_bytes=2**26)
    # the resident set also counts pages of the mapped file that the system has read ahead
    loaded = min(peak(load_hf_checkpoint, large, path) for _ in range(3))
    return [(saved, largest(large)), (loaded, largest(large))]


@pytest.mark.parametrize("ranks", [2, 4])
def test_checkpoints_of_transformers_need_less_than_a_shard(ranks: int, tmp_path: Path) -> None:
    """On 2 ranks FSDP cuts the experts, on 4 Expert Parallelism does too."""
    pytest.importorskip("transformers")
    check(run_ranks(ranks, _hf, str(tmp_path), timeout=120))
