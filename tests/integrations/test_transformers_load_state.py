"""``load_state_dict`` of models with replaced layers, by our names and by those of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers.trainer_utils import load_sharded_checkpoint

from moe_parallel.integrations.transformers import replace_moe_layers
from tests.integrations.tiny_models import tiny_model

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe"]


def replaced(family: str, **overrides: Any) -> Any:
    model = tiny_model(family, **overrides)
    replace_moe_layers(model)
    return model


def emptied(model: Any) -> Any:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for value in (*copied.parameters(), *copied.buffers()):
            value.zero_()
    return copied


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_save_pretrained_wrote(family: str, tmp_path: Path) -> None:
    """As a Trainer resumes: from one file or from many, and without ``strict``."""
    model = replaced(family, tie_word_embeddings=family == "mixtral")
    model.save_pretrained(tmp_path / "one")
    for strict in (False, True):
        found = emptied(model)
        result = found.load_state_dict(load_file(tmp_path / "one" / "model.safetensors"), strict)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert_same(found, model)
    model.save_pretrained(tmp_path / "many", max_shard_size=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    found = emptied(model)
    load_sharded_checkpoint(found, str(tmp_path / "many"), strict=False)
    assert_same(found, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts_of_models_as_they_were_and_as_they_are(family: str) -> None:
    original, model = tiny_model(family), replaced(family)
    for state in (original.state_dict(), model.state_dict()):
        found = emptied(model)
        found.load_state_dict(state)
        assert_same(found, model)
    base = emptied(model)
    base.model.load_state_dict(original.model.state_dict())
    assert_same(base.model, model.model)


def test_what_does_not_fit() -> None:
    model, state = replaced("qwen3_moe"), tiny_model("qwen3_moe").state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(ValueError, match="assign must be False"):
        model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match=rf"load_state_dict: {name} must be \[6, 32, 20\]"):
        model.load_state_dict({**state, name: torch.ones(6, 32, 21)})
    lacking = {**state, "other": torch.ones(1)}
    del lacking[name]
    ours = "model.layers.1.mlp.experts.down_projs"
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=rf"missing \['{ours}'\], unexpected \['other'\]"):
        model.load_state_dict(lacking)
    assert_same(model, before)
    result = model.load_state_dict(lacking, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([ours], ["other"])
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) .*other"):  # as of torch
        model.load_state_dict({**model.state_dict(), "other": torch.ones(1)})
