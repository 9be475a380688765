"""A mesh or a model that does not fit: one error, on every rank, before anything is changed."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from moe_parallel import fsdp_preparation
from moe_parallel.fsdp_preparation import check_expert_widths
from moe_parallel.mesh import MeshError, build_meshes, parallel_axis_names
from moe_parallel.parallelizer import apply_cp, apply_ep, apply_fsdp, parallelize_model
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import ModelOptions, TinyLM


class Collectives(TorchDispatchMode):
    """Counts what is communicated."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def state(model: nn.Module) -> list[Any]:
    """What every step of parallelize_model changes something of."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, type(tensor), tensor.data_ptr()) for name, tensor in tensors],
        [(vars(m).get("cp_mesh"), vars(m).get("group_name")) for m in model.modules()],
        hasattr(model, "_cp_enabled"),
    ]


def _refused(rank: int, ranks: int) -> list[str]:
    found = []

    def refuse(sizes: dict[str, int], kind: type[Exception], model: TinyLM, **changes: Any) -> None:
        meshes = build_meshes(**sizes)
        axes = {**parallel_axis_names(*meshes), **changes}
        before = state(model)
        with Collectives() as communication, pytest.raises(kind) as error:
            parallelize_model(model, *meshes, **axes)
        assert error.type is kind
        assert state(model) == before, error.value
        found.append(f"{error.value} {dict(communication.counts)}")

    cp = {"cp": 2, "ep": 2}
    refuse(cp, MeshError, TinyLM(ModelOptions(moe={"moe_inter_dim": 7})))
    refuse(cp, MeshError, TinyLM(ModelOptions(tied=True)), wrap_outer_model=False)
    apart = TinyLM()
    apart.config.tie_word_embeddings = True  # apply_fsdp would tie them again
    refuse(cp, MeshError, apart, wrap_outer_model=False)
    refuse(cp, MeshError, TinyLM(), ep_shard_axis_names=None)
    refuse(cp, MeshError, TinyLM(), ep_axis_name=None)
    refuse(cp, MeshError, TinyLM(), dp_axis_names=("dp_replicate", "dp_shard", "cp"))
    for name, value in {"window": 3, "dropout_p": 0.5}.items():
        unfit = TinyLM(ModelOptions(shared_attention=True))
        setattr(unfit.model.layers["2"].self_attn.attn_module, name, value)
        refuse(cp, MeshError, unfit)
    mixed = TinyLM()
    mixed.model.layers["2"] = TinyLM(ModelOptions(moe={"n_routed_experts": 6})).model.layers["2"]
    refuse({"cp": 2, "ep": 4}, MeshError, mixed)
    unsized = TinyLM()
    del unsized.config.hidden_size
    refuse(cp, ValueError, unsized, activation_checkpointing=True)
    unnamed = TinyLM()
    unnamed.model.moe_config = None
    refuse(cp, AttributeError, unnamed)
    head = {"lm_head_precision": "float99"}
    refuse(cp, KeyError, TinyLM(), activation_checkpointing="selective", **head)

    whole = TinyLM()
    before_sharding = state(whole)
    with pytest.raises(KeyError, match="apply_fsdp: lm_head_precision: dtype must be one of"):
        apply_fsdp(whole, build_meshes()[0]["dp_shard"], False, False, **head)
    assert state(whole) == before_sharding

    narrow = TinyLM(ModelOptions(moe={"moe_inter_dim": 7}))
    world_mesh, moe_mesh = build_meshes(ep=2)
    assert moe_mesh is not None
    before = state(narrow)
    with pytest.raises(MeshError, match="down_projs must be a multiple of the ep_shard size 2"):
        apply_fsdp(narrow, world_mesh["dp_shard"], False, True, moe_mesh["ep_shard"])
    assert state(narrow) == before
    for ep_enabled in (False, True):
        with pytest.raises(MeshError, match=r"needs ep_shard_mesh, .*; got None\. Pass"):
            apply_fsdp(whole, world_mesh["dp_shard"], ep_enabled, True)
    with pytest.raises(MeshError, match="fsdp_mesh must be 1-D, or 2-D"):
        apply_fsdp(whole, world_mesh["dp_replicate", "dp_shard", "cp"], False, False)
    assert state(whole) == before_sharding
    spread = TinyLM()
    apply_ep(spread, moe_mesh["ep"], moe_mesh=moe_mesh)
    for model, shards, options in (
        (spread, 1, (True, False)),
        (spread, 1, (True, False, moe_mesh["ep_shard"])),
        (whole, 1, (True, False)),  # apply_ep was not called
        (whole, 2, (True, True, moe_mesh["ep_shard"])),
        (whole, 2, (False, True, moe_mesh["ep_shard"])),
    ):
        before = state(model)
        owners = 2 if model is spread else 1
        message = (
            f"is spread over {owners} ranks by Expert Parallelism x {shards} of .* but 4 ranks"
        )
        with Collectives() as communication, pytest.raises(MeshError, match=message):
            apply_fsdp(model, world_mesh["dp_shard"], *options)
        assert state(model) == before
        assert not communication.counts
    apply_fsdp(spread, world_mesh["dp_shard"], True, True, moe_mesh["ep_shard"])
    frozen = TinyLM(ModelOptions(frozen_experts=True))
    apply_fsdp(frozen, world_mesh["dp_shard"], True, False)
    apply_fsdp(whole, world_mesh["dp_shard"], False, False)  # nothing is left of the tries
    foreign = nn.Module()
    foreign.bias = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(MeshError, match=r"bias must be a multiple of .* 2; got \[4, 3\]"):
        check_expert_widths([None, SimpleNamespace(experts=foreign)], moe_mesh["ep_shard"])
    return found


def test_a_refused_model_is_untouched_and_nothing_was_communicated() -> None:
    first, *others = run_ranks(4, _refused)
    assert all(other == first for other in others)
    assert all(line.endswith("{}") for line in first)
    for line, part in zip(
        first,
        (
            "down_projs must be a multiple of the ep_shard size 2; got [4, 7, 16]",
            "Use wrap_outer_model=True, or untie them",
            "Use wrap_outer_model=True, or untie them",
            "Pass ep_shard_axis_names=('ep_shard',)",
            "have 2 ranks, but 4 share the experts, {'ep_shard': 2, 'ep': 2}; the others would",
            "fsdp_mesh must be 1-D, or 2-D to replicate over the first axis; got 3-D, of "
            "('dp_replicate', 'dp_shard', 'cp')",
            "'p2p' does not support a window; got 3",
            "dropout_p must be 0 with a context parallel group; got 0.5",
            "multiple of the EP size 4; block 2 has 6",
            "hidden_size must be provided",
            "has no moe_config",
            "lm_head_precision: dtype must be one of float, float32",
        ),
        strict=True,
    ):
        assert part in line


def test_apply_cp_refuses_before_it_tells_a_block() -> None:
    model = TinyLM(ModelOptions(shared_attention=True))
    model.model.layers["2"].self_attn.attn_module.window = 3
    before, mesh = state(model), cast(Any, object())  # nothing is asked of it
    with pytest.raises(MeshError, match="'p2p' does not support a window"):
        apply_cp(model, mesh)
    assert state(model) == before


def _unequal(rank: int, ranks: int) -> None:
    _, moe_mesh = build_meshes(ep=2)
    assert moe_mesh is not None
    for changed, refused in ((3, False), (2, True)):
        model = TinyLM()
        if rank == changed:  # of the group (2, 3), whose first rank distributes what it has
            with torch.no_grad():
                weight = model.moes()[1].experts.down_projs[3, 1]
                weight[1] = torch.nextafter(weight[1], torch.tensor(torch.inf))
        before = state(model)
        with Collectives() as communication:
            if refused:
                with pytest.raises(MeshError, match="groups of ep_shard must hold equal weights"):
                    apply_ep(model, moe_mesh["ep"], moe_mesh=moe_mesh)
                assert state(model) == before
                assert communication.counts == {"c10d.allreduce_.default": 1}
            else:
                apply_ep(model, moe_mesh["ep"], moe_mesh=moe_mesh)
                assert communication.counts["c10d.allreduce_.default"] == 1
    meshes, model = build_meshes(cp=2, ep=2), TinyLM()
    if rank == 2:
        with torch.no_grad():
            model.moes()[0].experts.down_projs[1, 0, 0] += 1
    before = state(model)
    with Collectives() as communication:
        with pytest.raises(MeshError, match="groups of ep_shard must hold equal weights"):
            parallelize_model(model, *meshes, **parallel_axis_names(*meshes))
        # of what model it is, and of the weights
        assert communication.counts == {"c10d.allreduce_.default": 2}
    assert state(model) == before  # attention, too, has not been told of anything
    hashed: list[int] = []
    digest = fsdp_preparation._digest
    fsdp_preparation._digest = lambda tensor, seed: hashed.append(seed) or digest(tensor, seed)
    parallelize_model(TinyLM(), *meshes, **parallel_axis_names(*meshes))
    assert hashed == ([0, 1, 2, 3] if rank % 2 == 0 else [])  # two layers, each weight once
    framework, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep_shard", "ep")), TinyLM()
    if rank == 2:
        with torch.no_grad():
            model.moes()[0].experts.down_projs[1, 0, 0] += 1
    with Collectives() as communication:
        with pytest.raises(MeshError, match="groups of ep_shard must hold equal weights"):
            apply_ep(model, framework["ep"], moe_mesh=framework)
        assert communication.counts == {"c10d.allreduce_.default": 2}  # one along each axis
    _, whole = build_meshes(ep=4)  # one group: there is nothing to compare
    assert whole is not None
    with Collectives() as communication:
        apply_ep(TinyLM(), whole["ep"], moe_mesh=whole)
    assert not communication.counts["c10d.allreduce_.default"]
    meshes, model = build_meshes(ep=2), TinyLM()
    axes = parallel_axis_names(*meshes)
    parallelize_model(model, *meshes, **axes)
    with pytest.raises(RuntimeError, match="once"):  # though the shards of the groups differ
        parallelize_model(model, *meshes, **axes)


def test_unequal_experts_are_found_before_they_are_distributed() -> None:
    run_ranks(4, _unequal)


def test_a_digest_is_of_every_bit_and_its_place() -> None:
    data = torch.randn(5, 9).to(torch.bfloat16)
    digests = {fsdp_preparation._digest(data, seed) for seed in range(3)}
    assert fsdp_preparation._digest(data.T.contiguous().T, 0) in digests
    strided = fsdp_preparation._digest(torch.arange(6)[::2], 0)
    assert strided == fsdp_preparation._digest(torch.tensor([0, 2, 4]), 0)
    for row, column in ((0, 0), (2, 5), (4, 8)):
        changed = data.clone()
        changed.view(torch.int16)[row, column] ^= 1
        digests.add(fsdp_preparation._digest(changed, 0))
    digests.add(fsdp_preparation._digest(data.flip(0), 0))
    large = torch.zeros(2**20 + 2, dtype=torch.int64)  # more than there are factors
    for place in (0, 2**20, 2**20 + 1):
        large[place] = 1
        digests.add(fsdp_preparation._digest(large, 0))
        large[place] = 0
    assert len(digests) == 3 + 3 + 1 + 3


def test_groups_that_cover_stages_and_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other where the world is more than both."""
    monkeypatch.setattr(fsdp_preparation, "groups_of", lambda mesh: ["shards", "experts"])
    stage = SimpleNamespace(size=lambda: 4)
    pipeline = SimpleNamespace(size=lambda: 2, get_group=lambda: "pipeline")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    both = fsdp_preparation._groups_with(stage, pipeline)
    assert both == ["shards", "experts", "pipeline"]
    assert fsdp_preparation._groups_with(stage, None) == ["shards", "experts"]


