"""What a pipeline stage does by itself: data parallel stages, one rank's split backward, errors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from moe_parallel import fsdp_mixin
from moe_parallel.fsdp_mixin import (
    install_pipeline_backward,
    patched_backward_maybe_with_nosync,
)
from moe_parallel.mesh import MeshError, build_meshes, parallel_axis_names
from moe_parallel.parallelizer import apply_ep, parallelize_model
from moe_parallel.training import prepare_for_final_backward
from tests.parallel.ranks import run_ranks
from tests.parallel.test_parallelize_model import FP32, full
from tests.parallel.test_pipeline import Case, build_schedule, join, sum_of_losses
from tests.parallel.tiny_lm import ModelOptions, TinyLM, make_shards


def single_stage(kind: Any, module: nn.Module, loss_fn: Any, micro_batches: int) -> Any:
    """A schedule of one stage."""
    pp = build_meshes()[0]["pp"]
    stage = PipelineStage(module, 0, 1, torch.device("cpu"), group=pp.get_group())
    return kind(stage, micro_batches, loss_fn=loss_fn, scale_grads=False)


def squares(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().sum()


def _data_parallel(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    model, expected = nn.Linear(3, 2), nn.Linear(3, 2)
    expected.load_state_dict(model.state_dict())
    x, target = torch.randn(ranks, 6, 3), torch.randn(ranks, 6, 2)
    schedule = single_stage(ScheduleGPipe, DistributedDataParallel(model), squares, 3)
    with install_pipeline_backward(schedule):
        schedule.step(x[rank], target=target[rank])
    (squares(expected(x), target) / ranks).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_data_parallel_stage_reduces_once() -> None:
    run_ranks(2, _data_parallel)


class StandInDDP:
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.reducer = SimpleNamespace(prepare_for_backward=self.log.append)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.log.append("no_sync")
        yield
        self.log.append("sync")


def test_a_data_parallel_stage_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp_mixin, "DistributedDataParallel", StandInDDP)
    stage = SimpleNamespace(submod=StandInDDP())
    log = stage.submod.log
    monkeypatch.setattr(fsdp_mixin, "stage_backward", lambda *args: log.append("backward"))
    y = torch.ones(1)
    inputs = {"stage_output": (y, [y]), "output_grads": None, "input_values": []}
    patched_backward_maybe_with_nosync(stage, "full", inputs)
    assert log == ["no_sync", "backward", "sync"]
    log.clear()
    patched_backward_maybe_with_nosync(stage, "full", inputs, last_backward=True)
    assert log == [[y, y], "backward"]

    step = SimpleNamespace(computation_type=SimpleNamespace(name="BACKWARD_WEIGHT"))
    schedule = SimpleNamespace(_stages=[stage], pipeline_order_with_comms={0: [None, step]})
    with pytest.raises(MeshError, match="does not reduce the gradients of a Distributed"):
        install_pipeline_backward(schedule)


def test_all_reductions_start_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def configure(unit: str, **flags: bool) -> None:
        assert list(flags.values()) == [True] * 3
        log.append(f"configure {unit}")

    def start(unit: str) -> Any:
        log.append(f"reduce {unit}")
        return lambda: log.append(f"wait for {unit}")

    monkeypatch.setattr(fsdp_mixin, "_iter_fsdp_modules", lambda module: iter(module))
    monkeypatch.setattr(fsdp_mixin, "_configure_fsdp_module", configure)
    monkeypatch.setattr(fsdp_mixin, "_run_post_backward_hooks", start)
    fsdp_mixin._run_post_backward_for_moe_module(["a", "b"])
    assert log == [
        f"{what} {unit}" for what in ("configure", "reduce", "wait for") for unit in "ab"
    ]


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_kernels":
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


LAYERS = [
    {"expert_bias": True, "aux_loss_coeff": 0.1, "router_bias": True},
    {"expert_activation": "relu2", "moe_latent_size": 8, "shared_expert_gate": True},
]


def _exchanges(rank: int, ranks: int, moe: dict[str, Any]) -> None:
    model = TinyLM(ModelOptions(moe=moe))
    apply_ep(model, build_meshes(ep=ranks)[1]["ep"])
    block = model.model.layers["0"]
    stage = SimpleNamespace(submod=block)
    torch.manual_seed(rank)
    x = torch.randn(2, 5 + rank, 16, requires_grad=True)
    runs = []
    for kinds in (["full"], ["input", "weight"]):
        block.zero_grad()
        y = block(x, torch.zeros(x.shape[:2], dtype=torch.bool))
        inputs = {"stage_output": [y], "output_grads": [torch.ones_like(y)], "input_values": [x]}
        counts = []
        for kind in kinds:
            with OpCounter() as counter:
                grads, groups = patched_backward_maybe_with_nosync(stage, kind, inputs)
            counts.append(counter.counts)
            inputs.setdefault("input_grads", grads)
            inputs["param_groups"] = groups
        x.grad = None
        grads = [inputs["input_grads"][0], *(full(p.grad) for p in block.parameters())]
        runs.append((counts, grads))
    ((whole,), expected), ((first, second), actual) = runs
    halves = [f"dispatch_backward_{half}" for half in ("start", "finish")]
    for op in (*halves, "combine_backward", "topk_router_backward"):
        assert (whole[op], first[op], second[op]) == (1, 1, 0), op
    assert whole["aux_loss_gradient"] == first["aux_loss_gradient"] + second["aux_loss_gradient"]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("moe", LAYERS, ids=str)
def test_a_split_backward_exchanges_once(moe: dict[str, Any]) -> None:
    run_ranks(2, _exchanges, moe)


class Interrupted(Exception):
    pass


def _interrupted(rank: int, ranks: int, options: dict[str, Any]) -> None:
    meshes, grads = build_meshes(ep=2), []
    shards = [batch[rank] for batch in make_shards(ranks, 4)]
    whole = join(shards)
    for fail in (False, True):
        model = TinyLM()
        parallelize_model(model, *meshes, **parallel_axis_names(*meshes), **options)
        calls = itertools.count()

        def loss(
            y: torch.Tensor, target: torch.Tensor, fail: bool = fail, calls: Any = calls
        ) -> Any:
            if fail and next(calls) == 3:  # the first call infers shapes
                raise Interrupted
            return sum_of_losses(y, target)

        def step(model: TinyLM = model, loss: Any = loss) -> None:
            prepare_for_final_backward([model], pp_enabled=True)
            schedule = single_stage(Schedule1F1B, model, loss, 4)
            with install_pipeline_backward(schedule):
                schedule.step(whole.ids, padding_mask=whole.padding_mask, target=whole.labels)

        if fail:
            with pytest.raises(Interrupted):
                step()
            model.zero_grad()
        step()
        grads.append([full(p.grad) for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("policy", [None, MixedPrecisionPolicy(**FP32)], ids=("bf16", "fp32"))
def test_a_step_after_an_interrupted_one(outer: bool, policy: Any) -> None:
    """Nothing is left of the gradients of micro-batches before the exception."""
    run_ranks(2, _interrupted, {"wrap_outer_model": outer, "mp_policy": policy})


def test_tied_embeddings_in_different_stages_are_refused() -> None:
    for index, stages in ((0, 2), (1, 2), (1, 3)):
        part = TinyLM(ModelOptions(tied=True)).keep_stage(index, stages)
        stage = SimpleNamespace(submod=part, stage_index=index, num_stages=stages)
        with pytest.raises(MeshError, match=f"stage {index} of {stages} does not hold both"):
            install_pipeline_backward(SimpleNamespace(_stages=[stage]))
        assert "backward_maybe_with_nosync" not in vars(stage)
    whole = SimpleNamespace(submod=TinyLM(ModelOptions(tied=True)), num_stages=1)
    install_pipeline_backward(SimpleNamespace(_stages=[whole])).remove()


class WithoutMixin(nn.Module):
    """A stage of somebody else's class, which accumulates nothing by itself."""

    def __init__(self, part: TinyLM) -> None:
        super().__init__()
        self.config, self.model, self.lm_head = part.config, part.model, part.lm_head
        self.forward = part.forward


