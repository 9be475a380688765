"""Walking models, and what the parallelizer takes from its module's globals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import Shard

from moe_parallel import parallelizer
from moe_parallel.layers import MoE
from moe_parallel.parallelizer import (
    ExpertParallel,
    _get_model_moe_config,
    _get_moe_module,
    _iter_moe_blocks,
    _iter_transformer_and_mtp_blocks,
    apply_ep,
)
from moe_parallel.text_module import get_text_module
from tests.parallel.definitions import make_config


def module(**children: Any) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        setattr(parent, name, child)
    return parent


def blocks(*names: str, **attributes: Any) -> nn.ModuleDict:
    return nn.ModuleDict({name: module(**attributes) for name in names})


def test_get_text_module() -> None:
    text, decoder = nn.Linear(1, 1), nn.Linear(1, 1)
    assert get_text_module(None) is None
    assert get_text_module(module(text_model=text, text_decoder=decoder)) is text
    assert get_text_module(module(language_model=text, text_model=decoder)) is text
    not_a_module = SimpleNamespace(language_model="text", text_decoder=decoder)
    assert get_text_module(not_a_module) is decoder
    nested = module(language_model=module(text_model=text))
    assert get_text_module(nested) is nested.language_model


def test_blocks_of_the_backbone_come_before_those_of_mtp() -> None:
    backbone = module(layers=blocks("0", "1"))
    mtp = module(layers=blocks("7"))
    for outer in (
        module(layers=backbone.layers, mtp=mtp),
        module(model=backbone, mtp=mtp),
        module(model=module(language_model=backbone), mtp=mtp),
    ):
        found = list(_iter_transformer_and_mtp_blocks(outer))
        assert [name for _, name, _ in found] == ["0", "1", "7"]
        assert [container for container, _, _ in found] == [backbone.layers] * 2 + [mtp.layers]
        assert all(container[name] is block for container, name, block in found)
        direct = list(_iter_moe_blocks(outer, backbone))
        assert all(a is b for a, (_, _, b) in zip(direct, found, strict=True))


def test_absent_containers_are_skipped() -> None:
    container = MagicMock(spec=["named_children", "children"])
    container.named_children.return_value = [("a", "block")]
    container.children.return_value = ["block"]
    outer = SimpleNamespace(model=SimpleNamespace(layers=container), mtp=None)
    assert list(_iter_transformer_and_mtp_blocks(outer)) == [(container, "a", "block")]
    assert list(_iter_moe_blocks(outer, outer.model)) == ["block"]
    outer = SimpleNamespace(model=None, layers=None, mtp=SimpleNamespace(layers=None))
    assert list(_iter_transformer_and_mtp_blocks(outer)) == []
    assert list(_iter_moe_blocks(outer, SimpleNamespace())) == []


def test_get_moe_module() -> None:
    layer = MoE(make_config())
    dense = nn.Linear(1, 1)
    assert _get_moe_module(module(moe=layer)) is layer
    assert _get_moe_module(module(moe=dense, mlp=layer)) is layer
    assert _get_moe_module(module(moe=None, mlp=layer)) is layer
    assert _get_moe_module(module(mlp=dense)) is None
    assert _get_moe_module(module()) is None
    assert _get_moe_module(checkpoint_wrapper(module(mlp=layer))) is layer


def test_get_model_moe_config() -> None:
    inner, text, outer = make_config(), make_config(), make_config()
    with_all = SimpleNamespace(
        moe_config=outer,
        model=SimpleNamespace(moe_config=inner, language_model=module(moe_config=text)),
    )
    assert _get_model_moe_config(with_all) is inner
    with_all.model.moe_config = None
    assert _get_model_moe_config(with_all) is text
    with_all.model.language_model.moe_config = None
    assert _get_model_moe_config(with_all) is outer
    with pytest.raises(AttributeError, match="SimpleNamespace has no moe_config"):
        _get_model_moe_config(SimpleNamespace(model=None))


def test_expert_parallel_works_by_attribute_and_by_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign expert modules are as good as ours; torch's functions can be replaced."""
    mesh = SimpleNamespace(ndim=1)
    calls = []

    def distribute(parameter: nn.Parameter, device_mesh: Any, placements: Any) -> torch.Tensor:
        calls.append((device_mesh, placements))
        return parameter.detach() + 1

    monkeypatch.setattr(parallelizer, "distribute_tensor", distribute)
    experts = nn.Linear(2, 3)
    experts.bias.requires_grad_(False)
    experts.init_token_dispatcher = MagicMock()
    weight = experts.weight.detach().clone()
    ExpertParallel()._partition_fn("experts", experts, mesh)
    assert calls == [(mesh, [Shard(0)])] * 2
    assert torch.equal(experts.weight.detach(), weight + 1)
    assert isinstance(experts.weight, nn.Parameter)
    assert experts.weight.requires_grad
    assert not experts.bias.requires_grad
    experts.init_token_dispatcher.assert_called_once_with(ep_mesh=mesh)

    with pytest.raises(AssertionError, match="1-D mesh"):
        ExpertParallel()._partition_fn("experts", experts, SimpleNamespace(ndim=2))

    distributed = MagicMock()
    monkeypatch.setattr(parallelizer, "distribute_module", distributed)
    style = ExpertParallel()
    assert style._apply(experts, mesh) is distributed.return_value
    distributed.assert_called_once_with(experts, mesh, style._partition_fn)


def test_apply_ep_visits_moe_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeMoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Linear(1, 1)

    parallelize = MagicMock()
    monkeypatch.setattr(parallelizer, "MoE", FakeMoE)
    monkeypatch.setattr(parallelizer, "parallelize_module", parallelize)
    sparse, second = module(mlp=FakeMoE()), module(moe=FakeMoE())
    model = module(
        model=module(layers=nn.ModuleList([sparse, module(mlp=nn.Linear(1, 1))])),
        mtp=module(layers=nn.ModuleList([second])),
    )
    mesh = MagicMock()
    mesh.size.return_value = 2
    apply_ep(model, mesh)
    assert [call.kwargs["module"] for call in parallelize.call_args_list] == [
        sparse.mlp.experts,
        second.moe.experts,
    ]
    for call in parallelize.call_args_list:
        assert call.args == ()
        assert call.kwargs["device_mesh"] is mesh
        assert isinstance(call.kwargs["parallelize_plan"], ExpertParallel)
    mesh.size.return_value = 1
    with pytest.raises(AssertionError, match="more than one rank; got 1"):
        apply_ep(model, mesh)