def _stages(rank: int, ranks: int) -> None:
    """The stages of a pipeline hold other experts, whatever axes the mesh of a framework has."""
    framework = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "ep_shard", "ep"))
    _, own = build_meshes(pp=2, ep=2)
    assert own is not None
    for mesh in (framework, own):
        model = TinyLM()
        with torch.no_grad():
            model.moes()[0].experts.down_projs[0] += rank // 4
        before = state(model)
        with Collectives() as communication:
            if rank == 6:
                with torch.no_grad():
                    model.moes()[0].experts.down_projs[0] += 1
            with pytest.raises(MeshError, match=r"equal weights.* differ in pipeline stage 1"):
                apply_ep(model, mesh["ep"], moe_mesh=mesh)
        assert state(model) == before
        assert communication.counts["c10d.allreduce_.default"] == 1

        uneven = TinyLM(ModelOptions(moe={"n_routed_experts": 5})) if rank >= 4 else TinyLM()
        before = state(uneven)
        refusal = pytest.raises(MeshError, match=r"block 0 has 5 \(in pipeline stage 1\)")
        with Collectives() as communication, refusal:
            apply_ep(uneven, mesh["ep"], moe_mesh=mesh)
        assert state(uneven) == before
        assert not communication.counts["c10d.allreduce_.default"]  # that of the digests

        dense, others = TinyLM(), TinyLM()  # of a stage without experts, another not loaded yet
        for name in list(dense.model.layers):
            del dense.model.layers[name]
        apply_ep(dense if rank < 4 else others.to("meta"), mesh["ep"], moe_mesh=mesh)
        apply_ep(TinyLM(), mesh["ep"], moe_mesh=mesh)

    meshes, model = build_meshes(pp=2, cp=2, ep=2), TinyLM()
    if rank == 6:
        with torch.no_grad():
            model.moes()[1].experts.gate_and_up_projs[3] += 1
    before = state(model)
    with pytest.raises(MeshError, match=r"equal weights.* differ in pipeline stage 1"):
        parallelize_model(model, *meshes, **parallel_axis_names(*meshes))
    assert state(model) == before
    parallelize_model(TinyLM(), *meshes, **parallel_axis_names(*meshes))