def _refused_by_one_rank(rank: int, ranks: int) -> list[str]:
    meshes, found = build_meshes(pp=2, ep=2), []
    second = meshes[0]["pp"].get_local_rank() == 1

    def refuse(schedule: Any) -> None:
        with pytest.raises(MeshError) as error:
            install_pipeline_backward(schedule)
        assert all("backward_maybe_with_nosync" not in vars(s) for s in schedule._stages)
        found.append(str(error.value))

    for second_reshards in (True, False):
        options = {"wrap_outer_model": False, "reshard_after_forward": second and second_reshards}
        case = Case("ScheduleInterleavedZeroBubble", options)
        schedule, parts = build_schedule(case, meshes)
        if not second_reshards:
            install_pipeline_backward(schedule).remove()
            if second:
                schedule._stages[1].submod = WithoutMixin(parts[1])
        refuse(schedule)
    full_backward, parts = build_schedule(Case("Schedule1F1B", options), meshes)
    full_backward._stage.submod = WithoutMixin(parts[0])
    install_pipeline_backward(full_backward).remove()
    return found


def test_what_one_rank_is_refused_with_all_are() -> None:
    first, *others = run_ranks(4, _refused_by_one_rank)
    assert all(other == first for other in others)
    assert all(line.endswith("(on rank 1 of the pipeline)") for line in first)
    assert "needs reshard_after_forward=False" in first[0]
    assert "got WithoutMixin. Derive its class from MoEFSDPSyncMixin, pass wrap_outer" in first[1]
