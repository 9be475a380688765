"""What the parallelizer decides, seen through stand-ins for torch and for models."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe_parallel import parallelizer
from moe_parallel.mesh import MeshError
from tests.parallel.stand_ins import Container, StandInMoE, make_model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What ``fully_shard`` is asked for."""
    made: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(parallelizer, "MoE", StandInMoE)
    monkeypatch.setattr(
        parallelizer, "fully_shard", lambda module, **options: made.append((module, options))
    )
    monkeypatch.setattr(
        parallelizer, "MixedPrecisionPolicy", lambda **fields: SimpleNamespace(**fields)
    )
    return made


def test_apply_fsdp_shards_bottom_up(
    calls: list[tuple[Any, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unused: list[Any] = []
    monkeypatch.setattr(parallelizer, "reduce_unused_parameters", unused.append)
    mtp_block = SimpleNamespace(moe=None, mlp=StandInMoE())
    tower = nn.Linear(2, 2)
    model = make_model(mtp=SimpleNamespace(layers=Container(a=mtp_block)), visual=tower)
    dense, sparse = model.model.layers.children()
    parallelizer.apply_fsdp(
        model,
        "fsdp",
        True,
        True,
        ep_shard_mesh="shard",
        offload_policy="offload",
        reshard_after_forward=True,
    )
    assert [module for module, _ in calls] == [
        dense,
        sparse.mlp.experts,
        sparse,
        mtp_block.mlp.experts,
        mtp_block,
        model.model.embed_tokens,
        model.lm_head,
        tower,
        model.model,
        model,
    ]
    assert unused == [mtp_block, tower]
    experts = calls[1][1]
    assert experts["mesh"] == "shard"
    assert experts["shard_placement_fn"] is parallelizer._moe_shard_placement
    assert experts["offload_policy"] == "offload"
    assert experts["reshard_after_forward"] is True
    assert calls[3][1]["reshard_after_forward"] is False  # of multi-token prediction
    assert calls[0][1]["ignored_params"] is None
    assert calls[2][1]["ignored_params"] == {"up", "down"}
    for module, options in calls:
        if "shard_placement_fn" not in options:
            assert options["mesh"] == "fsdp"
            assert options["reshard_after_forward"] is True
            assert options["offload_policy"] == "offload"
        policy = options["mp_policy"]
        assert policy.param_dtype is policy.output_dtype is torch.bfloat16
        assert policy.reduce_dtype is torch.float32
        assert policy.cast_forward_inputs is True
        assert ("ignored_params" in options) == (module in (dense, sparse, mtp_block))


def test_a_router_bias_is_replicated_before_its_block_is_sharded(
    calls: list[tuple[Any, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    dense, sparse = model.model.layers.children()
    sparse.mlp.gate = object()
    monkeypatch.setattr(
        parallelizer,
        "replicate_correction_bias",
        lambda gate, mesh: calls.append((gate, {"mesh": mesh})),
    )
    parallelizer.apply_fsdp(model, "fsdp", False, False)
    assert [module for module, _ in calls][:3] == [dense, sparse.mlp.gate, sparse]
    assert calls[1][1] == {"mesh": "fsdp"}


def test_apply_fsdp_without_experts_of_their_own(calls: list[tuple[Any, dict[str, Any]]]) -> None:
    model = make_model()
    parallelizer.apply_fsdp(model, "fsdp", False, False, wrap_outer_model=False)
    dense, sparse = model.model.layers.children()
    inner = model.model
    assert [m for m, _ in calls] == [dense, sparse, inner.embed_tokens, model.lm_head, inner]
    assert calls[1][1]["ignored_params"] is None
    calls.clear()
    parallelizer.apply_fsdp(model, "fsdp", True, False)  # experts that EP alone has
    assert calls[1][1]["ignored_params"] == {"up", "down"}
    calls.clear()
    parallelizer.apply_fsdp(inner, "fsdp", False, False)  # one object is wrapped once
    assert [m for m, _ in calls].count(inner) == 1


def test_what_no_unit_owns_is_named(
    calls: list[tuple[Any, dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Linear(2, 2)])
    model.lm_head, model.visual, model.frozen, model.projector = (nn.Linear(2, 2) for _ in "1234")
    model.frozen.requires_grad_(False)
    parallelizer.apply_fsdp(model, "fsdp", False, False)
    assert not caplog.records
    parallelizer.apply_fsdp(model, "fsdp", False, False, wrap_outer_model=False)
    [record] = caplog.records
    assert "no unit owns projector.weight, projector.bias: nothing reduces" in record.message


def test_float32_head(calls: list[tuple[Any, dict[str, Any]]]) -> None:
    model = make_model()
    parallelizer.apply_fsdp(model, "fsdp", False, False, lm_head_precision="float32")
    policies = {id(module): options["mp_policy"] for module, options in calls}
    head, inner, outer = (policies[id(m)] for m in (model.lm_head, model.model, model))
    assert head.param_dtype is head.reduce_dtype is head.output_dtype is torch.float32
    assert inner.output_dtype is torch.bfloat16
    assert (outer.param_dtype, outer.output_dtype) == (torch.bfloat16, torch.float32)
    given = SimpleNamespace(
        param_dtype="p", reduce_dtype="r", output_dtype="o", cast_forward_inputs="c"
    )
    parallelizer.apply_fsdp(model, "fsdp", False, False, None, given, lm_head_precision="Float")
    module, options = calls[-1]
    assert module is model
    assert options["mp_policy"] == SimpleNamespace(**vars(given) | {"output_dtype": torch.float32})


@pytest.mark.parametrize("precision", ["bfloat16", torch.float64])
def test_a_head_of_another_precision_has_the_policy_of_all(
    calls: list[tuple[Any, dict[str, Any]]], precision: Any
) -> None:
    parallelizer.apply_fsdp(make_model(), "fsdp", False, False, lm_head_precision=precision)
    policies = [options["mp_policy"] for _, options in calls]
    assert len(policies) == 6
    assert all(policy is policies[0] for policy in policies)


def test_float32_head_of_the_inner_model(calls: list[tuple[Any, dict[str, Any]]]) -> None:
    """It is the one that counts, and both roots let its logits through."""
    model = make_model()
    model.model.lm_head = SimpleNamespace(weight=object())
    parallelizer.apply_fsdp(model, "fsdp", False, False, lm_head_precision=torch.float32)
    head, inner, outer = (model.model.lm_head, model.model, model)
    assert [module for module, _ in calls][-3:] == [head, inner, outer]
    for _, options in calls[-3:]:
        assert options["mp_policy"].output_dtype is torch.float32


def test_ends_may_count_as_false(calls: list[tuple[Any, dict[str, Any]]]) -> None:
    class Empty(SimpleNamespace):
        def __len__(self) -> int:
            return 0

    model = make_model()
    model.lm_head, model.model.embed_tokens = Empty(weight=object()), Empty(weight=object())
    parallelizer.apply_fsdp(model, "fsdp", False, False)
    wrapped = [module for module, _ in calls]
    assert any(module is model.lm_head for module in wrapped)
    assert any(module is model.model.embed_tokens for module in wrapped)


def test_tied_embeddings(
    calls: list[tuple[Any, dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = make_model()
    model.lm_head = SimpleNamespace(weight=None)
    model.config = SimpleNamespace(tie_word_embeddings=True)
    model.get_output_embeddings = lambda: model.lm_head
    model.get_input_embeddings = lambda: model.model.embed_tokens
    model.lm_head.weight = object()  # moving the model broke the tie
    parallelizer.apply_fsdp(model, "fsdp", False, False, lm_head_precision=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wrapped = [module for module, _ in calls]
    assert wrapped[-1] is model
    for module in (model.model, model.lm_head, model.model.embed_tokens):
        assert module not in wrapped
    assert "lm_head_precision torch.float32 is not applied" in caplog.text
    assert "outer root owns" in caplog.text
    calls.clear()
    with pytest.raises(MeshError, match="Use wrap_outer_model=True, or untie them"):
        parallelizer.apply_fsdp(model, "fsdp", False, False, wrap_outer_model=False)
    assert calls == []


def test_frozen_towers_are_left_to_the_root(
    calls: list[tuple[Any, dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tower = nn.Linear(2, 2).requires_grad_(False)
    parallelizer.apply_fsdp(make_model(audio_tower=tower, visual=tower), "fsdp", False, False)
    assert tower not in [module for module, _ in calls]
    for name in ("audio", "visual"):
        assert ("root", logging.INFO, f"Skipping FSDP wrap for frozen {name} tower") in (
            caplog.record_tuples
        )


def test_fp32_holders_are_units(calls: list[tuple[Any, dict[str, Any]]]) -> None:
    block = nn.Sequential()
    block.mixer = nn.Module()
    block.mixer.a_fp32_params = nn.RMSNorm(3)
    block.empty_fp32_params = nn.Sequential(nn.RMSNorm(3))
    owned = parallelizer._shard_fp32_param_holders(block, "fsdp", True, "offload")
    assert owned == {block.mixer.a_fp32_params.weight}
    [(holder, options)] = calls
    assert holder is block.mixer.a_fp32_params
    policy = options["mp_policy"]
    assert policy.param_dtype is policy.reduce_dtype is policy.output_dtype is torch.float32
    assert policy.cast_forward_inputs is False
    assert (options["mesh"], options["offload_policy"]) == ("fsdp", "offload")
    assert options["reshard_after_forward"] is True
    assert parallelizer._shard_fp32_param_holders(object(), "fsdp", True, None) == set()


def test_what_holders_owned_before_is_not_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def replace_parameters(module: nn.Module, **options: Any) -> None:
        made.append((module, options))
        if isinstance(module, nn.RMSNorm):
            module.weight = nn.Parameter(module.weight.detach().clone())

    monkeypatch.setattr(parallelizer, "fully_shard", replace_parameters)
    block = nn.Module()
    block.a_fp32_params = nn.RMSNorm(3)
    before = block.a_fp32_params.weight
    model = make_model()
    model.model.layers = Container(a=block)
    parallelizer.apply_fsdp(model, "fsdp", False, False)
    assert made[1][0] is block
    assert made[1][1]["ignored_params"] == {before}


def test_deepseek_v4_keeps_float32_modules(
    calls: list[tuple[Any, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sharded(nn.Module):
        """A unit already."""

    monkeypatch.setattr(parallelizer, "FSDPModule", Sharded)
    block = nn.Module()
    block.low = nn.Linear(2, 2, dtype=torch.bfloat16)
    block.norms = nn.ModuleList([nn.RMSNorm(2)])
    block.named = nn.Linear(2, 2, dtype=torch.bfloat16)
    model = make_model(config=SimpleNamespace(model_type="deepseek_v4"))
    block.strict = nn.Linear(2, 2, dtype=torch.bfloat16)
    model._keep_in_fp32_modules = ["named"]
    model.model._keep_in_fp32_modules_strict = {"strict"}
    model.model.layers = Container(a=block, b=Sharded())
    parallelizer.apply_fsdp(model, "fsdp", False, False)
    assert not any(isinstance(m, Sharded) for m, _ in calls)
    assert [m for m, _ in calls][:4] == [block.norms[0], block.named, block.strict, block]
    assert calls[0][1]["mp_policy"].param_dtype is torch.float32
    assert calls[3][1]["mp_policy"].param_dtype is torch.bfloat16


def test_small_predicates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallelizer._is_selective_ac("Selective")
    assert not any(map(parallelizer._is_selective_ac, (True, None, "full", "selective ac")))
    v4 = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(model_type="deepseek_v4")))
    assert parallelizer._is_deepseek_v4_model(v4)
    assert not parallelizer._is_deepseek_v4_model(object())
    assert parallelizer._moe_shard_placement(torch.empty(3)).dim == 0
    assert parallelizer._moe_shard_placement(torch.empty(3, 2)).dim == 1
    assert parallelizer._moe_shard_placement(torch.empty(3, 2, 2)).dim == 1
    a = SimpleNamespace(weight=torch.ones(2))
    assert parallelizer._module_weights_are_tied(a, SimpleNamespace(weight=a.weight))
    assert not parallelizer._module_weights_are_tied(a, SimpleNamespace(weight=torch.ones(2)))
    assert not parallelizer._module_weights_are_tied(a, None)
    nothing = SimpleNamespace(weight=None)
    assert not parallelizer._module_weights_are_tied(nothing, nothing)
    made: list[object] = []
    monkeypatch.setattr(parallelizer, "_CP_STREAM", None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(object()) or made[-1])
    assert parallelizer._get_cp_stream() is parallelizer._get_cp_stream()
    assert len(made) == 1


def test_which_layer_and_which_configuration_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallelizer, "MoE", StandInMoE)
    block = SimpleNamespace(moe=StandInMoE(), mlp=StandInMoE())
    assert parallelizer._get_moe_module(block) is block.moe
    block.moe = SimpleNamespace()  # dense
    assert parallelizer._get_moe_module(block) is block.mlp
    text, inner = nn.Module(), nn.Module()
    inner.language_model = text
    model = SimpleNamespace(model=inner, moe_config="outer")
    for owner, name in ((None, "outer"), (text, "text"), (inner, "inner")):
        if owner is not None:
            owner.moe_config = name
        assert parallelizer._get_model_moe_config(model) == name


def test_expert_parallelism_needs_a_mesh_of_one_axis_and_several_ranks() -> None:
    mesh: Any = SimpleNamespace(ndim=2, size=lambda: 1)
    with pytest.raises(AssertionError, match="ExpertParallel needs a 1-D mesh"):
        parallelizer.ExpertParallel()._partition_fn("", nn.Linear(2, 2), mesh)
    with pytest.raises(AssertionError, match="ep_mesh must have more than one rank; got 1"):
        parallelizer.apply_ep(make_model(), mesh)
    mesh.ndim = 1
    parallelizer.ExpertParallel()._partition_fn("", nn.Module(), mesh)  # without a dispatcher


# Context parallelism


def test_apply_cp(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []
    mesh = SimpleNamespace(get_group=lambda: "group")
    monkeypatch.setattr(parallelizer, "MoE", StandInMoE)
    monkeypatch.setattr(parallelizer, "_get_cp_stream", lambda: "stream")
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [group, 1])

    def attention() -> Any:
        def tell(*args: Any, **options: Any) -> None:
            told.append((*args, options))

        return SimpleNamespace(attn_module=SimpleNamespace(set_context_parallel_group=tell))

    model = make_model()
    own = SimpleNamespace(setup_cp_attention=lambda mesh: told.append(mesh))
    mixer = SimpleNamespace(setup_context_parallel=lambda mesh: told.append(mesh))
    linear = SimpleNamespace(_cp_mesh=None)
    moe = StandInMoE()
    blocks = {
        "full": SimpleNamespace(self_attn=attention(), mlp=moe),
        "sliding": SimpleNamespace(self_attn=attention(), attention_type="sliding_attention"),
        "own": SimpleNamespace(self_attn=own, layer_type="full_attention"),
        "none": SimpleNamespace(self_attn=object()),
        "mamba": SimpleNamespace(mixer=mixer, layer_type="mamba"),
        "linear": SimpleNamespace(linear_attn=linear, layer_type="linear_attention"),
        "unknown": SimpleNamespace(layer_type="hyena"),
    }
    model.model.layers = Container(**blocks)
    parallelizer.apply_cp(model, mesh)
    call = ("group", ["group", 1], "stream")
    assert told == [
        (*call, {"cp_comm_type": "p2p"}),
        (*call, {"cp_comm_type": "all_gather"}),
        mesh,
        mesh,
    ]
    assert linear._cp_mesh is mesh
    assert moe.cp_mesh is mesh
    assert model._cp_enabled
    assert model.model._cp_enabled
    assert [("full_attention" in r.message, "hyena" in r.message) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]
    told.clear()
    model.model.layers = Container(own=SimpleNamespace(self_attn=own))
    block = SimpleNamespace(self_attn=attention(), layer_type="sliding_attention")
    block.attention_type = "full_attention"
    model.mtp = SimpleNamespace(layers=Container(block=block))
    parallelizer.apply_cp(model, mesh, cp_comm_type="a2a")
    assert told == [mesh, (*call, {"cp_comm_type": "all_gather"})]
    told.clear()
    del model.mtp
    groupless: Any = object()  # the group is not asked for where nothing needs it
    parallelizer.apply_cp(model, groupless)
    assert told == [groupless]