def test_unequal_experts_in_one_stage_are_refused_in_all() -> None:
    run_ranks(8, _stages)


def _refused_by_one_stage(rank: int, ranks: int) -> list[str]:
    meshes = build_meshes(pp=2, ep=2)
    axes = parallel_axis_names(*meshes)
    found = []

    def refuse(kind: type[Exception], model: TinyLM, **changes: Any) -> None:
        model = model if rank >= 4 else TinyLM()
        before = state(model)
        with pytest.raises(kind) as error:
            parallelize_model(model, *meshes, **{**axes, **changes})
        assert error.type is kind
        assert state(model) == before
        found.append(error.value.args[0])

    refuse(MeshError, TinyLM(ModelOptions(moe={"moe_inter_dim": 7})))
    refuse(MeshError, TinyLM(ModelOptions(tied=True)), wrap_outer_model=False)
    unnamed = TinyLM()
    unnamed.model.moe_config = None
    refuse(AttributeError, unnamed)
    refuse(AssertionError, TinyLM(ModelOptions(moe={"n_routed_experts": 5})))
    refuse(KeyError, TinyLM(), **({"lm_head_precision": "float99"} if rank >= 4 else {}))
    parallelize_model(TinyLM(), *meshes, **axes)
    return found


def test_a_model_that_one_stage_refuses_is_refused_in_all() -> None:
    first, *others = run_ranks(8, _refused_by_one_stage)
    assert all(other == first for other in others)
    assert len(first) == 5
    assert all(line.endswith("(in pipeline stage 1)") for line in first)
    assert first[-1].startswith("apply_fsdp: lm_head_precision: dtype must be one of")
