"""A model in training, on any mesh, whose whole state can be compared with another's."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_parallel.mesh import build_meshes, parallel_axis_names
from moe_parallel.module_names import plain_name
from moe_parallel.parallelizer import parallelize_model
from moe_parallel.tensors import local_tensor
from tests.parallel.tiny_lm import ModelOptions, TinyLM

MOE = {
    "gate_bias_update_factor": 0.01,
    "shared_expert_gate": True,  # a weight of one row: most ranks have none of it
    "router_bias": True,
    "expert_bias": True,
    "dim": 18,
    "moe_inter_dim": 12,
}
FP32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}


@dataclass(frozen=True)
class Case:
    """Sizes for build_meshes, and the rest of what a run chooses."""

    sizes: dict[str, int] = field(default_factory=dict)
    model: ModelOptions = field(default_factory=lambda: ModelOptions(moe=MOE, layers=4))
    options: dict[str, Any] = field(default_factory=dict)
    stages_a_rank: int = 1
    optimizer: dict[str, Any] = field(default_factory=dict)


class Run:
    """A model, AdamW with groups, and a schedule. Gradients are given: the same on every mesh."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.parts = [TinyLM(case.model)]
        self.meshes: tuple[Any, Any] = (None, None)
        if dist.is_initialized():
            world_mesh, moe_mesh = self.meshes = build_meshes(**case.sizes)
            pp, stage = world_mesh["pp"].size(), world_mesh["pp"].get_local_rank()
            count = pp * case.stages_a_rank
            if count > 1:
                indices = range(stage, count, pp)
                self.parts = [TinyLM(case.model).keep_stage(i, count) for i in indices]
            for part in self.parts:
                parallelize_model(
                    part,
                    world_mesh,
                    moe_mesh,
                    **parallel_axis_names(world_mesh, moe_mesh),
                    mp_policy=MixedPrecisionPolicy(**FP32),
                    **{"wrap_outer_model": count == 1, **case.options},
                )
        experts = [p for name, p in self.named() if "experts" in name]
        known = {id(p) for p in experts}
        others = [p for _, p in self.named() if id(p) not in known]
        groups = [{"params": others}, {"params": experts, "lr": 0.02, "weight_decay": 0.3}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, **case.optimizer)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.seed = seed
        with torch.no_grad():
            for _, parameter in self.named():
                local_tensor(parameter).add_(seed)  # so that nothing is right before it is loaded

    def named(self) -> list[tuple[str, Any]]:
        return [(plain_name(n), p) for part in self.parts for n, p in part.named_parameters()]

    def gates(self) -> dict[str, Any]:
        return {
            plain_name(name): module
            for part in self.parts
            for name, module in part.named_modules()
            if hasattr(module, "update_bias")
        }

    def step(self, number: int) -> None:
        """One optimizer step with gradients, and expert loads, drawn from names and ``number``."""
        for name, parameter in self.named():
            grad = drawn(f"{name} {number}", tuple(parameter.shape))
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(
                    grad, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.load(number)
        for gate in self.gates().values():
            gate.update_bias()

    def load(self, number: int) -> None:
        """Give every router a load; that of all ranks is the same on every mesh."""
        for name, gate in self.gates().items():
            total = (drawn(f"{name} {number}", (gate.n_experts,)) * 100).round().to(torch.int64)
            buffer = gate.e_score_correction_bias
            own = total
            if isinstance(buffer, DTensor):
                rank, ranks = buffer.device_mesh.get_rank(), buffer.device_mesh.size()
                last = buffer.device_mesh.mesh.max().item()
                own = total // ranks + (total % ranks if rank == last else 0)
            before = gate._cumulative_expert_load
            gate._cumulative_expert_load = own if before is None else before + own

    def state(self) -> dict[str, Any]:
        """Everything that this rank knows of, whole."""
        found: dict[str, Any] = {}
        for name, parameter in self.named():
            found[name] = whole(parameter)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name} {key}"] = whole(value)
            options = next(g for g in self.optimizer.param_groups if in_group(parameter, g))
            found[f"{name} options"] = (options["lr"], options["weight_decay"], options["betas"])
        for name, gate in self.gates().items():
            found[f"{name} bias"] = whole(gate.e_score_correction_bias)
            found[f"{name} master"] = gate.e_score_correction_bias_master
        found["schedule"] = self.scheduler.state_dict()
        return found


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def in_group(parameter: Tensor, group: dict[str, Any]) -> bool:
    return any(parameter is other for other in group["params"])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def together(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one; what several have must be equal."""
    joined: dict[str, Any] = {}
    for state in states:
        assert not differences(joined, {k: v for k, v in state.items() if k in joined})
        joined |= state
    return joined


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of ``b`` whose values in ``a`` are not equal, bit for bit."""
    return [name for name, value in b.items() if name not in a or not equal(a[name], value)]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)
