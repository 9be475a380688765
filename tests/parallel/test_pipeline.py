"""Pipeline, Expert and FSDP parallelism together: every schedule computes what one process does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moe_parallel import MoE
from moe_parallel.fsdp_mixin import (
    install_pipeline_backward,
    patched_backward_maybe_with_nosync,
)
from moe_parallel.mesh import MeshError, build_meshes, get_submesh, parallel_axis_names
from moe_parallel.parallelizer import apply_ac, parallelize_model
from moe_parallel.training import (
    MoEAuxLossAutoScaler,
    prepare_for_final_backward,
    prepare_for_grad_accumulation,
    scale_grads_and_clip_grad_norm,
)
from tests.parallel.ranks import run_ranks
from tests.parallel.test_parallelize_model import (
    FP32,
    LR,
    MAX_NORM,
    differences,
    full,
    plain_name,
)
from tests.parallel.tiny_lm import (
    IGNORED,
    ModelOptions,
    Shard,
    Step,
    TinyLM,
    count_labels,
    make_shards,
    one_process,
)

STAGES = {  # of pipeline rank 0 and 1
    "ScheduleGPipe": ([0], [1]),
    "Schedule1F1B": ([0], [1]),
    "ScheduleInterleaved1F1B": ([0, 2], [1, 3]),
    "ScheduleInterleavedZeroBubble": ([0, 2], [1, 3]),
    "ScheduleZBVZeroBubble": ([0, 3], [1, 2]),
    "ScheduleDualPipeV": ([0, 3], [1, 2]),
}


@dataclass(frozen=True)
class Case:
    schedule: str
    options: dict[str, Any] = field(default_factory=lambda: {"wrap_outer_model": False})
    steps: int = 1  # schedule steps in an optimizer step
    micro_batches: int = 4
    moe: dict[str, Any] = field(default_factory=dict)
    shared_attention: bool = False
    reduce_each: bool = False  # micro-batch

    @property
    def model(self) -> ModelOptions:
        return ModelOptions(layers=4, moe=self.moe, shared_attention=self.shared_attention)


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def build_schedule(case: Case, meshes: tuple[Any, Any]) -> tuple[Any, list[TinyLM]]:
    world_mesh, moe_mesh = meshes
    pp = world_mesh["pp"]
    indices = STAGES[case.schedule][pp.get_local_rank()]
    count = sum(map(len, STAGES[case.schedule]))
    parts, stages = [], []
    for index in indices:
        part = TinyLM(case.model).keep_stage(index, count)
        parallelize_model(
            part,
            world_mesh,
            moe_mesh,
            **parallel_axis_names(world_mesh, moe_mesh),
            **{"mp_policy": MixedPrecisionPolicy(**FP32), **case.options},
        )
        parts.append(part)
        stages.append(PipelineStage(part, index, count, torch.device("cpu"), group=pp.get_group()))
        stages[-1]._reduce_grad_per_microbatch = case.reduce_each
    single = case.schedule in ("ScheduleGPipe", "Schedule1F1B")
    schedule = getattr(schedules, case.schedule)(
        stages[0] if single else stages,
        case.micro_batches,
        loss_fn=sum_of_losses,
        scale_grads=False,
    )
    return schedule, parts


def join(shards: list[Shard]) -> Shard:
    """The micro-batches of one rank as a batch, which the schedule cuts up again."""
    return Shard(
        *(
            torch.cat([getattr(s, k) for s in shards])
            for k in Shard.__annotations__
            if k != "choices"
        )
    )


def pipeline_step(case: Case, meshes: tuple[Any, Any], batches: list[list[Shard]]) -> Step:
    world_mesh, moe_mesh = meshes
    schedule, parts = build_schedule(case, meshes)
    handle = install_pipeline_backward(schedule)
    cp_mesh = world_mesh["cp"]
    data_rank = get_submesh(world_mesh, "dp").get_local_rank()
    labels, total = count_labels(batches), torch.zeros(())
    MoEAuxLossAutoScaler.main_loss_backward_scale = labels
    for step in range(case.steps):
        last = step == case.steps - 1
        prepare = prepare_for_final_backward if last else prepare_for_grad_accumulation
        prepare(parts, pp_enabled=True)
        mine = batches[step * case.micro_batches : (step + 1) * case.micro_batches]
        shards = [batch[data_rank] for batch in mine]
        whole = join([s if cp_mesh.size() == 1 else s.cut(cp_mesh) for s in shards])
        losses: list[torch.Tensor] = []
        schedule.step(
            *([whole.ids] if world_mesh["pp"].get_local_rank() == 0 else []),
            padding_mask=whole.padding_mask,
            target=whole.labels,
            losses=losses,
        )
        total += sum(loss.detach() for loss in losses)
        if not last and not case.options["wrap_outer_model"]:
            for part in parts:
                for name, parameter in part.named_parameters():
                    reduced = isinstance(parameter, DTensor) and parameter.grad is not None
                    assert not reduced or "experts" in name, f"{name} was reduced too early"
    handle.remove()
    dist.all_reduce(total)
    norm = scale_grads_and_clip_grad_norm(
        None,
        parts,
        pp_enabled=True,
        device_mesh=world_mesh,
        moe_mesh=moe_mesh,
        ep_axis_name=None if moe_mesh is None else "ep",
        pp_axis_name="pp",
        num_label_tokens=labels,
        dp_group_size=world_mesh.size() // 2,
    )
    named = [(plain_name(n), p) for part in parts for n, p in part.named_parameters()]
    grads = {name: full(p.grad) for name, p in named}
    norm = scale_grads_and_clip_grad_norm(
        MAX_NORM, parts, pp_enabled=True, device_mesh=world_mesh, pp_axis_name="pp"
    )
    torch.optim.SGD([p for _, p in named], LR).step()
    after = {name: full(p) for name, p in named} | update_biases(parts, world_mesh)
    return Step(total.item() / labels, norm, grads, after, [])


def update_biases(parts: list[TinyLM], world_mesh: Any) -> dict[str, torch.Tensor]:
    """The load since the last update and the bias after it, of each router that has one."""
    found = {}
    for name, gate in moe_gates(parts):
        load = gate._cumulative_expert_load.float()
        dist.all_reduce(load, group=get_submesh(world_mesh, "dp_cp").get_group())
        gate.update_bias()
        found |= {f"load of {name}": load, f"bias of {name}": full(gate.e_score_correction_bias)}
    return found


def moe_gates(parts: list[TinyLM]) -> list[tuple[str, Any]]:
    return [
        (plain_name(name), module.gate)
        for part in parts
        for name, module in part.named_modules()
        if isinstance(module, MoE) and module.gate.bias_update_factor
    ]


def _run_cases(
    rank: int, ranks: int, sizes: dict[str, int], cases: list[Case], tolerance: float
) -> list[str]:
    meshes = build_meshes(pp=2, **sizes)
    cp = sizes.get("cp", 1)
    length = 5 if cp == 1 else 4 * cp
    found = []
    for case in cases:
        count = case.steps * case.micro_batches
        batches = make_shards(ranks // 2 // cp, count, length=length, uneven=cp)
        actual = pipeline_step(case, meshes, batches)
        expected = one_process(case.model, batches, MAX_NORM, LR)
        gates = [name for name, _ in moe_gates([TinyLM(case.model)])]
        for name, load, bias in zip(gates, expected.loads, expected.biases, strict=True):
            expected.parameters |= {f"load of {name}": load.float(), f"bias of {name}": bias}
        expected.biases = []
        # A rank sees its own stages' parameters alone.
        for kind in ("grads", "parameters"):
            ours, theirs = getattr(actual, kind), getattr(expected, kind)
            setattr(expected, kind, {name: theirs[name] for name in ours})
        found += [f"{case}: {line}" for line in differences(actual, expected, tolerance)]
    return found


def check(
    sizes: dict[str, int], cases: list[Case], ranks: int = 4, tolerance: float = 1e-5
) -> None:
    results = run_ranks(ranks, _run_cases, sizes, cases, tolerance, timeout=240)
    assert results == [[]] * ranks


AUX = {"aux_loss_coeff": 0.1, "gate_bias_update_factor": 0.01}


def checkpointing(ac: str | bool) -> dict[str, Any]:
    """Options of ``parallelize_model`` for activation checkpointing that is router, full, ..."""
    options = {"activation_checkpointing": True if ac in ("router", "full") else ac}
    return {**options, "ignore_router_for_ac": ac != "full", "wrap_outer_model": False}


OUTER_ROOT = {"wrap_outer_model": True}
RESHARD = {"wrap_outer_model": False, "reshard_after_forward": True}
SPLIT = ("ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleDualPipeV")


def test_every_schedule_equals_one_process() -> None:
    check({"ep": 2}, [Case(schedule, steps=2, moe=AUX) for schedule in STAGES])


# So that each mode meets a schedule with a full backward and one with a split backward.
CHECKPOINTING = [
    Case(schedule, checkpointing(ac), steps=2, moe=AUX)
    for schedule, ac in zip(STAGES, itertools.cycle(("router", "full", "selective")))
]


def test_every_schedule_with_activation_checkpointing() -> None:
    check({"ep": 2}, CHECKPOINTING)


CONTEXT = [
    Case(schedule, steps=2, moe=AUX, shared_attention=True)
    for schedule in STAGES
    if schedule in ("Schedule1F1B", "ScheduleInterleavedZeroBubble", "ScheduleDualPipeV")
]


def test_context_expert_and_pipeline_parallelism_together() -> None:
    check({"cp": 2, "ep": 2}, CONTEXT)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"cp": 2, "ep": 4}, {"cp": 4, "ep": 2}, {"cp": 4}], ids=str)
def test_context_and_pipeline_parallelism_on_8_ranks(sizes: dict[str, int]) -> None:
    check(
        sizes, [replace(case, schedule=schedule) for case in CONTEXT[:1] for schedule in STAGES], 8
    )


def test_an_outer_root_reduces_in_every_schedule_step() -> None:
    check(
        {"ep": 2},
        [
            Case("Schedule1F1B", OUTER_ROOT),
            Case("ScheduleInterleavedZeroBubble", OUTER_ROOT, steps=2),
            Case("ScheduleGPipe", RESHARD, steps=2),
            Case("Schedule1F1B", OUTER_ROOT, reduce_each=True),
            Case("ScheduleInterleavedZeroBubble", OUTER_ROOT, reduce_each=True),
        ],
    )


def test_replicas_of_a_pipeline() -> None:
    case = Case("ScheduleInterleavedZeroBubble", steps=2, micro_batches=2, moe=AUX)
    check({"dp_replicate": 2, "ep": 2}, [case], ranks=8)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("ac", [False, "router", "full", "selective"], ids=lambda ac: f"ac={ac}")
def test_every_schedule_on_8_ranks(ep: int, ac: bool | str) -> None:
    cases = [Case(s, checkpointing(ac), n, moe=AUX) for s in STAGES for n in (1, 2)]
    check({"ep": ep}, cases, ranks=8)
    check({"ep": ep, "dp_replicate": 2}, cases[::2], ranks=8)


def _mixed_precision(rank: int, ranks: int) -> dict[str, float]:
    """Relative distance of a split backward's gradients from a full one's, default policy."""
    meshes = build_meshes(pp=2, ep=2)
    batches = make_shards(2, 8)
    options = {"wrap_outer_model": False, "mp_policy": None}
    expected, actual = (
        pipeline_step(Case(f"ScheduleInterleaved{kind}", options, steps=2), meshes, batches).grads
        for kind in ("1F1B", "ZeroBubble")
    )
    return {n: ((actual[n] - g).norm() / g.norm()).item() for n, g in expected.items()}


def test_a_split_backward_accumulates_in_float32() -> None:
    """The sums of 8 micro-batches would differ by half a percent in bfloat16."""
    for result in run_ranks(4, _mixed_precision):
        assert len(result) > 20
        assert max(result.values()) < 1e-4, result


def _refused(rank: int, ranks: int) -> None:
    meshes = build_meshes(pp=2, ep=2)
    for name in STAGES:
        schedule, _ = build_schedule(Case(name, RESHARD), meshes)
        if name not in SPLIT:
            install_pipeline_backward(schedule).remove()
            continue
        with pytest.raises(MeshError, match="needs reshard_after_forward=False"):
            install_pipeline_backward(schedule)
        stage = schedule._stages[0]
        assert "backward_maybe_with_nosync" not in vars(stage)
        with pytest.raises(MeshError, match="choose a schedule with full backward passes"):
            patched_backward_maybe_with_nosync(stage, "input", {})
        with install_pipeline_backward(build_schedule(Case(name), meshes)[0]):
            pass


def test_a_split_backward_of_resharded_parameters_is_refused() -> None:
    run_ranks(4, _refused)


WORK = [
    {"expert_bias": True, "aux_loss_coeff": 0.1, "moe_inter_dim": 64},
    {"expert_activation": "relu2", "n_shared_experts": 0, "moe_inter_dim": 64},
]


@pytest.mark.parametrize("ac", [None, {}, {"ignore_router": False}, {"selective": True}], ids=str)
@pytest.mark.parametrize("moe", WORK, ids=("swiglu", "relu2"))
def test_a_split_backward_does_the_work_of_a_full_one(moe: Any, ac: Any) -> None:
    model = TinyLM(ModelOptions(moe=moe))
    if ac is not None:
        apply_ac(model, **ac)
    # Without attention and norms, which do other work, where it can be.
    stage = SimpleNamespace(submod=model.moes()[0] if ac is None else model.model.layers["0"])
    x = torch.randn(2, 40, 16, requires_grad=True)
    padding_mask = torch.zeros(2, 40, dtype=torch.bool)
    costs = []
    for kinds in (["full"], ["input", "weight"]):
        stage.submod.zero_grad()
        y = stage.submod(x, padding_mask)
        inputs = {"stage_output": [y], "output_grads": [torch.ones_like(y)], "input_values": [x]}
        flops = []
        for kind in kinds:
            with FlopCounterMode(display=False) as counter:
                input_grads, groups = patched_backward_maybe_with_nosync(stage, kind, inputs)
            flops.append(counter.get_total_flops())
            inputs.setdefault("input_grads", input_grads)
            inputs["param_groups"] = groups
        x.grad = None
        grads = [inputs["input_grads"][0], *(p.grad.clone() for p in stage.submod.parameters())]
        costs.append((flops, grads))
    ([full_flops], expected), ((of_inputs, of_weights), actual) = costs
    assert of_inputs > 0
    assert of_inputs + of_weights <= 1.1 * full_flops
    # What a checkpoint computes again, it computes for both at once.
    assert of_weights > 0.4 * full_flops if ac is None else of_weights == 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
