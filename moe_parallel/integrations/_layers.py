"""The MoE layer that takes the place of a transformers block."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils import output_capturing

from moe_parallel.config import BackendConfig, MoEConfig
from moe_parallel.gate import Gate
from moe_parallel.integrations._families import Family
from moe_parallel.layers import MoE


class _ObservedGate(Gate):
    """A gate that gives its logits to ``output_router_logits=True``, as the model's router did."""

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        collected = output_capturing._active_collector.get()
        if collected is not None and "router_logits" in collected:
            collected["router_logits"].append(logits)
        return logits


class TransformersMoE(MoE):
    """A :class:`moe_parallel.MoE` that keeps to what its decoder layer expects of the block.

    Attributes:
        family: of the block that it replaces.
        stored_transposed: the block keeps its experts' matrices with the last two dimensions
            swapped.
    """

    def __init__(
        self,
        config: MoEConfig,
        backend: BackendConfig,
        family: Family,
        stored_transposed: bool,
    ) -> None:
        super().__init__(config, backend)
        self.gate = _ObservedGate(config, gate_precision=backend.gate_precision)
        self.family = family
        self.stored_transposed = stored_transposed

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        cp_mesh: DeviceMesh | None = None,
    ) -> Any:
        """``[..., H]`` of ``x [..., H]``, in a tuple where the block returned one."""
        y = super().forward(x, padding_mask, cp_mesh)
        return (y, None) if self.family.returns_scores else y
