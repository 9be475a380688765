"""Every mesh computes what one process does: gradients, norm, loss and a step.

R ranks, D of them share the dense parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from moe_parallel.mesh import build_meshes, parallel_axis_names
from moe_parallel.parallelizer import parallelize_model
from moe_parallel.training import (
    MoEAuxLossAutoScaler,
    prepare_for_final_backward,
    prepare_for_grad_accumulation,
    scale_grads_and_clip_grad_norm,
)
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_lm import (
    ModelOptions,
    Shard,
    Step,
    TinyLM,
    count_labels,
    loss_sum,
    make_shards,
    one_process,
    replaying,
)

FP32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
MAX_NORM, LR = 0.5, 0.3


@dataclass(frozen=True)
class Case:
    """A model, its data and how it is parallelized, on a mesh that several cases share."""

    name: str
    model: ModelOptions = field(default_factory=ModelOptions)
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    choices: tuple[tuple[int, ...], ...] | None = None  # by rank: the experts it may use


def moe(**changes: Any) -> ModelOptions:
    return ModelOptions(moe=changes)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def shards_of(case: Case, ranks: int) -> list[list[Shard]]:
    batches = make_shards(ranks, case.micro_batches, **case.data)
    if case.choices is None:
        return batches
    chosen = []
    for batch in batches:
        chosen.append([])
        for shard, experts in zip(batch, case.choices, strict=True):
            tokens = torch.arange(shard.ids.numel())[:, None]
            slots = (tokens + torch.arange(2)) % len(experts)
            ids = torch.tensor(experts)[slots]
            chosen[-1].append(Shard(shard.ids, shard.labels, shard.padding_mask, (ids, ids)))
    return chosen


def parallel_step(case: Case, meshes: tuple[Any, Any], rank: int, ranks: int) -> Step:
    model = TinyLM(case.model)
    world_mesh, moe_mesh = meshes
    parallelize_model(
        model,
        world_mesh,
        moe_mesh,
        **parallel_axis_names(world_mesh, moe_mesh),
        **{"mp_policy": MixedPrecisionPolicy(**FP32), **case.options},
    )
    batches = shards_of(case, ranks)
    labels, loss = count_labels(batches), torch.zeros(())
    MoEAuxLossAutoScaler.main_loss_backward_scale = ranks
    moes = model.moes()
    for index, batch in enumerate(batches):
        if index == 0:
            prepare_for_grad_accumulation([model])
        if index == len(batches) - 1:
            prepare_for_final_backward([model])
        with replaying(moes, batch[rank]):
            part = loss_sum(model, batch[rank]) / labels
            (part * ranks).backward()
        loss += part.detach()
    dist.all_reduce(loss)
    options = {
        "moe_mesh": moe_mesh,
        "ep_axis_name": None if moe_mesh is None else "ep",
        "dp_group_size": ranks,
    }
    assert scale_grads_and_clip_grad_norm(None, [model], **options) == 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "experts" in name:
            assert parameter.grad is not None, name
    grads = {
        plain_name(name): full(p.grad) for name, p in model.named_parameters() if p.grad is not None
    }
    norm = scale_grads_and_clip_grad_norm(MAX_NORM, [model])
    torch.optim.SGD(model.parameters(), LR).step()
    biases = []
    for module in moes:
        if module.gate.bias_update_factor:
            module.gate.update_bias()
            biases.append(full(module.gate.e_score_correction_bias))
    parameters = {plain_name(name): full(p) for name, p in model.named_parameters()}
    return Step(loss.item(), norm, grads, parameters, biases)


def differences(actual: Step, expected: Step, tolerance: float) -> list[str]:
    """What is further from the truth than ``tolerance`` of its largest entry."""
    found = []

    def compare(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-12)
        if not error <= tolerance:
            found.append(f"{what}: relative error {error:.1e}")

    compare("loss", torch.tensor(actual.loss), torch.tensor(expected.loss))
    compare("norm", torch.tensor(actual.norm), torch.tensor(expected.norm))
    for kind in ("grads", "parameters"):
        ours, theirs = getattr(actual, kind), getattr(expected, kind)
        if ours.keys() != theirs.keys():
            found.append(f"{kind} of other parameters: {sorted(ours.keys() ^ theirs.keys())}")
        for name in ours.keys() & theirs.keys():
            compare(f"{kind} of {name}", ours[name], theirs[name])
    for index, (a, b) in enumerate(zip(actual.biases, expected.biases, strict=True)):
        if not torch.equal(a, b):
            found.append(f"correction bias {index}: {a.tolist()}, not {b.tolist()}")
    return found


def _run_cases(
    rank: int, ranks: int, sizes: dict[str, int], cases: list[Case], tolerance: float
) -> list[str]:
    meshes = build_meshes(**sizes)
    found = []
    for case in cases:
        actual = parallel_step(case, meshes, rank, ranks)
        expected = one_process(case.model, shards_of(case, ranks), MAX_NORM, LR)
        found += [f"{case.name}: {line}" for line in differences(actual, expected, tolerance)]
    return found


def check(
    sizes: dict[str, int], cases: list[Case], ranks: int = 4, tolerance: float = 1e-5
) -> None:
    results = run_ranks(ranks, _run_cases, sizes, cases, tolerance, timeout=240)
    assert results == [[]] * ranks


RESHARD = {"reshard_after_forward": True}
INNER_ROOT = {"wrap_outer_model": False}
CORE = [
    Case("plain"),
    Case("reshard, inner root", options=RESHARD | INNER_ROOT),
    Case(
        "accumulation with optimizations",
        ModelOptions(optimizations=True),
        INNER_ROOT,
        micro_batches=3,
    ),
    Case("uneven tokens, fully padded rank", data={"uneven": True, "padded_rank": 2}),
    Case(
        "auxiliary loss and bias, selective AC",
        moe(aux_loss_coeff=0.1, gate_bias_update_factor=0.01, expert_bias=True),
        {"activation_checkpointing": "selective"},
        micro_batches=2,
    ),
]
SIZES = [{"ep": 1}, {"ep": 2}, {"ep": 4}, {"dp_replicate": 2, "ep": 2}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_one_process(sizes: dict[str, int]) -> None:
    check(sizes, CORE)
