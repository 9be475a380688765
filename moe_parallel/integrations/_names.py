"""Which tensor of a transformers checkpoint is which part of a :class:`TransformersMoE`.

E experts, D hidden size of the experts, I intermediate size, W = 2 * I columns for gated
activations, else I.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_parallel.module_names import plain_name

if TYPE_CHECKING:
    from moe_parallel.integrations._layers import TransformersMoE

FORMATS = ("checkpoint", "module")  # names on the hub, and names in the transformers module


@dataclass(frozen=True)
class Part:
    """A checkpoint's tensor as a part of one of the layer's.

    Attributes:
        name: in the checkpoint, relative to the block.
        ours: name of the layer's tensor.
        expert: the entry of dimension 0, or None for all.
        columns: start and end in the last dimension, or None for all.
        transposed: the checkpoint stores the last two dimensions swapped.
        row: the checkpoint stores the vector as a matrix of one row.
    """

    name: str
    ours: str
    expert: int | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False
    row: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The checkpoint's tensor, a view of the layer's whole ``tensor``."""
        if self.columns is not None:
            tensor = tensor[..., slice(*self.columns)]
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.mT
        return tensor[None] if self.row else tensor

    def write(self, value: Tensor, target: Tensor) -> None:
        """Copy the checkpoint's ``value`` to where it belongs in ``target``, the layer's tensor.

        Of a sharded target each rank writes its own shard; no rank talks to another.
        """
        value = value[0] if self.row else value
        value = value.mT if self.transposed else value
        value = value if self.expert is None else value[None]
        start = [0] * value.dim()
        if self.expert is not None:
            start[0] = self.expert
        if self.columns is not None:
            start[-1] = self.columns[0]
        _write_region(value, start, target)


def _write_region(value: Tensor, start: list[int], target: Tensor) -> None:
    """``target[start : start + value.shape] = value``, on each rank the part it has of it."""
    shape, offset = list(target.shape), [0] * target.dim()
    local = target
    if isinstance(target, DTensor):
        local = target.to_local()
        shape, offset = map(
            list,
            compute_local_shape_and_global_offset(
                target.shape, target.device_mesh, target.placements
            ),
        )
    into, out_of = [], []
    for size, begin, length, first in zip(value.shape, start, shape, offset, strict=True):
        low, high = max(begin, first), min(begin + size, first + length)
        if low >= high:
            return
        into.append(slice(low - first, high - first))
        out_of.append(slice(low - begin, high - begin))
    with torch.no_grad():
        local[tuple(into)].copy_(value[tuple(out_of)])


def parts(layer: TransformersMoE, names: str) -> Iterator[Part]:
    """Every tensor of the block, by the names of "checkpoint" or "module" (see FORMATS)."""
    family, experts = layer.family, layer.experts
    published = names == "checkpoint"

    def spelled(name: str) -> str:
        for beginning, other in family.published.items() if published else ():
            if name.startswith(beginning):
                return other + name.removeprefix(beginning)
        return name

    yield Part(spelled(family.router_weight), "gate.weight")
    if family.router_bias is not None:
        yield Part(spelled(family.router_bias), "gate.bias")
    if family.correction is not None:
        name = spelled(family.correction)
        yield Part(name, "gate.e_score_correction_bias", row=family.correction_row)
    if family.shared is not None and layer.shared_experts is not None:
        for name in map(plain_name, dict(layer.shared_experts.named_parameters())):
            yield Part(spelled(f"{family.shared}.{name}"), f"shared_experts.{name}")
    if family.shared_gate is not None:
        yield Part(spelled(f"{family.shared_gate}.weight"), "shared_expert_gate.weight")
    if published and family.expert_names:
        gate, up, down = family.expert_names
        width = experts.gate_and_up_projs.shape[2]
        for e in range(experts.gate_and_up_projs.shape[0]):
            for name, columns in ((gate, (0, width // 2)), (up, (width // 2, width))):
                yield Part(f"experts.{e}.{name}", "experts.gate_and_up_projs", e, columns, True)
            yield Part(f"experts.{e}.{down}", "experts.down_projs", e, transposed=True)
        return
    stacked = layer.stored_transposed
    yield Part("experts.gate_up_proj", "experts.gate_and_up_projs", transposed=stacked)
    yield Part("experts.down_proj", "experts.down_projs", transposed=stacked)
    if experts.gate_up_proj_bias is not None:
        yield Part("experts.gate_up_proj_bias", "experts.gate_up_proj_bias")
        yield Part("experts.down_proj_bias", "experts.down_proj_bias")
