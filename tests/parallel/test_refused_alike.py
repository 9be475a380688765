"""What one rank is refused with, or calls wrongly, the others raise too, by each function alone."""

from __future__ import annotations

import logging
import pickle
import sys
from typing import Any, cast

import pytest
import torch

from moe_parallel import BackendConfig
from moe_parallel.mesh import MeshError, build_meshes, parallel_axis_names
from moe_parallel.parallelizer import apply_cp, apply_ep, apply_fsdp, parallelize_model
from tests.parallel import stand_in_deep_ep
from tests.parallel.ranks import run_ranks
from tests.parallel.test_dispatch import raised
from tests.parallel.test_refusals import Collectives, state
from tests.parallel.tiny_lm import ModelOptions, TinyLM


def _one_stage(rank: int, ranks: int) -> list[str]:
    """Stage 1 of each pipeline has a model that does not fit."""
    found = []
    world_mesh, _ = build_meshes(pp=2)
    dp_mesh = world_mesh["dp_shard"]

    def fsdp(model: TinyLM, **options: Any) -> None:
        apply_fsdp(model, dp_mesh, False, True, dp_mesh, **options)

    def refuse(kind: type[Exception], function: Any, model: TinyLM, **options: Any) -> None:
        model = model if rank >= 2 else TinyLM(ModelOptions(shared_attention=True))
        before = state(model)
        with pytest.raises(kind) as error:
            function(model, **options)
        assert error.type is kind
        assert state(model) == before
        found.append(error.value.args[0])

    refuse(MeshError, fsdp, TinyLM(ModelOptions(moe={"moe_inter_dim": 7})))
    refuse(MeshError, fsdp, TinyLM(ModelOptions(tied=True)), wrap_outer_model=False)
    refuse(KeyError, fsdp, TinyLM(), **({"lm_head_precision": "float99"} if rank >= 2 else {}))
    cp_mesh = build_meshes(pp=2, cp=2)[0]["cp"]
    unfit = TinyLM(ModelOptions(shared_attention=True))
    unfit.model.layers["0"].self_attn.attn_module.window = 3
    refuse(MeshError, lambda model: apply_cp(model, cp_mesh), unfit)
    fsdp(TinyLM())
    return found


def test_what_one_stage_is_refused_with_by_one_step_all_are() -> None:
    first, *others = run_ranks(4, _one_stage)
    assert all(other == first for other in others)
    assert all(line.endswith("(in pipeline stage 1)") for line in first)
    for line, part in zip(
        first,
        (
            "down_projs must be a multiple of the ep_shard size 2; got [4, 7, 16]",
            "Use wrap_outer_model=True, or untie them",
            "apply_fsdp: lm_head_precision: dtype must be one of",
            "'p2p' does not support a window; got 3",
        ),
        strict=True,
    ):
        assert part in line


def _transports(rank: int, ranks: int) -> list[str]:
    """Rank 1 has no DeepEP: of the other three, one exchanges tokens with it."""
    stand_in_deep_ep.install(2)
    if rank == 1:
        sys.modules["deep_ep"] = None  # type: ignore[assignment]
    meshes = build_meshes(ep=2)
    _, moe_mesh = meshes
    assert moe_mesh is not None
    pipeline = build_meshes(pp=2, ep=2)
    found = []
    for backend in (
        BackendConfig(dispatcher="deepep"),
        BackendConfig(dispatcher_capacity=8),
        BackendConfig(dispatcher="shared_memory", dispatcher_capacity=8),
    ):
        model = TinyLM()
        for moe in model.moes()[1:]:  # the first has what every rank has
            moe.experts.backend = backend
        before = state(model)
        functions = [
            lambda model: apply_ep(model, moe_mesh["ep"], moe_mesh=moe_mesh),
            lambda model: parallelize_model(model, *meshes, **parallel_axis_names(*meshes)),
            lambda model: parallelize_model(model, *pipeline, **parallel_axis_names(*pipeline)),
        ]
        for function, reductions in zip(functions, (0, 1, 1), strict=True):
            with Collectives() as communication:
                kind, message = raised(function, model)
            assert state(model) == before
            # of what model it is, by parallelize_model; none of the weights
            assert communication.counts["c10d.allreduce_.default"] == reductions
            found.append(f"{kind} {message}")
    fits = TinyLM()
    for moe in fits.moes():
        moe.experts.backend = BackendConfig(dispatcher="shared_memory")
    parallelize_model(fits, *meshes, **parallel_axis_names(*meshes))
    assert all(moe.experts.token_dispatcher.transport == "shared_memory" for moe in fits.moes())
    return found


