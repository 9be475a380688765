"""Device meshes: which ranks do what together.

The world is a mesh with the axes ``pp, dp_replicate, dp_shard, cp, tp``; neighbouring ranks share
the last ones. Experts see the same ranks, without ``pp``, as ``ep_shard, ep``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_parallel.torch_internals import flatten_mesh, flattened_meshes, unflatten_mesh

ROOT_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
_FLATTENED_AXES = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
}
_EXPERT_AXES = ("dp_replicate", "dp_shard", "cp", "tp")


class MeshError(ValueError):
    """A mesh that cannot be built, or that does not fit the model."""


def build_meshes(
    *,
    dp_replicate: int = 1,
    cp: int = 1,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    world_size: int | None = None,
    device_type: str | None = None,
) -> tuple[DeviceMesh, DeviceMesh | None]:
    """Arrange the ranks of the default process group.

    Data parallelism takes what the others leave: ``dp = world_size / (tp * cp * pp)``. Expert
    Parallelism adds no ranks: it divides the ``dp * cp * tp`` ranks of a pipeline stage into groups
    of ``ep`` consecutive ones, each of which holds every expert once.

    Args:
        dp_replicate: how many groups of data-parallel ranks hold a copy of the parameters each.
        cp, tp, pp, ep: sizes of context, tensor, pipeline and Expert Parallelism.
        world_size: number of ranks; None for that of the default process group.
        device_type: "cuda" or "cpu"; None for what the default process group communicates on.

    Returns:
        ``(world_mesh, moe_mesh)``. world_mesh has :data:`ROOT_AXES`, and flattened ``dp``
        (replicate x shard), ``dp_shard_cp`` and ``dp_cp``, see :func:`get_submesh`. moe_mesh has
        ``ep_shard`` and ``ep``; it is None for ``ep = 1``.

    Raises:
        MeshError: sizes that do not fit, or, where the default group has gloo, that are others on
            another rank; on every rank, before any mesh is made.
    """
    sizes = {"dp_replicate": dp_replicate, "cp": cp, "tp": tp, "pp": pp, "ep": ep}
    _check_same_sizes({**sizes, "device_type": device_type})
    world_size = _world_size(world_size)
    dp = _data_parallel_size(sizes, world_size)
    device_type = _device_type() if device_type is None else _checked(device_type)

    shape = (pp, dp_replicate, dp // dp_replicate, cp, tp)
    world_mesh = init_device_mesh(device_type, shape, mesh_dim_names=ROOT_AXES)
    for name, axes in _FLATTENED_AXES.items():
        flatten_mesh(world_mesh[axes], name)
    if ep == 1:
        return world_mesh, None
    # From the root: FSDP joins the two meshes of a parameter only if they share it.
    ranks_of_stage = flatten_mesh(world_mesh[_EXPERT_AXES], "ep_shard_ep")
    sizes_of_experts = (dp * cp * tp // ep, ep)
    return world_mesh, unflatten_mesh(ranks_of_stage, sizes_of_experts, ("ep_shard", "ep"))


def _world_size(given: int | None) -> int:
    actual = dist.get_world_size() if dist.is_initialized() else None
    if given is None and actual is None:
        raise MeshError(
            "build_meshes: there is no process group. Call torch.distributed.init_process_group() "
            "first, or give world_size."
        )
    if given is not None and actual is not None and given != actual:
        raise MeshError(
            f"build_meshes: world_size must be that of the default process group, {actual}; "
            f"got {given}"
        )
    size = actual if given is None else given
    assert size is not None
    return size


def _check_same_sizes(sizes: dict[str, Any]) -> None:
    """Ranks that divide the world otherwise would wait for each other. Collective where tensors on
    the CPU can travel: before there is a mesh, NCCL may not know which GPU is whose."""
    if not dist.is_initialized() or "gloo" not in dist.get_backend_config():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sizes)
    for rank, others in enumerate(everyone):
        for name, size in everyone[0].items():
            if others[name] != size:
                raise MeshError(
                    f"build_meshes: {name} must be the same on all ranks; got {size!r} on rank 0 "
                    f"and {others[name]!r} on rank {rank}"
                )


def _data_parallel_size(sizes: dict[str, int], world_size: int) -> int:
    for name, size in {**sizes, "world_size": world_size}.items():
        if not isinstance(size, int) or size < 1:
            raise MeshError(f"build_meshes: {name} must be a positive integer; got {size!r}")
    dp_replicate, cp, tp, pp, ep = sizes.values()
    model = tp * cp * pp
    if world_size % model:
        raise MeshError(
            f"build_meshes: the number of ranks must be a multiple of tp * cp * pp = {tp} * {cp} * "
            f"{pp} = {model}; got {world_size} ranks"
        )
    dp = world_size // model
    if dp % dp_replicate:
        raise MeshError(
            f"build_meshes: dp_replicate must divide dp = {dp} ({world_size} ranks / (tp * cp * "
            f"pp)); got {dp_replicate}"
        )
    if dp_replicate > 1 and dp_replicate >= dp:
        raise MeshError(
            f"build_meshes: dp_replicate must be smaller than dp = {dp}, so that every replica is "
            f"sharded; got {dp_replicate}. Use dp_replicate=1 to shard over all {dp} ranks."
        )
    if (dp * cp * tp) % ep:
        raise MeshError(
            f"build_meshes: ep must divide dp * cp * tp = {dp} * {cp} * {tp} = {dp * cp * tp}; "
            f"got {ep}"
        )
    return dp


def _checked(device_type: Any) -> str:
    known = ""
    with suppress(RuntimeError, TypeError):
        known = torch.device(device_type).type
    if not known or device_type != known:
        raise MeshError(
            'build_meshes: device_type must be a kind of device, as "cuda" or "cpu"; got '
            f"{device_type!r}"
        )
    return known


def _device_type() -> str:
    uses_gpus = dist.is_initialized() and "cuda:nccl" in dist.get_backend_config()
    return "cuda" if uses_gpus and torch.cuda.is_available() else "cpu"


def parallel_axis_names(world_mesh: DeviceMesh, moe_mesh: DeviceMesh | None) -> dict[str, Any]:
    """The axis keywords of :func:`parallelize_model` for meshes of :func:`build_meshes`.

    Args:
        world_mesh, moe_mesh: what :func:`build_meshes` has returned.

    Returns:
        The keywords by name: ``dp_axis_names`` with "dp_replicate" only where there are replicas;
        those of the experts None without ``moe_mesh``.
    """
    replicas = world_mesh.size(ROOT_AXES.index("dp_replicate"))
    return {
        "dp_axis_names": ("dp_replicate", "dp_shard_cp") if replicas > 1 else ("dp_shard_cp",),
        "cp_axis_name": "cp",
        "tp_axis_name": "tp",
        "ep_axis_name": None if moe_mesh is None else "ep",
        "ep_shard_axis_names": None if moe_mesh is None else ("ep_shard",),
    }


def is_mesh(mesh: Any) -> bool:
    """Whether ``mesh`` is PyTorch's own, not something that stands in for one."""
    return issubclass(type(mesh), DeviceMesh)


