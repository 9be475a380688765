"""Ranks that route other tokens keep one correction bias, that of the load of all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from moe_parallel.fsdp_preparation import replicate_correction_bias
from moe_parallel.mesh import build_meshes, parallel_axis_names
from moe_parallel.parallelizer import apply_ep, parallelize_model
from tests.parallel.definitions import make_config
from tests.parallel.ranks import run_ranks
from tests.parallel.test_expert_parallel import Model, make_layer, mesh_of
from tests.parallel.tiny_lm import ModelOptions, TinyLM


def _correction_bias(rank: int, ranks: int) -> None:
    """A replicated buffer follows the load of all ranks, which differs from this rank's."""
    torch.set_default_dtype(torch.float32)
    config = make_config(
        gate_bias_update_factor=0.5, score_func="sigmoid", dtype=torch.float32, n_routed_experts=4
    )
    gate = make_layer(config).gate
    mesh = mesh_of(ranks)
    plain = {"e_score_correction_bias": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    buffer = gate.e_score_correction_bias
    assert isinstance(buffer, Tensor)
    for _ in range(2):  # the second time there is nothing to do
        replicate_correction_bias(gate, mesh)
    replicated = gate.e_score_correction_bias
    assert isinstance(replicated, DTensor)
    assert type(replicated.to_local()) is Tensor
    assert replicated.placements == (Replicate(),)
    gate.load_state_dict({**gate.state_dict(), **plain})
    gate(torch.randn(5, config.dim), torch.ones(5, dtype=torch.bool), None)
    gate._cumulative_expert_load = torch.tensor([[9, 0, 3, 0], [0, 5, 3, 4]])[rank]
    gate.update_bias()
    bias = gate.e_score_correction_bias
    assert isinstance(bias, DTensor)
    assert bias.to_local().tolist() == [0.5, 2.5, 3.0, 4.5]


def test_the_correction_bias_follows_the_load_of_all_ranks() -> None:
    run_ranks(2, _correction_bias)


class OwnRouter(nn.Module):
    """Of a user, who adds the bias to plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(8))


def _shared_correction_bias(rank: int, ranks: int) -> None:
    """Ranks with other tokens keep one bias, whoever shards the rest of the model."""
    torch.set_default_dtype(torch.float32)
    config = make_config(gate_bias_update_factor=0.5, score_func="sigmoid", dtype=torch.float32)
    world_mesh, moe_mesh = build_meshes(ep=2)
    model = Model(make_layer(config))
    apply_ep(model, moe_mesh["ep"], moe_mesh)
    gate = model.layers[0].mlp.gate
    torch.manual_seed(rank)
    for _ in range(3):
        gate(torch.randn(5, config.dim), torch.ones(5, dtype=torch.bool), None)
        load = gate._cumulative_expert_load.clone()
        dist.all_reduce(load)
        before = gate.e_score_correction_bias.full_tensor().clone()
        gate.update_bias()
        load = load.float()
        expected = before + 0.5 * torch.sign(load.mean() - load)
        assert torch.equal(gate.e_score_correction_bias.to_local(), expected)
    # FSDP's mesh, once it is known, takes the place of this one
    replicate_correction_bias(gate, init_device_mesh("cpu", (ranks,), mesh_dim_names=("all",)))
    assert gate.e_score_correction_bias.device_mesh.mesh_dim_names == ("all",)
    assert torch.equal(gate.e_score_correction_bias.to_local(), expected)

    shared = gate.state_dict()
    plain = make_layer(config).gate
    plain.load_state_dict(shared)
    assert torch.equal(plain.e_score_correction_bias, expected)

    alone, own = Model(make_layer(config)), Model(make_layer(config))
    own.layers[0].mlp.gate = OwnRouter()
    for model in (alone, own):
        apply_ep(model, moe_mesh["ep"])
    assert alone.layers[0].mlp.gate.e_score_correction_bias.device_mesh == moe_mesh["ep"]
    assert type(own.layers[0].mlp.gate.e_score_correction_bias) is Tensor
    unnamed = init_device_mesh("cpu", (ranks,))
    apply_ep(Model(make_layer(config)), unnamed, unnamed)

    without_fsdp = TinyLM(
        ModelOptions(moe={"gate_bias_update_factor": 0.5, "score_func": "sigmoid"})
    )
    names = parallel_axis_names(world_mesh, moe_mesh) | {"dp_axis_names": None}
    parallelize_model(without_fsdp, world_mesh, moe_mesh, **names)
    for block in without_fsdp.model.layers:
        gate = getattr(getattr(block, "mlp", None), "gate", None)
        assert gate is None or isinstance(gate.e_score_correction_bias, DTensor)


def test_ranks_share_the_correction_bias_without_fsdp() -> None:
    run_ranks(4, _shared_correction_bias)
