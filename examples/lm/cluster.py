"""Processes, devices and meshes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_parallel.mesh import build_meshes, get_submesh, parallel_axis_names


@dataclass(frozen=True)
class Parallelism:
    """How a run uses its ranks. A resumed run may do otherwise: nothing here changes the result.

    Attributes:
        ep: over how many ranks the experts are spread; None for as many as divide both their
            number and that of the ranks.
        dp_replicate: groups of ranks that hold a copy of the parameters each.
        cp: ranks that share sequences.
        pp: stages of a pipeline that share the layers.
        ac: what to compute again in backward: "off", "full", "router" (all but the routing) or
            "selective".
        accumulate: parts in which a batch is computed, one after the other.
    """

    ep: int | None = None
    dp_replicate: int = 1
    cp: int = 1
    pp: int = 1
    ac: str = "off"
    accumulate: int = 1


@dataclass(frozen=True)
class Cluster:
    """The ranks of a run.

    Attributes:
        world_mesh, moe_mesh: all ranks in two arrangements; moe_mesh, None if every rank has all
            experts, has the axes ep_shard and ep.
        own_group: whether :meth:`stop` has a process group to end.
    """

    rank: int
    world: int
    device: torch.device
    parallelism: Parallelism
    world_mesh: DeviceMesh
    moe_mesh: DeviceMesh | None
    own_group: bool

    @property
    def data_rank(self) -> int:
        """Which of the :attr:`data_ranks` parts of the batch this rank has, or shares."""
        return get_submesh(self.world_mesh, "dp").get_local_rank()

    @property
    def data_ranks(self) -> int:
        return get_submesh(self.world_mesh, "dp").size()

    @property
    def sharing(self) -> int:
        """How many ranks share the dense parameters: those of a pipeline stage."""
        return self.world // self.parallelism.pp

    @property
    def stage(self) -> int:
        return self.world_mesh["pp"].get_local_rank()

    @property
    def stages(self) -> int:
        return self.parallelism.pp

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.stages - 1

    def describe(self) -> str:
        """The sizes of the meshes."""
        meshes = []
        for mesh in (self.world_mesh, self.moe_mesh):
            if mesh is not None:
                sizes = zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
                meshes.append(" x ".join(f"{name} {size}" for name, size in sizes))
        return ", experts: ".join(meshes)

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


def start(experts: int, parallelism: Parallelism) -> Cluster:
    """Join the ranks that torchrun started (or that the caller has joined), or be the only one.

    Each rank has a GPU of its own; where there are fewer of them than ranks, all compute on the
    CPU.
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
    ep = parallelism.ep
    try:
        world_mesh, moe_mesh = build_meshes(
            ep=math.gcd(max(1, world // parallelism.pp), experts) if ep is None else ep,
            dp_replicate=parallelism.dp_replicate,
            cp=parallelism.cp,
            pp=parallelism.pp,
            device_type=device.type,
        )
    except ValueError:
        if own_group:
            dist.destroy_process_group()
        raise
    return Cluster(dist.get_rank(), world, device, parallelism, world_mesh, moe_mesh, own_group)


def _choose_device() -> torch.device:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if gpus >= ranks:
        return torch.device("cuda", rank)
    if gpus and rank == 0:
        print(
            f"{ranks} ranks, of which each needs a GPU of its own, and {gpus} of them here: all "
            f"compute on the CPU. --nproc-per-node={gpus} computes on the GPU{'s' * (gpus > 1)}",
            flush=True,
        )
    return torch.device("cpu")


def _device_of_group() -> torch.device:
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
