"""Checkpoints of transformers, written and read by all ranks of a sharded model together."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

transformers = pytest.importorskip("transformers")

import huggingface_hub  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from moe_parallel.checkpoint import CheckpointError  # noqa: E402
from moe_parallel.integrations import _checkpoint, _safetensors  # noqa: E402
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
    _checkpoint.piece_bytes = lambda tensors: 600  # type: ignore[attr-defined]
    _safetensors.common_piece_bytes = lambda tensors: 600  # type: ignore[attr-defined]


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
        last = max(index["weight_map"].values())
        for kind in ("absent", "short", "empty", "odd"):
            shutil.copytree(good, f"{folder}/{kind}")
            file = Path(f"{folder}/{kind}") / last
            if kind == "odd":
                file.with_name("model.safetensors.index.json").write_text("[1]")
            elif kind == "absent":
                file.unlink()
            else:
                file.write_bytes(b"" if kind == "empty" else file.read_bytes()[:-9])
    messages = []
    tries = [(model, kind) for kind in ("nowhere", "absent", "short", "empty", "odd")]
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
            "safetensors cannot be read: ValueError: it is damaged: its header must be in its 0",
            "odd/model.safetensors.index.json is damaged: ",
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


# --- pipelines ------------------------------------------------------------------------------------

PIPELINE = {"num_experts": 8, "num_hidden_layers": 4}


class Inner(nn.Module):
    """What a stage has of the inner model."""

    def __init__(self, inner: Any, layers: list[int], first: bool, last: bool) -> None:
        super().__init__()
        self.embed_tokens = inner.embed_tokens if first else None
        self.layers = nn.ModuleDict({str(index): inner.layers[index] for index in layers})
        self.norm = inner.norm if last else None
        self.rotary_emb = inner.rotary_emb
        self.moe_config = inner.moe_config


class Stage(nn.Module):
    """One of several: consecutive layers, by their names in the whole model."""

    def __init__(self, model: Any, stage: int, stages: int) -> None:
        super().__init__()
        self.config = model.config
        count = len(model.model.layers)
        layers = list(range(stage * count // stages, (stage + 1) * count // stages))
        last = stage == stages - 1
        self.model = Inner(model.model, layers, stage == 0, last)
        self.lm_head = model.lm_head if last else None


def stages(sizes: dict[str, int], a_rank: int = 1, **overrides: Any) -> list[Any]:
    """This rank's stages of a pipeline."""
    world_mesh, moe_mesh = build_meshes(**sizes)
    pp, own = world_mesh["pp"].size(), world_mesh["pp"].get_local_rank()
    made = []
    for index in range(own, pp * a_rank, pp):
        model: Any = tiny_model("qwen3_moe", **{**PIPELINE, **overrides})
        replace_moe_layers(model)
        stage = Stage(model, index, pp * a_rank)
        axes = parallel_axis_names(world_mesh, moe_mesh)
        policy = MixedPrecisionPolicy()
        parallelize_model(
            stage, world_mesh, moe_mesh, **axes, mp_policy=policy, wrap_outer_model=False
        )
        made.append(stage)
    return made


def _pipelined(rank: int, ranks: int, folder: str) -> None:
    small_pieces()
    for name, sizes, a_rank in (("pp ep", {"pp": 2, "ep": 2}, 1), ("pp", {"pp": 2}, 2)):
        saving = stages(sizes, a_rank)
        assert len(saving) == a_rank
        save_hf_checkpoint(saving, f"{folder}/{name}", max_shard_bytes=20_000)
        expected = [{k: whole(v) for k, v in part.state_dict().items()} for part in saving]
        for part in saving:
            erase(part)
        load_hf_checkpoint(saving, f"{folder}/{name}")
        for part, values in zip(saving, expected, strict=True):
            found = part.state_dict()
            assert found.keys() == values.keys()
            for key, value in values.items():
                assert torch.equal(whole(found[key]), value), (name, key)


def test_pipelines_write_and_read_whole_models(tmp_path: Path) -> None:
    run_ranks(4, _pipelined, str(tmp_path), timeout=120)
    original = tiny_model("qwen3_moe", **PIPELINE).state_dict()
    for name in ("pp ep", "pp"):
        load = transformers.AutoModelForCausalLM.from_pretrained
        loaded, report = load(tmp_path / name, output_loading_info=True)
        assert not any(report.values()), report
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in original.items())
        assert (tmp_path / name / "config.json").exists()


def _pipeline_refused(rank: int, ranks: int, folder: str) -> list[str]:
    good = f"{folder}/good"
    save_hf_checkpoint(stages({"pp": 2}), good)
    messages = []

    def refused(call: Any, *args: Any) -> None:
        with pytest.raises(CheckpointError) as caught:
            call(*args)
        messages.append(str(caught.value))

    refused(load_hf_checkpoint, stages({"pp": 2}, num_hidden_layers=2), good)
    refused(load_hf_checkpoint, stages({"pp": 2}, num_hidden_layers=6), good)
    refused(load_hf_checkpoint, stages({"pp": 2}, moe_intermediate_size=12), good)
    counted = stages({"pp": 2})
    if rank >= ranks // 2:  # the second stage counts its layers from zero
        layers = counted[0].model.layers
        counted[0].model.layers = nn.ModuleList(layers.values())
    refused(save_hf_checkpoint, counted, f"{folder}/bad")
    refused(save_hf_checkpoint, stages({"pp": 2})[0].model, f"{folder}/bad")
    refused(save_hf_checkpoint, [*counted, *counted], f"{folder}/bad")
    return messages


