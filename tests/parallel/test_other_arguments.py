"""A rank with another model, other options or other sizes: one error on all, before they wait."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from moe_parallel import BackendConfig
from moe_parallel.mesh import MeshError, build_meshes, parallel_axis_names
from moe_parallel.parallelizer import parallelize_model
from tests.parallel.ranks import run_ranks
from tests.parallel.test_refusals import state
from tests.parallel.tiny_lm import ModelOptions, TinyLM

EXPERTS = "model.layers.0.mlp.experts.gate_and_up_projs"
ODD = 3  # the rank that differs


def moe(**changes: Any) -> TinyLM:
    return TinyLM(ModelOptions(moe=changes))


def shorter() -> TinyLM:
    model = TinyLM()
    del model.model.layers["2"]
    return model


def other_order() -> TinyLM:
    model = TinyLM()
    layers = model.model.layers
    model.model.layers = nn.ModuleDict({name: layers[name] for name in reversed([*layers])})
    return model


def by_process_group() -> TinyLM:
    model = TinyLM()
    for layer in model.moes():
        layer.experts.backend = BackendConfig(dispatcher="process_group", dispatcher_timeout=9.0)
    return model


# What the odd rank has, and what is said of it and the first of those that share its parameters.
MODELS: list[tuple[Any, str]] = [
    (
        lambda: moe(n_routed_experts=8),
        r"gate.weight is torch.float32 \[4, 16\], trained on rank {}, and torch.float32 \[8, 16\], "
        "trained on rank 3",
    ),
    (
        lambda: moe(expert_activation="geglu"),
        "block 0's expert_activation is 'swiglu' on rank {}, and 'geglu' on rank 3",
    ),
    (lambda: moe().double(), "embed_tokens.weight is torch.float32 .*, and torch.float64 "),
    (lambda: TinyLM(ModelOptions(frozen_experts=True)), f"{EXPERTS} is .*trained on .* frozen on "),
    (shorter, "model.layers.2.norms.0.weight is .* on rank {}, and missing on rank 3"),
    (other_order, "the parameters of ranks {} and 3 are not in the same order"),
    (by_process_group, "block 0's dispatcher is 'auto' on rank {}, and 'process_group' on rank 3"),
]
OPTIONS: list[tuple[str, Any, str]] = [
    ("reshard_after_forward", True, "is False on rank {}, and True on rank 3"),
    ("wrap_outer_model", False, "is True on rank {}, and False on rank 3"),
    ("activation_checkpointing", "selective", "is False on rank {}, and 'selective' on rank 3"),
    ("mp_policy", MixedPrecisionPolicy(), "is None on rank {}, and param_dtype=None, .* on rank 3"),
    ("lm_head_precision", "float32", "is None on rank {}, and 'float32' on rank 3"),
]


def _refused(rank: int, ranks: int, sizes: dict[str, int]) -> list[str]:
    meshes = build_meshes(**sizes)
    axes = parallel_axis_names(*meshes)
    tries: list[tuple[Any, dict[str, Any]]] = [(make, {}) for make, _ in MODELS]
    tries += [(TinyLM, {name: value}) for name, value, _ in OPTIONS]
    found = []
    for make, options in tries:
        model = make() if rank == ODD else TinyLM()
        before = state(model)
        with pytest.raises(MeshError) as caught:
            parallelize_model(model, *meshes, **axes, **(options if rank == ODD else {}))
        assert state(model) == before
        found.append(str(caught.value))
    waits = TinyLM()
    for layer in waits.moes():
        layer.experts.backend = BackendConfig(dispatcher_timeout=20.0 + rank)
    parallelize_model(waits, *meshes, **axes)  # that a rank may choose for itself
    return found


@pytest.mark.parametrize(
    "sizes", [{"ep": 2}, {"dp_replicate": 2}, {"pp": 2, "ep": 2}, {"cp": 2, "ep": 4}], ids=str
)
def test_another_model_or_other_options(sizes: dict[str, int]) -> None:
    first, *others = run_ranks(4, _refused, sizes)
    assert all(result == first for result in others)
    messages = [message for _, message in MODELS]
    messages += [f"options; {name} {message}" for name, _, message in OPTIONS]
    for line, message in zip(first, messages, strict=True):
        assert re.search(message.format(2 if "pp" in sizes else 0), line), line


def _framework(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    with pytest.raises(MeshError) as caught:
        parallelize_model(
            moe(route_scale=2.0 if rank == ODD else 1.0),
            mesh,
            None,
            dp_axis_names=mesh.mesh_dim_names,
        )
    return str(caught.value)


def test_every_rank_of_a_mesh_of_other_making_is_told() -> None:
    for line in run_ranks(4, _framework):
        assert re.search(r"route_scale is 1.0 on rank [12], and 2.0 on rank 3", line), line


def _sizes(rank: int, ranks: int) -> list[str]:
    found = []
    for own in ({"ep": 4}, {}, {"ep": 2, "cp": 2}, {"ep": 3}, {"ep": 2, "device_type": "cuda"}):
        with pytest.raises(MeshError) as caught:
            build_meshes(**(own if rank == ODD else {"ep": 2}))  # type: ignore[arg-type]
        found.append(str(caught.value))
    return found


def test_other_sizes_of_meshes() -> None:
    first, *others = run_ranks(4, _sizes)
    assert all(result == first for result in others)
    for line, message in zip(
        first,
        (
            "ep must be the same on all ranks; got 2 on rank 0 and 4 on rank 3",
            "ep must be the same on all ranks; got 2 on rank 0 and 1 on rank 3",
            "cp must be the same on all ranks; got 1 on rank 0 and 2 on rank 3",
            "ep must be the same on all ranks; got 2 on rank 0 and 3 on rank 3",
            "device_type must be the same on all ranks; got None on rank 0 and 'cuda' on rank 3",
        ),
        strict=True,
    ):
        assert message in line
