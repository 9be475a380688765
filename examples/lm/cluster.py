"""Processes, devices and meshes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_parallel.mesh import build_meshes, parallel_axis_names


@dataclass(frozen=True)
class Cluster:
    """The ranks of a run.

    Attributes:
        world_mesh, moe_mesh: all ranks in two arrangements. Each has its own part of the batch;
            moe_mesh, None if every rank has all experts, has the axes ep_shard and ep.
        own_group: whether :meth:`stop` has a process group to end.
    """

    rank: int
    world: int
    device: torch.device
    world_mesh: DeviceMesh
    moe_mesh: DeviceMesh | None
    own_group: bool

    @property
    def expert_parallel(self) -> int:
        """Over how many ranks the experts are spread."""
        return 1 if self.moe_mesh is None else self.moe_mesh["ep"].size()

    @property
    def axes(self) -> dict[str, Any]:
        """What the axes of the meshes are for."""
        return parallel_axis_names(self.world_mesh, self.moe_mesh)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        float(self.sum(torch.zeros((), device=self.device)))

    def stop(self) -> None:
        if self.own_group:
            dist.destroy_process_group()


def start(experts: int) -> Cluster:
    """Join the ranks that torchrun started (or that the caller has joined), or be the only one.

    Experts are spread over as many ranks as divide both their number and that of the ranks. Each
    rank has a GPU of its own; where there are fewer of them than ranks, all compute on the CPU.
    """
    own_group = not dist.is_initialized()
    device = _choose_device() if own_group else _device_of_group()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # so that a GPU repeats a run bit for bit, as a CPU does anyway
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if own_group and "RANK" in os.environ:
        dist.init_process_group(backend)
    elif own_group:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    world = dist.get_world_size()
    world_mesh, moe_mesh = build_meshes(ep=math.gcd(world, experts), device_type=device.type)
    return Cluster(dist.get_rank(), world, device, world_mesh, moe_mesh, own_group)


def _choose_device() -> torch.device:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if gpus >= ranks:
        return torch.device("cuda", rank)
    if gpus and rank == 0:
        print(f"{ranks} ranks and {gpus} GPUs here: on the CPU", flush=True)
    return torch.device("cpu")


def _device_of_group() -> torch.device:
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
