"""Every mesh computes what one process does: gradients, norm, loss and a step.

R ranks, D of them share the dense parameters.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from moe_parallel.mesh import build_meshes, parallel_axis_names
from moe_parallel.parallelizer import apply_fsdp, parallelize_model
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
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone()


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
    world_mesh, moe_mesh = meshes
    device = world_mesh.device_type
    model = case.model.build().to(device)
    parallelize_model(
        model,
        world_mesh,
        moe_mesh,
        **parallel_axis_names(world_mesh, moe_mesh),
        **{"mp_policy": MixedPrecisionPolicy(**FP32), **case.options},
    )
    cp = world_mesh["cp"].size()
    batches = shards_of(case, ranks // cp)
    labels, loss = count_labels(batches), torch.zeros((), device=device)
    MoEAuxLossAutoScaler.main_loss_backward_scale = ranks
    moes = model.moes()
    for index, batch in enumerate(batches):
        if index == 0:
            prepare_for_grad_accumulation([model])
        if index == len(batches) - 1:
            prepare_for_final_backward([model])
        shard = batch[rank // cp].to(device)
        if cp > 1:
            own_order = not case.model.shared_attention
            shard = shard.part(rank % cp, cp) if own_order else shard.cut(world_mesh["cp"])
        with replaying(moes, shard):
            part = loss_sum(model, shard) / labels
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
        batches = shards_of(case, ranks // sizes.get("cp", 1))
        expected = one_process(case.model, batches, MAX_NORM, LR)
        found += [f"{case.name}: {line}" for line in differences(actual, expected, tolerance)]
    return found


def check(
    sizes: dict[str, int],
    cases: list[Case],
    ranks: int = 4,
    tolerance: float = 1e-5,
    backend: str = "gloo",
) -> None:
    results = run_ranks(ranks, _run_cases, sizes, cases, tolerance, timeout=240, backend=backend)
    assert results == [[]] * ranks


RESHARD = {"reshard_after_forward": True}
INNER_ROOT = {"wrap_outer_model": False}
ROUTER_AC = {"activation_checkpointing": True}
FULL_AC = ROUTER_AC | {"ignore_router_for_ac": False}
SELECTIVE_AC = {"activation_checkpointing": "selective"}
BIAS = {"gate_bias_update_factor": 0.01}
REPLAY = {"enable_routing_replay": True}
# Ranks 0 and 1 never choose experts 2 and 3; with ep = 2 that is a rank without tokens, in one
# group of ep_shard.
ONE_SIDED = ((0, 1), (1, 0), (0, 1, 2, 3), (3, 1, 2, 0))
OPTIMIZED = ModelOptions(optimizations=True)

COVERING = [
    Case("plain", moe(expert_bias=True, router_bias=True), RESHARD),
    Case("accumulation", OPTIMIZED, INNER_ROOT, {"uneven": True}, micro_batches=3),
    Case("accumulation, reduced each time", options=RESHARD | ROUTER_AC, micro_batches=2),
    Case(
        "fully padded rank, selective AC",
        moe(aux_loss_coeff=0.1, **BIAS),
        SELECTIVE_AC | INNER_ROOT,
        {"uneven": True, "padded_rank": 2},
    ),
    Case("one-sided routing", moe(expert_bias=True, **REPLAY), choices=ONE_SIDED),
]
FULL = [
    *(
        Case(
            f"AC {ac}, optimizations {optimizations}, {extra}",
            ModelOptions(moe={"aux_loss_coeff": 0.1, **BIAS}, optimizations=optimizations),
            ac | extra,
            {"uneven": True},
            micro_batches=3,
        )
        for ac in ({}, ROUTER_AC, FULL_AC, SELECTIVE_AC)
        for optimizations in (False, True)
        for extra in ({}, RESHARD, RESHARD | INNER_ROOT)
    ),
    Case("tied", ModelOptions(tied=True)),
    Case("tied, reshard, accumulation", ModelOptions(tied=True), RESHARD, micro_batches=2),
    Case("frozen experts", ModelOptions(frozen_experts=True), SELECTIVE_AC, micro_batches=2),
    Case("relu2", moe(expert_activation="relu2", expert_bias=True)),
    Case("latent", moe(moe_latent_size=8), ROUTER_AC),
    Case(
        "shared expert gate", moe(shared_expert_gate=True, score_func="softmax_with_bias", **BIAS)
    ),
    Case("one-sided routing without bias", moe(**REPLAY), choices=ONE_SIDED),
    Case("one-sided routing, AC", moe(expert_bias=True, **REPLAY), ROUTER_AC, choices=ONE_SIDED),
]
SIZES = [
    {"ep": 1},
    {"ep": 2},
    {"ep": 4},
    {"dp_replicate": 2, "ep": 1},
    {"dp_replicate": 2, "ep": 2},
    {"dp_replicate": 2, "ep": 4},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_one_process(sizes: dict[str, int]) -> None:
    check(sizes, COVERING)


AUX_AND_BIAS = ModelOptions(moe={"aux_loss_coeff": 0.1, **BIAS})
CONTEXT = [
    Case("plain", data={"length": 8}),
    Case(
        "auxiliary loss and bias, AC",
        AUX_AND_BIAS,
        ROUTER_AC | RESHARD,
        {"length": 4, "uneven": True},
    ),
    Case("selective AC", AUX_AND_BIAS, SELECTIVE_AC | INNER_ROOT, {"length": 8}, micro_batches=2),
]


@pytest.mark.parametrize("sizes", [{"cp": 2, "ep": 2}, {"cp": 4, "ep": 2}], ids=str)
def test_context_parallelism_of_the_model(sizes: dict[str, int]) -> None:
    """The model's own attention gathers keys and values; the auxiliary loss is of the whole."""
    check(sizes, CONTEXT if sizes["cp"] == 2 else CONTEXT[::2])