def test_stages_that_do_not_fit_are_one_error_on_all_ranks(tmp_path: Path) -> None:
    first, *others = run_ranks(2, _pipeline_refused, str(tmp_path))
    assert all(other == first for other in others)
    for text, expected in zip(
        first,
        [
            "the model has no place for model.layers.2.",
            "rank 1: ValueError: load_hf_checkpoint: 22 weights were",
            "must be [12, 32]; got [20, 32]",
            "ranks 0 and 1 must have the same under the name model.layers.0.",
            "must have the config of transformers as its attribute config; rank 0 has ['Inner']",
            "two of one rank have model.",
        ],
        strict=True,
    ):
        assert expected in text
    assert not (tmp_path / "bad").exists()


# --- save_pretrained ------------------------------------------------------------------------------


def _save_pretrained(rank: int, ranks: int, folder: str) -> list[str]:
    small_pieces()
    refuse_whole_tensors()
    model = sharded("qwen3_moe", {"ep": 2})
    for way, options in WAYS.items():
        model.save_pretrained(f"{folder}/{way} {rank}", **options)
    model.save_pretrained(f"{folder}/main", is_main_process=rank == 0)
    model.save_pretrained(f"{folder}/none", is_main_process=False)
    state = {key: value * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(f"{folder}/given", state_dict=state)
    model.model.save_pretrained(f"{folder}/base")
    calls: list[str] = []
    api = huggingface_hub.HfApi
    api.create_repo = lambda *a, **k: calls.append(f"made {a[1:]} {k}") or Made  # type: ignore[method-assign, func-returns-value]
    api.upload_folder = lambda *a, **k: calls.append(f"sent {k}")  # type: ignore[method-assign]
    model.save_pretrained(f"{folder}/name", push_to_hub=True, token="t", private=True)
    return calls


class Made:
    repo_id = "me/name"


def refuse_whole_tensors() -> None:
    def refuse(tensor: Any, *args: Any, **options: Any) -> None:
        raise AssertionError(f"a whole tensor of {list(tensor.shape)}")

    DTensor.full_tensor = refuse  # type: ignore[method-assign, assignment]


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shards": {"max_shard_size": "30KB"},
    "variant": {"variant": "other"},
    "variants": {"variant": "other", "max_shard_size": 30_000},
    "module names": {"save_original_format": False},
}


def test_save_pretrained_of_a_sharded_model_streams(tmp_path: Path) -> None:
    calls, others = run_ranks(2, _save_pretrained, str(tmp_path), timeout=120)
    original: Any = tiny_model("qwen3_moe", **FAMILIES["qwen3_moe"])

    def check(model: Any, folder: Path, variant: str | None = None) -> None:
        loaded, report = type(model).from_pretrained(
            folder, variant=variant, output_loading_info=True
        )
        assert not any(report.values()), report
        state = loaded.state_dict()
        assert all(torch.equal(state[k], value) for k, value in model.state_dict().items())

    for way, options in WAYS.items():
        found = tmp_path / f"{way} 0"  # where rank 0 was told to write
        check(original, found, options.get("variant"))
        original.save_pretrained(tmp_path / "expected" / way, **options)
        ours, theirs = (
            {name for file in path.glob("*.safetensors") for name in load_file(file)}
            for path in (found, tmp_path / "expected" / way)
        )
        assert ours == theirs
    assert len(list((tmp_path / "shards 0").glob("*.safetensors"))) > 5
    assert {file.name for file in (tmp_path / "variant 0").glob("*.safetensors")} == {
        "model.other.safetensors"
    }
    check(original, tmp_path / "main")
    check(original.model, tmp_path / "base")
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(2)
    check(original, tmp_path / "given")
    names = {path.name for path in tmp_path.iterdir()}
    assert "none" not in names
    assert not any(name.endswith(" 1") for name in names)
    assert others == []
    made, sent = calls
    assert made == "made ('name',) {'exist_ok': True, 'private': True}"
    assert "'repo_id': 'me/name'" in sent


def _interrupted(rank: int, ranks: int, folder: str) -> None:
    model = sharded("qwen3_moe", {"ep": 2})
    save_hf_checkpoint(model, folder, max_shard_bytes=30_000)
    if rank == 0:
        replace, names = os.replace, []

        def once(source: Any, target: Any) -> None:
            replace(source, target)
            names.append(target)
            if len(names) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = once
    save_hf_checkpoint(model, folder, max_shard_bytes=30_000)


def test_files_of_two_models_are_not_taken_for_one(tmp_path: Path) -> None:
    """Killed while files get their names."""
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(2, _interrupted, str(tmp_path))
    assert list(tmp_path.glob("*.partial"))
    model: Any = tiny_model("qwen3_moe", **FAMILIES["qwen3_moe"])
    replace_moe_layers(model)
    with pytest.raises(CheckpointError, match=r"must have model\.safetensors\.index\.json beside"):
        load_hf_checkpoint(model, tmp_path)
    with pytest.raises(OSError, match="no file named model"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    save_hf_checkpoint(model, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    load_hf_checkpoint(model, tmp_path)