def get_submesh(mesh: Any, names: str | Sequence[str]) -> Any:
    """The part of a mesh along some of its axes.

    Args:
        mesh: a DeviceMesh; its flattened axes are found if it is the root they were made from.
            Anything else, of a framework that has its own meshes, is indexed with ``names``.
        names: one axis, native or flattened, or several. Of several, flattened ones are allowed
            where another flattened axis covers exactly all of them, as ``dp_cp`` covers
            ``("dp_replicate", "dp_shard_cp")``; they must be given in its order.

    Raises:
        KeyError: there is no such axis, or no such combination.
        TypeError: there is no mesh.
    """
    if mesh is None:
        raise TypeError(f"get_submesh: mesh must be a DeviceMesh, to have {names!r}; got None")
    if not is_mesh(mesh):
        return _indexed(mesh, names if isinstance(names, str) else tuple(names))
    names = (names,) if isinstance(names, str) else tuple(names)
    native = mesh.mesh_dim_names or ()
    if all(name in native for name in names):
        return mesh[names]
    flattened = flattened_meshes(mesh) if mesh == mesh._get_root_mesh() else {}
    unknown = [name for name in names if name not in native and name not in flattened]
    if unknown:
        raise KeyError(
            f"get_submesh: the mesh has no axis {', '.join(map(repr, unknown))}; it has "
            f"{', '.join((*native, *flattened))}"
        )
    if len(names) == 1:
        return flattened[names[0]]
    axes = [flattened[name] if name in flattened else mesh[name] for name in names]
    sizes = tuple(axis.size() for axis in axes)
    for parent in flattened.values():
        if parent.size() == math.prod(sizes) and _axes_match(parent, axes, sizes):
            return unflatten_mesh(parent, sizes, names)
    raise KeyError(
        f"get_submesh: no flattened axis of the mesh covers {names} in this order; flattened axes "
        f"are {', '.join(flattened)}"
    )