SHARED = [
    Case(
        case.name + ", ContextParallelAttention",
        replace(case.model, shared_attention=True),
        case.options,
        case.data | {"length": 8, "uneven": 2 * case.data.get("uneven", 0)},
        case.micro_batches,
    )
    for case in CONTEXT
]


@pytest.mark.parametrize("sizes", [{"cp": 2, "ep": 2}, {"cp": 4, "ep": 4}], ids=str)
def test_context_parallel_attention(sizes: dict[str, int]) -> None:
    """On the ring, in the balanced order."""
    check(sizes, SHARED if sizes["cp"] == 2 else SHARED[::2])


@pytest.mark.slow
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("ep", [2, 4])
def test_context_and_expert_parallelism(cp: int, ep: int) -> None:
    check({"cp": cp, "ep": ep}, CONTEXT + SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_full_matrix(sizes: dict[str, int]) -> None:
    check(sizes, COVERING + FULL)


def test_replicas_that_share_sequences() -> None:
    """Every axis but the pipeline's has two ranks or more, which takes 8."""
    check({"dp_replicate": 2, "cp": 2, "ep": 4}, SHARED[1:2], ranks=8)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"ep": 4}, {"dp_replicate": 2, "ep": 4}], ids=str)
def test_8_ranks(sizes: dict[str, int]) -> None:
    check({**sizes, "cp": 2}, CONTEXT + SHARED, ranks=8)
    check(sizes, [case for case in COVERING + FULL if case.choices is None][:8], ranks=8)


def test_a_small_model_of_each_kind() -> None:
    check({"ep": 2}, [case for case in FULL if "optimizations" not in case.name])


def _default_policy(rank: int, ranks: int) -> list[str]:
    """bfloat16 parameters and outputs, float32 reductions; the routing is given, so the same.

    With small matrices, so that bfloat16's rounding alone is within 2 percent.
    """
    meshes, found = build_meshes(ep=2), []
    for head in (None, "float32"):
        for outer in (True, False):
            options = {"mp_policy": None, "lm_head_precision": head, "wrap_outer_model": outer}
            model = ModelOptions(moe=REPLAY, scale=0.1)
            case = Case("", model, options, choices=((0, 1, 2, 3),) * ranks)
            actual = parallel_step(case, meshes, rank, ranks)
            expected = one_process(model, shards_of(case, ranks), MAX_NORM, LR)
            ours, theirs = (
                torch.cat([step.grads[name].flatten() for name in sorted(expected.grads)])
                for step in (actual, expected)
            )
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not 1e-4 < error < 0.02:
                found.append(f"{options}: gradients are {error:.3f} off")
    return found


def test_default_policy_stays_close() -> None:
    assert run_ranks(4, _default_policy) == [[]] * 4


def _head_precision(rank: int, ranks: int) -> list[tuple[torch.dtype, bool]]:
    shard = make_shards(ranks, 1)[0][rank]
    results = []
    for head in (None, "float32"):
        for outer in (True, False):
            model = TinyLM()
            meshes = build_meshes(ep=2)
            parallelize_model(
                model,
                *meshes,
                **parallel_axis_names(*meshes),
                lm_head_precision=head,
                wrap_outer_model=outer,
            )
            logits = model(shard.ids, shard.padding_mask)
            rounded = torch.equal(logits, logits.to(torch.bfloat16).to(logits.dtype))
            results.append((logits.dtype, rounded))
    return results


def test_a_float32_head_gives_float32_logits() -> None:
    low, high = (torch.bfloat16, True), (torch.float32, False)
    assert run_ranks(2, _head_precision) == [[low, low, high, high]] * 2


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part(x) for part in self.parts]


class WithTower(nn.Module):
    """A model that looks at as many outputs of its tower as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict()
        self.audio_tower = Tower()
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, used: int) -> torch.Tensor:
        return self.head(sum(self.audio_tower(x)[:used], start=x))


def _unused(rank: int, ranks: int, reshard: bool, emulated: bool) -> None:
    if emulated:
        FSDPModule.set_reduce_scatter_unused_params = None
    alone = WithTower()
    model = copy.deepcopy(alone)
    mesh = build_meshes()[0]["dp_shard_cp"]
    apply_fsdp(
        model, mesh, False, False, None, MixedPrecisionPolicy(**FP32), None, reshard, None, True
    )
    x = torch.randn(ranks, 3, 4)
    for used in (2, 0, 1, 2):  # by rank 1
        alone.zero_grad()
        model.zero_grad()
        by_rank = (2, used)
        for part, count in zip(x, by_rank, strict=True):
            (alone(part, count).sum() / ranks).backward()
        model(x[rank], by_rank[rank]).sum().backward()
        for name, parameter in alone.named_parameters():
            actual = full(model.get_parameter(name).grad)
            torch.testing.assert_close(actual, parameter.grad, msg=f"{name}, {used} used")


@pytest.mark.parametrize("emulated", [False, True], ids=["as it is", "as before 2.13"])
@pytest.mark.parametrize("reshard", [False, True], ids=["kept", "resharded"])
def test_some_ranks_may_leave_parts_of_a_tower_unused(reshard: bool, emulated: bool) -> None:
    run_ranks(2, _unused, reshard, emulated)
