"""Every function of the integrations, called with one argument of another kind than it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

transformers = pytest.importorskip("transformers")

from moe_kernels.integrations.transformers import (  # noqa: E402
    experts_forward,
    fused_options,
    quantize_experts_of,
)
from moe_parallel.checkpoint import CheckpointError  # noqa: E402
from moe_parallel.integrations.transformers import (  # noqa: E402
    load_hf_checkpoint,
    load_hf_state_dict,
    replace_moe_layers,
    save_hf_checkpoint,
    to_hf_state_dict,
)
from tests.integrations.tiny_models import tiny_model  # noqa: E402
from tests.parallel.ranks import run_ranks  # noqa: E402

NO_MODELS = (3, None, "model", nn.Linear, [3], {"model": 3})


def replaced() -> Any:
    model = tiny_model("qwen3_moe")
    replace_moe_layers(model)
    return model


@pytest.fixture
def model() -> Any:
    return replaced()


def consumed(result: Any) -> Any:
    return list(result) if isinstance(result, Iterator) else result


def refused(argument: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        consumed(call(*args, **options))
    known = {experts_forward: "fused_options", quantize_experts_of: "quantize_experts"}
    name = known.get(call, call.__name__)
    assert re.search(rf"{name}.*: .*{argument} must be .*; got .", str(caught.value))


@pytest.mark.parametrize("wrong", NO_MODELS, ids=repr)
def test_what_is_no_model(wrong: Any, model: Any, tmp_path: Path) -> None:
    save_hf_checkpoint(model, tmp_path)
    refused("model", save_hf_checkpoint, wrong, tmp_path / "saved")
    refused("model", load_hf_checkpoint, wrong, tmp_path)
    refused("model", load_hf_state_dict, wrong, {})
    refused("model", to_hf_state_dict, wrong)
    refused("model", replace_moe_layers, wrong)
    refused("model", quantize_experts_of, wrong)
    refused("experts", fused_options, wrong)
    x, ids = torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int64)
    refused("experts", experts_forward, wrong, x, ids, torch.ones(2, 2))
    assert not (tmp_path / "saved").exists()


def test_options(model: Any, tmp_path: Path) -> None:
    save_hf_checkpoint(model, tmp_path)
    state, plain = dict(to_hf_state_dict(model)), tiny_model("qwen3_moe")
    for wrong in (3, None, ["folder"], model):
        refused("directory", save_hf_checkpoint, model, wrong)
        refused("directory", load_hf_checkpoint, model, wrong)
    for wrong in (0, -1, 1.5, "5GB", None):
        refused("max_shard_bytes", save_hf_checkpoint, model, tmp_path, max_shard_bytes=wrong)
    for wrong in (None, 1, "yes"):
        refused("strict", load_hf_checkpoint, model, tmp_path, strict=wrong)
        refused("strict", load_hf_state_dict, model, state, strict=wrong)
    for wrong in ("x", None, [1.0], float("nan"), -1):
        refused("gate_bias_update_factor", replace_moe_layers, plain, gate_bias_update_factor=wrong)
        refused("aux_loss_coeff", replace_moe_layers, plain, aux_loss_coeff=wrong)
    refused("enable_routing_replay", replace_moe_layers, plain, enable_routing_replay=1)
    refused("backend", replace_moe_layers, plain, 3)
    refused("format", quantize_experts_of, plain, 3)
    refused("names", to_hf_state_dict, model, 3)
    with pytest.raises(TypeError, match=r"save_pretrained: state_dict must be .*; got int"):
        model.save_pretrained(tmp_path, state_dict=3)
    replace_moe_layers(plain)  # what was refused has changed nothing


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor")
def test_what_is_no_tensor(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = dict(to_hf_state_dict(model))
    name, value = next(iter(good.items()))
    for wrong in (3, None, "abc", [3], [value], list(good), [(name, value, 1)], {3: value}, model):
        refused("tensors", load_hf_state_dict, model, wrong)
    wrongs = {
        "None": None,
        "list": value.tolist(),
        "ndarray": value.numpy(),
        "complex64": value.to(torch.complex64),
        "meta": value.to("meta"),
        "sparse_coo": value.to_sparse(),
        "nested": torch.nested.nested_tensor(list(value)),
        "quint8": torch.quantize_per_tensor(value, 0.1, 0, torch.quint8),
    }
    for found, other in wrongs.items():
        with pytest.raises(TypeError, match=rf"load_hf_state_dict: {name} must be .*{found}"):
            load_hf_state_dict(model, {name: other})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        spread = DTensor.from_local(value, init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=rf"{name} must be .*DTensor; give full_tensor"):
            load_hf_state_dict(model, {name: spread})
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_given_twice_does_not_stand_for_another(model: Any) -> None:
    good = list(to_hf_state_dict(model))
    names = [name for name, _ in good if "experts" in name]
    pairs: list[tuple[str, Tensor]] = [pair for pair in good if pair[0] != names[0]]
    again = next(pair for pair in good if pair[0] == names[1])
    with pytest.raises(ValueError, match="1 weights were not given, or not in full"):
        load_hf_state_dict(model, [*pairs, again])
    load_hf_state_dict(model, [*good, again])


def test_weights_on_the_meta_device_are_not_saved(model: Any, tmp_path: Path) -> None:
    save_hf_checkpoint(model, tmp_path)
    before = sorted(tmp_path.iterdir())
    model.to("meta")
    for save in (
        lambda: save_hf_checkpoint(model, tmp_path),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"must not be on the meta device; .* is"):
            save()
    with pytest.raises(CheckpointError, match=r"load_hf_checkpoint: .*meta device; .*to_empty"):
        load_hf_checkpoint(model, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def _one_rank_is_wrong(rank: int, ranks: int, folder: str) -> list[str]:
    model, messages = replaced(), []
    for call in (
        lambda: save_hf_checkpoint(3 if rank else model, folder),  # type: ignore[arg-type]
        lambda: save_hf_checkpoint(model, 3 if rank else folder),  # type: ignore[arg-type]
        lambda: load_hf_checkpoint(model, 3 if rank else folder),  # type: ignore[arg-type]
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_what_one_rank_gives_wrongly_is_an_error_on_all(tmp_path: Path) -> None:
    save_hf_checkpoint(replaced(), tmp_path)
    first, second = run_ranks(2, _one_rank_is_wrong, str(tmp_path))
    assert first == second
    for message, argument in zip(first, ("model", "directory", "directory"), strict=True):
        assert re.search(rf"rank 1: .*{argument} must be .*; got int", message)
