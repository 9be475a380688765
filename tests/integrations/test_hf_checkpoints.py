"""Checkpoints of transformers, written and read by all ranks of a sharded model together."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

transformers = pytest.importorskip("transformers")

from moe_parallel.checkpoint import CheckpointError  # noqa: E402
from moe_parallel.integrations import _names, _safetensors  # noqa: E402
from moe_parallel.integrations.transformers import (  # noqa: E402
    load_hf_checkpoint,
    replace_moe_layers,
    save_hf_checkpoint,
)
from moe_parallel.mesh import build_meshes, parallel_axis_names  # noqa: E402
from moe_parallel.parallelizer import parallelize_model  # noqa: E402
from moe_parallel.tensors import local_tensor  # noqa: E402
from tests.integrations.tiny_models import tiny_model  # noqa: E402
from tests.parallel.checkpoint_cases import whole  # noqa: E402
from tests.parallel.ranks import run_ranks  # noqa: E402

FAMILIES = {"qwen3_moe": {"num_experts": 8}, "deepseek_v3": {}, "gpt_oss": {"num_local_experts": 8}}
SOURCE, TARGETS = {"ep": 2}, ({"ep": 4}, {"dp_replicate": 2, "ep": 2})


def sharded(family: str, sizes: dict[str, int], **overrides: Any) -> Any:
    model: Any = tiny_model(family, **FAMILIES[family], **overrides)
    replace_moe_layers(model)
    world_mesh, moe_mesh = build_meshes(**sizes)
    parallelize_model(
        model,
        world_mesh,
        moe_mesh,
        **parallel_axis_names(world_mesh, moe_mesh),
        mp_policy=MixedPrecisionPolicy(),
    )
    return model


def small_pieces() -> None:
    """Of 600 bytes: several in most tensors, and never whole rows of all."""
    _names.PIECE_BYTES = _safetensors.PIECE_BYTES = 600


def erase(model: Any) -> None:
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            local_tensor(value).fill_(torch.nan)


def _save_and_load(rank: int, ranks: int, folder: str) -> None:
    small_pieces()
    for family in FAMILIES:
        model = sharded(family, SOURCE)
        expected = {name: whole(value) for name, value in model.state_dict().items()}
        for name, limit in (("one", 10**9), ("many", 30_000)):
            save_hf_checkpoint(model, f"{folder}/{family}/{name}", max_shard_bytes=limit)
        # over files of an earlier one
        save_hf_checkpoint(model, f"{folder}/{family}/many", max_shard_bytes=20_000)
        for sizes in TARGETS:
            other = sharded(family, sizes)
            erase(other)
            load_hf_checkpoint(other, f"{folder}/{family}/many")
            found = other.state_dict()
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(whole(found[name]), value), (family, sizes, name)


def test_four_ranks_write_what_transformers_reads(tmp_path: Path) -> None:
    run_ranks(4, _save_and_load, str(tmp_path), timeout=240)
    for family, options in FAMILIES.items():
        original = tiny_model(family, **options).state_dict()
        for name in ("one", "many"):
            path = tmp_path / family / name
            load = transformers.AutoModelForCausalLM.from_pretrained
            state = load(path, attn_implementation="eager").state_dict()
            for key, value in original.items():
                assert torch.equal(state[key], value), (family, name, key)
            files = {file.name for file in path.glob("*.safetensors*")}
            if name == "one":
                assert files == {"model.safetensors"}
                continue
            index = json.loads((path / "model.safetensors.index.json").read_text())
            assert files == {*index["weight_map"].values(), "model.safetensors.index.json"}
            assert len(files) > 5
            assert max((path / file).stat().st_size for file in files) < 60_000  # a stacked tensor


def _refused(rank: int, ranks: int, folder: str) -> list[str]:
    small_pieces()
    model = sharded("qwen3_moe", {"ep": 2})
    good = f"{folder}/good"
    save_hf_checkpoint(model, good, max_shard_bytes=20_000)
    if rank == 0:
        index = json.loads(Path(f"{good}/model.safetensors.index.json").read_text())
        for kind in ("absent", "short"):
            shutil.copytree(good, f"{folder}/{kind}")
            file = Path(f"{folder}/{kind}") / max(index["weight_map"].values())
            file.unlink() if kind == "absent" else file.write_bytes(file.read_bytes()[:-9])
    messages = []
    tries = [(model, "nowhere"), (model, "absent"), (model, "short")]
    tries += [(sharded("qwen3_moe", {"ep": 2}, moe_intermediate_size=12), "good")]
    tries += [(sharded("qwen3_moe", {"ep": 2}, num_hidden_layers=3), "good")]
    tries += [(sharded("qwen3_moe", {"ep": 2}, num_hidden_layers=1), "good")]
    for loading, name in tries:
        before = {key: whole(value) for key, value in loading.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            load_hf_checkpoint(loading, f"{folder}/{name}")
        messages.append(str(caught.value))
        after = loading.state_dict()
        assert all(torch.equal(whole(after[key]), value) for key, value in before.items())
    if rank == 1:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    with pytest.raises(CheckpointError) as caught:
        save_hf_checkpoint(model, good, max_shard_bytes=10**9)
    messages.append(str(caught.value))
    return messages


def test_one_error_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, _refused, str(tmp_path))
    assert first == second
    for text, expected in zip(
        first,
        [
            "must have safetensors files, or model.safetensors.index.json; it has neither",
            "absent",
            "short",
            "must be [12, 32]; got [20, 32]",
            "weights were not given, or not in full, such as model.layers.2.",
            "the model has no place for model.layers.1.",
            "rank 1: ",
        ],
        strict=True,
    ):
        assert expected in text
    assert "File too large" in first[-1]
    # what was there before can still be read
    files = {file.name for file in (tmp_path / "good").glob("model*.safetensors")}
    assert len(files) > 2
    load = transformers.AutoModelForCausalLM.from_pretrained
    state = load(tmp_path / "good").state_dict()
    original = tiny_model("qwen3_moe", **FAMILIES["qwen3_moe"]).state_dict()
    assert all(torch.equal(state[key], value) for key, value in original.items())