def test_a_transport_that_a_rank_lacks_is_refused_by_all() -> None:
    first, *others = run_ranks(4, _transports)
    assert all(other == first for other in others)
    stage = " (in pipeline stage 0)"
    for line, (start, part, end) in zip(
        first,
        (
            *(
                ("ImportError", "needs the package deep_ep", f"(on rank 1){more}")
                for more in ("", "", stage)
            ),
            *(
                ("ValueError", "a capacity, need max_tokens", f"got None{more}")
                for more in ("", "", stage)
            ),
            *(
                ("ValueError", "a capacity, need max_tokens", f"(on rank 0){more}")
                for more in ("", "", stage)
            ),
        ),
        strict=True,
    ):
        assert line.startswith(start), line
        assert part in line
        assert line.endswith(end), line


def _experts(rank: int, ranks: int) -> tuple[str, str]:
    _, moe_mesh = build_meshes(ep=2)
    assert moe_mesh is not None
    model = TinyLM()
    apply_ep(model, moe_mesh["ep"])
    experts = model.moes()[0].experts
    x, mask = torch.randn(3, 16), torch.ones(3, dtype=torch.bool)
    weights, ids = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    outcome = raised(experts, x, mask.long() if rank else mask, weights, ids)
    experts(x, mask, weights, ids)
    with pytest.raises(TypeError, match="AllToAllDispatcher: it cannot be pickled"):
        pickle.dumps(experts)
    return outcome


def test_ranks_learn_of_a_wrong_call_of_experts() -> None:
    first, second = run_ranks(2, _experts)
    assert second == ("TypeError", "GroupedExperts: token_mask must be one of bool; got int64")
    assert first[0] == "RuntimeError"
    assert "rank 1" in first[1]


def _wrong_meshes(rank: int, ranks: int) -> list[str]:
    for device_type in ("gpu", "cpu:0", 3):
        with pytest.raises(MeshError, match=f"device_type must be a kind .*; got {device_type!r}"):
            build_meshes(device_type=device_type)
    world_mesh, moe_mesh = build_meshes(ep=2, device_type="cpu")
    assert moe_mesh is not None
    for wrong, kind, found in (
        (None, TypeError, r"ep_mesh must be a 1-D DeviceMesh, such as moe_mesh\['ep'\]; got None"),
        (moe_mesh, AssertionError, "ep_mesh must be 1-D"),
        (world_mesh, AssertionError, "ep_mesh must be 1-D"),
    ):
        model = TinyLM()
        before = state(model)
        with pytest.raises(kind, match=f"apply_ep: {found}"):
            apply_ep(model, wrong)
        assert state(model) == before
    without = {"dp_axis_names": ("dp_shard_cp",), "cp_axis_name": None, "tp_axis_name": None}
    with pytest.raises(TypeError, match=r"to have \('dp_shard_cp',\); got None"):
        parallelize_model(TinyLM(), cast(Any, None), None, **without)

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moe_parallel").addHandler(handler)
    apply_ep(TinyLM(), moe_mesh["ep"])
    assert not heard
    dense = TinyLM()
    for name in list(dense.model.layers):
        del dense.model.layers[name]
    apply_ep(dense, moe_mesh["ep"])
    return heard


def test_meshes_and_models_that_are_none() -> None:
    for [message] in run_ranks(2, _wrong_meshes):
        assert "apply_ep: the model has no block with an MoE" in message
