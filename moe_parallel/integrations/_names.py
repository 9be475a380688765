"""Which tensor of a transformers checkpoint is which part of a :class:`TransformersMoE`.

E experts, D hidden size of the experts, I intermediate size, W = 2 * I columns for gated
activations, else I.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_parallel.checkpoint.pieces import Sliced, copy_box
from moe_parallel.module_names import plain_name
from moe_parallel.tensors import local_tensor
from moe_parallel.torch_internals import local_region

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

    def shape(self, ours: Sequence[int]) -> list[int]:
        """The shape of the checkpoint's tensor, of a layer's tensor of the shape ``ours``."""
        return [size.stop for size in self._turned([slice(0, e - b) for b, e in self._box(ours)])]

    def overlap(self, tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]] | None:
        """This rank's part of the checkpoint's tensor, given the layer's ``tensor``.

        Returns:
            ``(view, slices)``: a view of the rank's memory, which ``slices`` cut out of the
            checkpoint's tensor; None if the rank has no part of it.
        """
        local = local_tensor(tensor).detach()
        start, shape = local_region(tensor)
        into, out_of = [], []
        for (begin, end), first, size in zip(self._box(tensor.shape), start, shape, strict=True):
            low, high = max(begin, first), min(end, first + size)
            if low >= high:
                return None
            into.append(slice(low - first, high - first))
            out_of.append(slice(low - begin, high - begin))
        view = local[tuple(into)]
        view = view if self.expert is None else view[0]
        view = view.mT if self.transposed else view
        return view[None] if self.row else view, tuple(self._turned(out_of))

    def axes(self, dims: int) -> list[int | None]:
        """For each dimension of the checkpoint's tensor, that of the layer's with ``dims`` ones."""
        return [d if isinstance(d, int) else None for d in self._turned(list(range(dims)))]

    def write(self, value: Sliced, target: Tensor, piece_bytes: int) -> None:
        """Copy the checkpoint's ``value`` to where it belongs in ``target``, the layer's tensor, in
        pieces of ``piece_bytes``.

        Of a sharded target each rank writes its own shard; no rank talks to another.
        """
        found = self.overlap(target)
        if found is not None:
            view, slices = found
            copy_box(value, [cut.start for cut in slices], view, piece_bytes)

    def _box(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Begin and end in every dimension of a layer's tensor."""
        box = [(0, size) for size in shape]
        if self.expert is not None:
            box[0] = (self.expert, self.expert + 1)
        if self.columns is not None:
            box[-1] = self.columns
        return box

    def _turned(self, dims: list[Any]) -> list[Any]:
        """Something for every dimension of a layer's tensor, for those of the checkpoint's."""
        dims = dims if self.expert is None else dims[1:]
        dims = [*dims[:-2], dims[-1], dims[-2]] if self.transposed else dims
        return [slice(0, 1), *dims] if self.row else dims


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
