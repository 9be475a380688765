"""Activation checkpointing of what FSDP shards."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moe_parallel.activation_checkpointing import make_selective_checkpoint_context_fn
from moe_parallel.mesh import build_meshes, get_submesh, parallel_axis_names
from moe_parallel.parallelizer import parallelize_model
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import ModelOptions, TinyLM, loss_sum, make_shards


def _recorded_load(rank: int, ranks: int) -> list[torch.Tensor]:
    """Loads of a model whose bias is a buffer, after forward and backward with AC."""
    meshes = build_meshes(ep=2)
    shard = make_shards(ranks, 1)[0][rank]
    loads = []
    for ac in (False, True, "selective"):
        model = TinyLM(ModelOptions(moe={"gate_bias_update_factor": 0.01}))
        parallelize_model(
            model,
            *meshes,
            **parallel_axis_names(*meshes),
            activation_checkpointing=ac,
            mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32),
        )
        plain = {name: torch.ones(4) for name in model.state_dict() if "correction_bias" in name}
        assert len(plain) == 2
        model.load_state_dict(plain, strict=False)  # a plain tensor into a replicated buffer
        gate = model.moes()[0].gate
        assert isinstance(gate.e_score_correction_bias, DTensor)
        assert gate.e_score_correction_bias.to_local().tolist() == [1.0] * 4
        loss_sum(model, shard).backward()
        loads.append(gate._cumulative_expert_load)
        dist.barrier()
    return loads


def test_checkpointing_counts_the_load_once() -> None:
    for loads in run_ranks(2, _recorded_load):
        assert loads[0].sum() > 0
        assert all(torch.equal(load, loads[0]) for load in loads)


def _units_inside(rank: int, ranks: int) -> None:
    """FSDP gathers in recomputation what it had already, or not yet, gathered in forward."""
    mesh = get_submesh(build_meshes()[0], "dp_cp")
    for reshard, synchronize, repeat in itertools.product((True, False), repeat=3):
        torch.manual_seed(0)
        inner = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        expected = copy.deepcopy(inner)
        options = {"mesh": mesh, "reshard_after_forward": reshard}
        fully_shard(inner[1], **options)
        block = checkpoint_wrapper(inner, context_fn=make_selective_checkpoint_context_fn())
        model = nn.Sequential(*[block] * (1 + repeat))
        fully_shard(model, **options)
        for step in range(2):
            if not synchronize:
                model.set_requires_gradient_sync(step == 1)
                model.set_reshard_after_backward(step == 1)
            x = torch.randn(3, 4)
            model(x).sin().sum().backward()
            y = expected(expected(x)) if repeat else expected(x)
            y.sin().sum().backward()
        for p, q in zip(inner.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)


@pytest.mark.parametrize("ranks", [1, 2])
def test_selective_checkpointing_around_units(ranks: int) -> None:
    run_ranks(ranks, _units_inside)
