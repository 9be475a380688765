"""What this package uses of PyTorch's private interfaces, 2.11 to 2.13, and nothing else does."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh


def flattened_meshes(mesh: DeviceMesh) -> dict[str, DeviceMesh]:
    """The 1-D meshes, by axis, made by :func:`flatten_mesh` of the root that ``mesh`` is part of.

    Slicing a root by such an axis is deprecated: a mesh has to be kept by whoever made it.
    """
    return mesh._get_root_mesh()._flatten_mapping


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """``mesh`` as a 1-D mesh of the same root, with the axis ``name``. Collective over the root."""
    return mesh._flatten(name)


def unflatten_mesh(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """The 1-D ``mesh`` as a mesh of several axes of the same root. Collective over the root."""
    return mesh._unflatten(0, sizes, names)


def fsdp_param_groups(state: Any) -> list[Any]:
    """The parameter groups of an FSDP state: one attribute in 2.11, a list from 2.13."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if isinstance(groups, (list, tuple)):
        return list(groups)
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]
