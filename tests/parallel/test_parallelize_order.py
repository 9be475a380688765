"""Which steps parallelize_model takes, in which order and with what, seen through stand-ins."""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import MagicMock

import pytest

from moe_parallel import parallelizer
from moe_parallel.mesh import MeshError
from tests.parallel.stand_ins import StandInMesh, StandInMoE, make_model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    for name in ("apply_cp", "apply_ep", "apply_ac", "apply_fsdp"):

        def note(*args: Any, _name: str = name, **options: Any) -> None:
            axes = tuple(arg.axis for arg in args[1:])
            options = {k: getattr(v, "axis", v) for k, v in options.items()}
            made.append((_name, *axes, options))

        monkeypatch.setattr(parallelizer, name, note)
    return made


def test_parallelize_model_applies_in_order(steps: list[Any]) -> None:
    world = StandInMesh({("dp",): 2, "cp": 2, "tp": 1})
    experts = StandInMesh({"ep": 4, ("ep_shard",): 2})
    parallelizer.parallelize_model(
        make_model(),
        world,
        experts,
        dp_axis_names=("dp",),
        cp_axis_name="cp",
        tp_axis_name="tp",
        ep_axis_name="ep",
        ep_shard_axis_names=("ep_shard",),
        activation_checkpointing="selective",
        lm_head_precision="float32",
        mp_policy="policy",
    )
    assert steps == [
        ("apply_cp", "cp", {}),
        ("apply_ep", "ep", {"moe_mesh": None}),  # the whole mesh: no axis
        ("apply_ac", {"ignore_router": True, "selective": True}),
        (
            "apply_fsdp",
            ("dp",),
            {
                "ep_enabled": True,
                "ep_shard_enabled": True,
                "ep_shard_mesh": ("ep_shard",),
                "mp_policy": "policy",
                "reshard_after_forward": False,
                "lm_head_precision": "float32",
                "wrap_outer_model": True,
            },
        ),
    ]


def test_parallelize_model_applies_what_has_ranks(steps: list[Any]) -> None:
    world = StandInMesh({("dp",): 1, "cp": 1})
    parallelizer.parallelize_model(
        make_model(),
        world,
        None,
        dp_axis_names=("dp",),
        cp_axis_name="cp",
        ep_axis_name="ep",
        ep_shard_axis_names=("ep_shard",),
    )
    assert steps == []
    world = StandInMesh({("dp",): 2})
    options: dict[str, Any] = {"dp_axis_names": ("dp",), "ep_shard_axis_names": ("ep_shard",)}
    parallelizer.parallelize_model(make_model(), world, None, ep_axis_name="ep", **options)
    [(name, _, called)] = steps
    assert name == "apply_fsdp"
    assert not called["ep_enabled"]
    assert not called["ep_shard_enabled"]
    assert called["ep_shard_mesh"] is None
    steps.clear()
    experts = StandInMesh({"ep": 2})
    parallelizer.parallelize_model(
        make_model(), world, experts, dp_axis_names=None, ep_axis_name="ep"
    )
    assert [step[0] for step in steps] == ["apply_ep"]
    steps.clear()
    experts = StandInMesh({"ep": 2, ("ep_shard",): 1})
    parallelizer.parallelize_model(make_model(), world, experts, ep_axis_name="ep", **options)
    assert [step[0] for step in steps] == ["apply_ep", "apply_fsdp"]
    assert steps[1][2]["ep_enabled"]
    assert not steps[1][2]["ep_shard_enabled"]
    steps.clear()
    experts = StandInMesh({"ep": 1, ("ep_shard",): 2})
    parallelizer.parallelize_model(make_model(), world, experts, ep_axis_name="ep", **options)
    assert [step[0] for step in steps] == ["apply_fsdp"]
    assert not steps[0][2]["ep_enabled"]


def test_parallelize_model_takes_meshes_and_models_of_other_making(
    steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that answers every name alike, and one that looks tuples of names up."""
    axis = MagicMock(axis="all")
    axis.size.return_value = 2
    experts = MagicMock()
    experts.__getitem__.return_value = axis
    options: dict[str, Any] = {"dp_axis_names": None, "ep_axis_name": "ep"}
    parallelize_model = parallelizer.parallelize_model
    parallelize_model(make_model(), StandInMesh({}), experts, **options)
    assert [step[0] for step in steps] == ["apply_ep"]
    steps.clear()
    options |= {"dp_axis_names": ["dp"], "ep_shard_axis_names": ["ep_shard"]}
    world, experts = StandInMesh({("dp",): 2}), StandInMesh({"ep": 2, ("ep_shard",): 1})
    parallelize_model(make_model(layers=None), world, experts, **options)
    assert [step[0] for step in steps] == ["apply_ep", "apply_fsdp"]
    steps.clear()
    monkeypatch.setattr(parallelizer, "MoE", StandInMoE)
    unsized = options | {"activation_checkpointing": True}
    parallelize_model(make_model(), world, experts, **unsized)  # apply_ac may find its sizes
    assert [step[0] for step in steps] == ["apply_ep", "apply_ac", "apply_fsdp"]
    steps.clear()
    model = make_model()
    model.model.layers = [object()]  # blocks that only what is replaced here would look at
    parallelize_model(model, world, experts, **options)
    assert [step[0] for step in steps] == ["apply_ep", "apply_fsdp"]


def test_a_step_in_the_place_of_its_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it calls itself what it replaces."""
    called: list[Any] = []

    @functools.wraps(parallelizer.apply_ep)
    def spy(*args: Any, **options: Any) -> None:
        called.append((args[1].axis, options))

    monkeypatch.setattr(parallelizer, "apply_ep", spy)
    experts = StandInMesh({"ep": 2})
    parallelizer.parallelize_model(
        make_model(), StandInMesh({}), experts, dp_axis_names=None, ep_axis_name="ep"
    )
    assert called == [("ep", {"moe_mesh": experts})]


def test_parallelize_model_refuses(steps: list[Any]) -> None:
    model, experts = make_model(), StandInMesh({"ep": 3, "ep_shard": 2})
    with pytest.raises(AssertionError, match="tensor parallelism is not supported; got size 2"):
        parallelizer.parallelize_model(
            model, StandInMesh({"tp": 2}), None, dp_axis_names=None, tp_axis_name="tp"
        )
    options: dict[str, Any] = {"dp_axis_names": None, "ep_axis_name": "ep"}
    with pytest.raises(AssertionError, match=r"n_routed_experts 8 must be a multiple .* size 3"):
        parallelizer.parallelize_model(model, StandInMesh({}), experts, **options)
    experts.sizes["ep"] = 4
    with pytest.raises(MeshError, match=r"Pass ep_shard_axis_names=\('ep_shard',\)"):
        parallelizer.parallelize_model(model, StandInMesh({}), experts, **options)
    model.model.moe_config = None
    with pytest.raises(AttributeError, match="no moe_config"):
        parallelizer.parallelize_model(model, StandInMesh({}), experts, **options)
    assert steps == []
