"""Processes, devices and meshes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Cluster:
    """The ranks of a run.

    Attributes:
        dp: all ranks: each has its own part of the batch.
        moe: the same ranks as (ep_shard, ep): the experts are spread over ep.
        own_group: whether :meth:`stop` has a process group to end.
    """

    rank: int
    world: int
    device: torch.device
    dp: DeviceMesh
    moe: DeviceMesh
    own_group: bool

    @property
    def expert_parallel(self) -> int:
        return self.moe["ep"].size()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def stop(self) -> None:
        if self.own_group:
            dist.destroy_process_group()


def start(experts: int) -> Cluster:
    """Join the ranks that torchrun started (or that the caller has joined), or be the only one.

    Experts are spread over as many ranks as divide both their number and that of the ranks.
    """
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"one rank needs one GPU: local rank {local} finds {torch.cuda.device_count()}. "
            "Start torchrun with fewer processes, or hide the GPUs (CUDA_VISIBLE_DEVICES=)."
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # so that a GPU repeats a run bit for bit, as a CPU does anyway
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    own_group = not dist.is_initialized()
    if own_group and "RANK" in os.environ:
        dist.init_process_group(backend)
    elif own_group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    ep = math.gcd(world, experts)
    return Cluster(
        rank=dist.get_rank(),
        world=world,
        device=device,
        dp=init_device_mesh(device.type, (world,), mesh_dim_names=("dp",)),
        moe=init_device_mesh(device.type, (world // ep, ep), mesh_dim_names=("ep_shard", "ep")),
        own_group=own_group,
    )