def _indexed(mesh: Any, names: str | tuple[str, ...]) -> Any:
    """A part of another framework's mesh, which may know one axis by its plain name alone."""
    try:
        return mesh[names]
    except Exception:
        if isinstance(names, str) or len(names) != 1:
            raise
    return mesh[names[0]]


def ranks_of_ep_shard(moe_mesh: Any, ep_axis_name: str) -> int:
    """S: the ranks of a pipeline stage over those of an Expert Parallel group."""
    size: int = moe_mesh.size() // get_submesh(moe_mesh, ep_axis_name).size()
    names = getattr(moe_mesh, "mesh_dim_names", None)
    if isinstance(names, (tuple, list)) and "pp" in names:  # in the meshes of some frameworks
        size //= get_submesh(moe_mesh, "pp").size()
    return size


def ranks_of_stage(ep_mesh: Any, moe_mesh: Any | None) -> Any:
    """The mesh of all ranks whose tokens experts of ``ep_mesh`` see, or copies of those experts:
    ``moe_mesh`` without pipeline stages, ``ep_mesh`` where there is none."""
    names = moe_mesh.mesh_dim_names if moe_mesh is not None and is_mesh(moe_mesh) else None
    if names is None:
        return ep_mesh
    return get_submesh(moe_mesh, [name for name in names if name != "pp"])


def groups_of(mesh: DeviceMesh) -> list[Any]:
    """Process groups over which one reduction after the other covers the mesh: one, if there is."""
    for flat in flattened_meshes(mesh).values():
        if torch.equal(flat.mesh, mesh.mesh.flatten()):
            return [flat.get_group()]
    return [mesh.get_group(axis) for axis in mesh.mesh_dim_names or ()]


def pipeline_of(mesh: Any) -> Any | None:
    """The ranks, one a stage, that run this rank's pipeline; None without a pipeline."""
    if not is_mesh(mesh):
        return None
    root = mesh._get_root_mesh()
    names = root.mesh_dim_names or ()
    return root["pp"] if "pp" in names and root.size(names.index("pp")) > 1 else None


def _axes_match(parent: DeviceMesh, axes: list[DeviceMesh], sizes: tuple[int, ...]) -> bool:
    """Whether ``parent``, cut into ``sizes``, has the groups of ``axes`` along them."""
    grid = parent.mesh.reshape(sizes)
    position = (grid == parent.get_rank()).nonzero()[0]
    for dim, axis in enumerate(axes):
        line = [slice(None) if d == dim else int(position[d]) for d in range(len(axes))]
        if not torch.equal(grid[tuple(line)], axis.mesh):
            return False
    return True
