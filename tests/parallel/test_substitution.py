"""What other frameworks' code and stand-ins can take the place of, and what is asked of them."""

from __future__ import annotations

import builtins
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as data_parallel

from moe_parallel import fsdp_mixin, parallelizer
from tests.parallel.stand_ins import StandInMesh, StandInMoE, make_model

STEPS = ("apply_cp", "apply_ep", "apply_ac", "apply_fsdp")


class Children:
    def __init__(self, *blocks: Any) -> None:
        self.blocks = blocks

    def children(self) -> Any:
        return iter(self.blocks)


class NamedChildren:
    def __init__(self, *blocks: Any) -> None:
        self.blocks = blocks

    def named_children(self) -> Any:
        return ((f"block {i}", block) for i, block in enumerate(self.blocks))


def in_list(*blocks: Any) -> list[Any]:
    return list(blocks)


def in_module_list(*blocks: Any) -> nn.ModuleList:
    return nn.ModuleList(blocks)


@pytest.mark.parametrize("layers", [Children, NamedChildren, in_list, in_module_list])
def test_blocks_are_found_in_any_container(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Linear(2, 2)

    def block() -> Any:
        module = nn.Module()
        module.mlp = Layer()
        return module

    calls: dict[str, Any] = {"parallelize_module": Mock(), "fully_shard": Mock()}
    for name, call in calls.items():
        monkeypatch.setattr(parallelizer, name, call)
    monkeypatch.setattr(parallelizer, "MoE", Layer)
    blocks, mtp_blocks = [block(), block()], [block()]
    model = make_model(mtp=SimpleNamespace(layers=layers(*mtp_blocks)))
    model.model.layers = layers(*blocks)
    everything = blocks + mtp_blocks
    found = list(parallelizer._iter_transformer_and_mtp_blocks(model))
    assert [b for _, _, b in found] == everything
    assert [container for container, _, _ in found] == [model.model.layers] * 2 + [model.mtp.layers]
    start = "block " if layers is NamedChildren else ""
    assert [name for _, name, _ in found] == [f"{start}{i}" for i in (0, 1, 0)]
    assert list(parallelizer._iter_moe_blocks(model, model.model)) == everything

    mesh: Any = SimpleNamespace(size=lambda: 2)
    parallelizer.apply_ep(model, mesh)
    experts = [call.kwargs["module"] for call in calls["parallelize_module"].call_args_list]
    assert experts == [block.mlp.experts for block in everything]
    parallelizer.apply_cp(model, mesh)
    assert all(block.mlp.cp_mesh is mesh for block in everything)
    parallelizer.apply_fsdp(model, mesh, True, True, mesh)
    sharded = [call.args[0] for call in calls["fully_shard"].call_args_list]
    assert sharded[:6] == [part for block in everything for part in (block.mlp.experts, block)]
    flags = [c.kwargs["reshard_after_forward"] for c in calls["fully_shard"].call_args_list]
    assert not any(flags)
    monkeypatch.setattr(fsdp_mixin, "FSDPModule", nn.Linear)
    units = list(fsdp_mixin._iter_fsdp_modules(model))
    assert units == [block.mlp.experts for block in everything]


@pytest.mark.parametrize("kind", [Mock, MagicMock])
def test_nothing_is_asked_of_a_model_that_other_steps_parallelize(
    monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    calls = {name: Mock() for name in STEPS}
    for name, call in calls.items():
        monkeypatch.setattr(parallelizer, name, call)
    monkeypatch.setattr(parallelizer, "get_text_module", lambda module: module)
    weight = object()
    tied = make_model(lm_head=SimpleNamespace(weight=weight))
    tied.model.embed_tokens.weight = weight
    anything = kind()
    anything.model.moe_config.n_routed_experts = 8
    for model in (tied, anything):
        parallelizer.parallelize_model(
            model,
            StandInMesh({("dp",): 2, "cp": 2, "tp": 1}),
            StandInMesh({"ep": 2, ("ep_shard",): 2}),
            dp_axis_names=("dp",),
            cp_axis_name="cp",
            tp_axis_name="tp",
            ep_axis_name="ep",
            ep_shard_axis_names=("ep_shard",),
            activation_checkpointing=True,
            wrap_outer_model=False,
        )
        for call in calls.values():
            call.assert_called_once()
            assert call.call_args.args[0] is model
            call.reset_mock()


class OneAxis:
    """A mesh that knows its axes by their plain names, and says in its own way what it lacks."""

    def __init__(self, error: type[Exception], **sizes: int) -> None:
        self.error = error
        self.axes = {name: SimpleNamespace(size=lambda n=n: n) for name, n in sizes.items()}

    def __getitem__(self, name: Any) -> Any:
        if name not in self.axes:
            raise self.error(name)
        return self.axes[name]


@pytest.mark.parametrize("error", [KeyError, AssertionError, NotImplementedError])
def test_a_mesh_may_lack_what_is_not_asked_of_it(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    calls = {name: Mock() for name in STEPS}
    for name, call in calls.items():
        monkeypatch.setattr(parallelizer, name, call)
    world, experts = OneAxis(error, dp=2), OneAxis(error, ep=2)
    options: dict[str, Any] = {"dp_axis_names": ["dp"], "ep_axis_name": "ep"}
    parallelizer.parallelize_model(make_model(), world, experts, **options)
    assert calls["apply_ep"].call_args.args[1] is experts["ep"]
    assert calls["apply_fsdp"].call_args.args[1] is world["dp"]
    assert calls["apply_fsdp"].call_args.kwargs["ep_shard_enabled"] is False
    with pytest.raises(error, match="cp"):
        parallelizer.parallelize_model(make_model(), world, experts, **options, cp_axis_name="cp")


def test_names_of_the_parallelizer_are_looked_up_when_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fakes = {
        name: Mock(name=name)
        for name in (
            "Shard",
            "distribute_tensor",
            "distribute_module",
            "parallelize_module",
            "get_text_module",
            "dtype_from_str",
            "logger",
            "fully_shard",
            "MixedPrecisionPolicy",
        )
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(parallelizer, name, fake)
    monkeypatch.setattr(parallelizer, "MoE", StandInMoE)
    assert parallelizer._moe_shard_placement(torch.empty(2, 2)) is fakes["Shard"].return_value
    fakes["Shard"].assert_called_once_with(1)

    module, mesh = nn.Linear(2, 2).requires_grad_(False), Mock(ndim=1)
    style = parallelizer.ExpertParallel()
    assert style._apply(module, mesh) is fakes["distribute_module"].return_value
    fakes["distribute_module"].assert_called_once_with(module, mesh, style._partition_fn)
    shard = torch.zeros(1, 2)
    fakes["distribute_tensor"].return_value = shard
    weight, module.init_token_dispatcher = module.weight, Mock()
    style._partition_fn("experts", module, mesh)
    assert fakes["distribute_tensor"].call_args_list[0].args[0] is weight
    for call in fakes["distribute_tensor"].call_args_list:
        assert call.args[1:] == (mesh, [fakes["Shard"].return_value])
    assert module.weight.data_ptr() == shard.data_ptr()
    assert not module.weight.requires_grad
    module.init_token_dispatcher.assert_called_once_with(ep_mesh=mesh)

    model = make_model()
    fakes["get_text_module"].return_value = model.model
    parallelizer.apply_ep(model, Mock(size=lambda: 2))
    [call] = fakes["parallelize_module"].call_args_list
    assert call.kwargs["module"] is list(model.model.layers.children())[1].mlp.experts
    assert isinstance(call.kwargs["parallelize_plan"], parallelizer.ExpertParallel)
    fakes["get_text_module"].assert_called_with(model.model)
    fakes["dtype_from_str"].return_value = torch.float32
    policy = fakes["MixedPrecisionPolicy"]
    parallelizer.apply_fsdp(model, "fsdp", False, False, lm_head_precision="wide")
    fakes["dtype_from_str"].assert_called_once_with("wide", default=None)
    wide = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    policy.assert_any_call(**wide, output_dtype=torch.float32)
    assert fakes["fully_shard"].call_args.args == (model,)

    block = SimpleNamespace(self_attn=SimpleNamespace(attn_module=nn.Identity()))
    model.model.layers = Children(block)
    parallelizer.apply_cp(model, "cp")
    fakes["logger"].warning.assert_called_once()
    message = fakes["logger"].warning.call_args.args[0]
    assert "block 0, of type full_attention with Identity, has nothing" in message
    fakes["logger"].reset_mock()
    block.layer_type, block.self_attn = "hyena", None
    parallelizer.apply_cp(model, "cp")
    assert "of type hyena, has nothing" in fakes["logger"].warning.call_args.args[0]


# The mixin and the patched backward


def say(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Everything is a ``kind``, and nothing is anything else."""
    monkeypatch.setattr(
        fsdp_mixin, "isinstance", lambda value, cls: cls.__name__ == kind, raising=False
    )


def test_the_units_of_a_model_that_has_every_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "FSDPModule")
    block, mtp_block, model = Mock(), Mock(), Mock()
    model.model.layers.named_children.return_value = [("0", block)]
    model.mtp.layers.children.return_value = [mtp_block]
    assert list(fsdp_mixin._iter_fsdp_modules(model)) == [
        model,
        model.model,
        model.model.embed_tokens,
        model.lm_head,
        model.audio_tower,
        model.visual,
        block.mlp.experts,
        block.moe.experts,
        mtp_block,
        mtp_block.mlp.experts,
        mtp_block.moe.experts,
    ]
    model.model, model.mtp, model.layers = None, None, None
    units = [model, model.embed_tokens, model.lm_head, model.audio_tower, model.visual]
    assert list(fsdp_mixin._iter_fsdp_modules(model)) == units


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fakes = {
        "stage_backward": Mock(return_value="whole"),
        "stage_backward_input": Mock(return_value=("inputs", ["groups"])),
        "stage_backward_weight": Mock(return_value="weights"),
        "fully_shard": Mock(),
    }
    fakes["fully_shard"].state.return_value._state_ctx.all_states = []
    for name, fake in fakes.items():
        monkeypatch.setattr(fsdp_mixin, name, fake)
    return fakes


@pytest.mark.parametrize("kind", [FSDPModule, DistributedDataParallel, nn.Module, None])
@pytest.mark.parametrize("mock", [Mock, MagicMock])
def test_a_stage_may_be_a_stand_in(backwards: dict[str, Any], mock: Any, kind: Any) -> None:
    stage = mock()
    stage.submod = mock(spec=kind) if kind is not None else mock()
    stage.submod.parameters, stage.submod.reducer = mock(return_value="parameters"), Mock()
    kwargs = {
        "stage_output": (torch.ones(1),),
        "output_grads": None,
        "input_values": ["x"],
        "param_groups": ["groups"],
    }
    if kind is DistributedDataParallel and mock is Mock:
        stage.submod.no_sync = MagicMock()
    for last in (False, True):
        expected = {
            "full": ("whole", None),
            "input": ("inputs", ["groups"]),
            "weight": ("weights", None),
        }
        for part, result in expected.items():
            backward = fsdp_mixin.patched_backward_maybe_with_nosync
            assert backward(stage, part, kwargs, last_backward=last) == result
    final = backwards["fully_shard"].state.return_value._root_post_backward_final_callback
    assert final.call_count == (3 if kind is FSDPModule else 0)
    assert stage.submod.reducer.prepare_for_backward.call_count == (
        3 if kind is DistributedDataParallel else 0
    )


def test_units_of_another_kind_are_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only says it is a unit has no state of one."""

    class Unit(nn.Module):
        set_is_last_backward = set_reshard_after_backward = Mock()
        set_requires_gradient_sync = Mock()

    class Model(nn.Module, fsdp_mixin.MoEFSDPSyncMixin):
        backend = SimpleNamespace(enable_fsdp_optimizations=True)

    model, own = Model(), builtins.isinstance
    model.lm_head = Unit()
    monkeypatch.setattr(
        builtins, "isinstance", lambda value, cls: own(value, Unit if cls is FSDPModule else cls)
    )
    model.prepare_for_grad_accumulation()
    model.prepare_for_final_backward()
    monkeypatch.undo()
    told = Unit.set_requires_gradient_sync.call_args_list
    assert [call.args for call in told] == [(False,), (True,)]


def test_checkpointed_blocks_are_asked_of_single_classes(
    monkeypatch: pytest.MonkeyPatch, backwards: dict[str, Any]
) -> None:
    def single(value: Any, cls: type) -> bool:
        assert isinstance(cls, type)
        return builtins.isinstance(value, cls)

    monkeypatch.setattr(fsdp_mixin, "isinstance", single, raising=False)
    stage = SimpleNamespace(submod=checkpoint_wrapper(nn.Linear(2, 2)))
    y = torch.ones(1)
    for output, grads in (((y, y), [None, None]), ([y], [None]), (y, None)):
        kwargs = {"stage_output": output, "output_grads": None, "input_values": ["x"]}
        result = fsdp_mixin.patched_backward_maybe_with_nosync(stage, "input", kwargs)
        assert result == ("whole", [])
        backwards["stage_backward"].assert_called_with(output, grads, ["x"])


def test_names_of_the_mixin_are_looked_up_when_it_runs(
    monkeypatch: pytest.MonkeyPatch, backwards: dict[str, Any]
) -> None:
    say(monkeypatch, "DistributedDataParallel")
    monkeypatch.setattr(data_parallel, "_find_tensors", lambda output: ["tensors of", output])
    stage, kwargs = Mock(), {"stage_output": "y", "output_grads": "dy", "input_values": "x"}
    fsdp_mixin.patched_backward_maybe_with_nosync(stage, "full", kwargs, last_backward=True)
    stage.submod.reducer.prepare_for_backward.assert_called_once_with(["tensors of", "y"])

    say(monkeypatch, "MoEFSDPSyncMixin")
    run, optim_step = Mock(), Mock(return_value=False)
    monkeypatch.setattr(fsdp_mixin, "_run_post_backward_for_moe_module", run)
    monkeypatch.setattr(fsdp_mixin, "get_is_optim_step", optim_step)
    stage.submod.model.layers, stage.submod.mtp = None, None
    for steps in (False, True):
        optim_step.return_value = steps
        run.assert_not_called()
        fsdp_mixin.patched_backward_maybe_with_nosync(stage, "full", kwargs, last_backward=True)
    run.assert_called_once_with(stage.submod)


def test_the_units_to_reduce_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, callback = Mock(), Mock()
    monkeypatch.setattr(fsdp_mixin, "_iter_fsdp_modules", Mock(return_value=iter([unit])))
    monkeypatch.setattr(fsdp_mixin, "_run_post_backward_hooks", Mock(return_value=callback))
    fsdp_mixin._run_post_backward_for_moe_module(object())
    unit.set_requires_gradient_sync.assert_called_once_with(True)
    callback.assert_called_once_with()
