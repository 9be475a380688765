"""The meshes that a model is parallelized over, by names of axes, and what they must cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_parallel.mesh import MeshError, get_submesh, is_mesh
from moe_parallel.refusals import refused_together


class Meshes(NamedTuple):
    """Parts of a model's meshes; None for an axis that is not given.

    Attributes:
        cp, ep: None for one rank, too.
        fsdp: of dense parameters; likewise.
        ep_shard: of experts' parameters, beside ``ep``; None where there is no ``fsdp``.
    """

    cp: Any
    ep: Any
    fsdp: Any
    ep_shard: Any


def _along(mesh: Any, names: str | Sequence[str] | None) -> Any:
    return None if names is None else get_submesh(mesh, names)


def _shared(mesh: Any) -> Any:
    return mesh if mesh is not None and mesh.size() > 1 else None


class Axes(NamedTuple):
    """The names of axes that :func:`parallelize_model` is given."""

    dp: Sequence[str] | None
    cp: str | None
    tp: str | None
    ep: str | None
    ep_shard: Sequence[str] | None

    def meshes(self, world_mesh: Any, moe_mesh: Any, count_experts: Callable[[], int]) -> Meshes:
        """The meshes along these axes, which cover every rank that shares a parameter.

        Args:
            world_mesh, moe_mesh: see :func:`parallelize_model`.
            count_experts: of the model; called with Expert Parallelism alone.

        Raises:
            AssertionError: tensor parallelism has more than one rank; or the experts cannot be
                spread evenly.
            KeyError: there is no such axis.
            MeshError: some ranks are not covered, and would train copies apart.
        """
        tp = 1 if self.tp is None else get_submesh(world_mesh, self.tp).size()
        assert tp == 1, f"parallelize_model: tensor parallelism is not supported; got size {tp}"
        cp = _shared(_along(world_mesh, self.cp))
        ep = None if moe_mesh is None else _shared(_along(moe_mesh, self.ep))
        if ep is not None:
            with refused_together(world_mesh):
                experts = count_experts()
                assert experts % ep.size() == 0, (
                    f"parallelize_model: n_routed_experts {experts} must be a multiple of the "
                    f"Expert Parallel size {ep.size()}"
                )
            check_ep_shard_axes(moe_mesh, self.ep, self.ep_shard)
        of_any_size = _along(world_mesh, self.dp)
        check_fsdp_axes(world_mesh, self.dp, of_any_size)
        fsdp = _shared(of_any_size)
        without = fsdp is None or moe_mesh is None
        ep_shard = None if without else _along(moe_mesh, self.ep_shard)
        if ep_shard is not None and (ep_shard.size() > 1 or ep is not None):
            check_experts_covered(moe_mesh, ep, ep_shard)
        return Meshes(cp, ep, fsdp, ep_shard)


def check_ep_shard_axes(
    moe_mesh: Any, ep_axis_name: str | None, ep_shard_axis_names: Sequence[str] | None
) -> None:
    """Expert Parallelism must say which axis shards the experts further.

    Raises:
        MeshError: there is one and it is not named.
    """
    if ep_shard_axis_names is not None:
        return
    names = getattr(moe_mesh, "mesh_dim_names", None)
    known = isinstance(names, (tuple, list))
    axes: Sequence[str] = names if known else ("ep_shard",)  # type: ignore[assignment]
    # A mesh of another framework may answer every name alike: then it has no such axis.
    if not known and _axis(moe_mesh, "ep_shard") is _axis(moe_mesh, ep_axis_name):
        return
    sizes = {axis: _size(_axis(moe_mesh, axis)) for axis in axes}
    left_out = {axis: sizes[axis] for axis in axes if axis not in (ep_axis_name, "pp")}
    if any(size > 1 for size in left_out.values()):
        raise MeshError(
            f"parallelize_model: moe_mesh has the axes {left_out} beside {ep_axis_name!r}, over "
            "which the experts' gradients would not be reduced. Pass ep_shard_axis_names="
            f"{tuple(left_out)}."
        )


def check_experts_covered(moe_mesh: Any, ep_mesh: Any | None, ep_shard_mesh: Any) -> None:
    """The axes of Expert Parallelism and of what shards the experts further must be all there are.

    Raises:
        MeshError: experts that are copies of each other would train apart.
    """
    if not is_mesh(moe_mesh):
        return
    names = moe_mesh.mesh_dim_names or ()
    sizes = {n: size for n, size in zip(names, moe_mesh.shape, strict=True) if n != "pp"}
    covered = ep_shard_mesh.size() * (1 if ep_mesh is None else ep_mesh.size())
    if covered < math.prod(sizes.values()):
        raise MeshError(
            f"parallelize_model: ep_axis_name and ep_shard_axis_names have {covered} ranks, but "
            f"{math.prod(sizes.values())} share the experts, {sizes}; the others would train "
            "apart. Pass the axes of parallel_axis_names(world_mesh, moe_mesh)."
        )


def _axis(mesh: Any, name: str | None) -> Any:
    """A mesh along an axis; None where there is none, of which each framework tells in its way."""
    try:
        return mesh[name]
    except Exception:
        return None


def _size(mesh: Any) -> int:
    """The ranks of a mesh; 1 where one of another framework does not tell."""
    try:
        size = mesh.size()
    except Exception:
        return 1
    return size if isinstance(size, int) else 1


def check_fsdp_axes(world_mesh: Any, dp_axis_names: Any, fsdp_mesh: Any) -> None:
    """FSDP must cover every axis along which ranks share the dense parameters.

    Raises:
        MeshError: replicas, or context parallel ranks, would train apart.
    """
    if not is_mesh(world_mesh) or fsdp_mesh is None:
        return
    sizes = dict(zip(world_mesh.mesh_dim_names or (), world_mesh.shape, strict=True))
    sharing = {axis: sizes[axis] for axis in ("dp_replicate", "dp_shard", "cp") if axis in sizes}
    needed = math.prod(sharing.values())
    if fsdp_mesh.size() < needed:
        raise MeshError(
            f"parallelize_model: dp_axis_names {dp_axis_names!r} has {fsdp_mesh.size()} ranks, "
            f"but {needed} share the parameters, {sharing}; the others would train apart. Pass the "
            "axes of parallel_axis_names(world_mesh, moe_mesh)."
        )
