"""Tensors that may be DTensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiably; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def draw_normal(tensor: Tensor, std: float) -> None:
    """Fill ``tensor`` from N(0, std); of a DTensor this rank's part.

    On ranks that are seeded alike, copies of a part get equal numbers, and other parts others.
    """
    if not isinstance(tensor, DTensor):
        tensor.normal_(0.0, std)
        return
    local, mesh, part = tensor.to_local(), tensor.device_mesh, 0
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            part = part * mesh.size(dim) + mesh.get_local_rank(dim)
    seed = int(torch.randint(2**62, (), device="cpu")) + part
    if not local.is_meta:
        generator = torch.Generator(local.device).manual_seed(seed)
        local.normal_(0.0, std, generator=generator)
